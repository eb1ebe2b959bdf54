"""Generation on the test model: against its own logits, alone and in batches, with every way to
stop.
"""

import jax
import numpy as np
import pytest
import tiny

from gptoss_jax import steps
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling
from gptoss_jax.stops import StopStrings

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate("hello", GREEDY, max_new_tokens=20)


def test_greedy_follows_the_logits(model, greedy):
    prompt = model.tokenizer.encode("hello")
    logits = np.asarray(model.logits(np.array([prompt + greedy.tokens])))
    assert logits[0].argmax(-1)[len(prompt) - 1 : -1].tolist() == greedy.tokens
    assert greedy.finish_reason == "length"
    assert greedy.text == model.tokenizer.decode(greedy.tokens)


def test_unequal_prompts_together_equal_each_alone(model, greedy):
    """Also across prefill chunks: one prompt is longer than the largest bucket."""
    prompts = ["hello", [1, 2, 3], list(range(200)), "some words " * 3]
    together = model.generate(prompts, GREEDY, max_new_tokens=12)
    assert together[0].tokens == greedy.tokens[:12]
    for prompt, completion in zip(prompts[1:], together[1:], strict=True):
        assert model.generate([prompt], GREEDY, max_new_tokens=12)[0].tokens == completion.tokens


def test_prompts_longer_than_a_chunk(model, monkeypatch):
    import gptoss_jax.engine as engine

    whole = model.generate(list(range(1, 101)), GREEDY, max_new_tokens=6)
    monkeypatch.setattr(engine, "CHUNKS", (32,))
    assert model.generate(list(range(1, 101)), GREEDY, max_new_tokens=6).tokens == whole.tokens


def test_stream_is_the_completion_in_pieces(model, greedy):
    pieces = list(model.stream("hello", GREEDY, max_new_tokens=20))
    assert len(pieces) > 3
    assert [t for p in pieces for t in p.tokens] == greedy.tokens
    assert "".join(p.text for p in pieces) == greedy.text
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_n_completions_and_seeds(model):
    three = model.generate("hello", Sampling(seed=5, n=3), max_new_tokens=10)
    assert len({tuple(c.tokens) for c in three}) == 3
    again = model.generate(
        ["other", "hello"], [Sampling(seed=1), Sampling(seed=5)], max_new_tokens=10
    )
    assert again[1].tokens == three[0].tokens
    mixed = model.generate(["hello", "hello"], [Sampling(seed=5, n=2), GREEDY], max_new_tokens=10)
    assert [c.tokens for c in mixed[0]] == [c.tokens for c in three[:2]]


def test_stop_ids_are_not_emitted(model, greedy):
    stop = greedy.tokens[6]
    first = greedy.tokens.index(stop)
    found = model.generate(
        "hello", Sampling(temperature=0, stop_token_ids=[stop]), max_new_tokens=20
    )
    assert (found.tokens, found.finish_reason, found.stop) == (greedy.tokens[:first], "stop", stop)
    eos = tiny.CONFIG.eos_token_ids[0]
    forced = Sampling(temperature=0, logit_bias={eos: 1000.0})
    ended = model.generate("hello", forced, max_new_tokens=5)
    assert (ended.tokens, ended.text, ended.stop) == ([], "", eos)
    ignored = model.generate(
        "hello",
        Sampling(temperature=0, logit_bias={eos: 1000.0}, ignore_eos=True),
        max_new_tokens=5,
    )
    assert ignored.tokens == [eos] * 5


def test_stop_strings_split_over_tokens(model):
    """A bias makes the model write 'ab' again and again; the stop string begins in one token and
    ends in another.
    """
    a = model.tokenizer.encode("a")[0]
    forced = Sampling(temperature=0, logit_bias={a: 1000.0})
    found = model.generate("hello", forced, max_new_tokens=9, stop=["aaa"])
    assert (found.text, found.tokens, found.stop, found.finish_reason) == ("", [], "aaa", "stop")
    found = model.generate("hello", forced, max_new_tokens=9, stop=["aab"])
    assert (found.text, found.finish_reason, len(found.tokens)) == ("a" * 9, "length", 9)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_stop_strings_by_search(model, cut):
    text = "say — wörld STOP never"
    ids = model.tokenizer.encode(text)
    stops = StopStrings(model.tokenizer, ["zz", "rld S"])
    emitted, tokens, found = "", [], None
    for token in ids:
        new, new_tokens, found = stops.feed(token)
        emitted += new
        tokens += new_tokens
        if found:
            break
    assert (emitted, found) == ("say — wö", "rld S")
    assert model.tokenizer.decode(tokens) == emitted
    held = StopStrings(model.tokenizer, ["say — w" + "x" * cut])
    pieces = [held.feed(token)[0] for token in ids[:6]]
    assert "".join(pieces) + held.flush()[0] == model.tokenizer.decode(ids[:6])


def test_logprobs_are_those_of_the_logits(model, greedy):
    found = model.generate(
        "hello", Sampling(temperature=0, logprobs=True, top_logprobs=3), max_new_tokens=20
    )
    prompt = model.tokenizer.encode("hello")
    logits = np.asarray(model.logits([prompt + greedy.tokens])[0], np.float64)[len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert [x.token for x in found.logprobs] == found.tokens == greedy.tokens
    for i, x in enumerate(found.logprobs):
        assert x.logprob == pytest.approx(expected[i, x.token], abs=1e-4)
        assert x.top[0] == (x.token, pytest.approx(x.logprob))
        assert [t for t, _ in x.top] == np.argsort(-expected[i])[:3].tolist()


def test_the_cache_grows_to_the_end_of_the_context(model):
    found = tiny.model(max_context=700 if tiny.CONFIG.max_context >= 700 else 512).generate(
        "hello", GREEDY, max_new_tokens=None
    )
    assert found.finish_reason == "length"
    assert len(found.tokens) == 512 - len(model.tokenizer.encode("hello"))


def test_a_grown_cache_gives_the_same_tokens(model, monkeypatch):
    import gptoss_jax.engine as engine

    expected = model.generate("hello", GREEDY, max_new_tokens=100)
    monkeypatch.setattr(engine, "MIN_CAPACITY", 32)
    monkeypatch.setattr(engine.Model, "_prefill", _small_prefill(engine.Model._prefill))
    assert model.generate("hello", GREEDY, max_new_tokens=100).tokens == expected.tokens


def _small_prefill(prefill):
    return lambda self, ids, copies, total, numbers: prefill(
        self, ids, copies, max(len(row) for row in ids) + 1, numbers
    )


def test_new_lengths_limits_and_settings_do_not_recompile(model):
    model.generate("hello there", Sampling(seed=1), max_new_tokens=40)
    before = steps.prefill._cache_size(), steps.decode._cache_size()
    for prompt, n in (("a", 3), ("a longer prompt", 17), ([5] * 31, 64)):
        model.generate(
            prompt,
            Sampling(temperature=0.5, top_p=0.9, seed=2, presence_penalty=1.0),
            max_new_tokens=n,
        )
        list(model.stream(prompt, GREEDY, max_new_tokens=n))
    assert (steps.prefill._cache_size(), steps.decode._cache_size()) == before


def test_lists_of_unequal_length_give_lists_of_logits(model):
    found = model.logits([[1, 2, 3], list(range(40))])
    assert [x.shape for x in found] == [(3, 331), (40, 331)]
    np.testing.assert_allclose(found[0], model.logits(np.array([[1, 2, 3]]))[0], atol=1e-4)


def test_float32_and_bfloat16_caches_have_the_parameters_type(model):
    half = jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == "float32" else x, model.params)
    completion = tiny.model(params=half).generate("hello", GREEDY, max_new_tokens=4)
    assert len(completion.tokens) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(""), "the prompt is empty: give at least one token"),
        (lambda m: m.generate([]), "the prompt is empty: give at least one token"),
        (lambda m: m.generate([[1], []]), "the prompt is empty: give at least one token"),
        (
            lambda m: m.generate([1, 331]),
            "token id 331 at position 1 is out of range: ids are 0 to 330",
        ),
        (lambda m: m.logits([[-1]]), "token id -1 at position 0 is out of range: ids are 0 to 330"),
        (
            lambda m: m.generate([1] * 500, max_new_tokens=13),
            "the prompt has 500 tokens and 13 new ones are asked for: the context is 512 tokens; "
            "shorten the prompt or ask for fewer",
        ),
        (
            lambda m: m.generate("a", max_new_tokens=0),
            "max_new_tokens is 0: expected a positive integer, or None",
        ),
        (lambda m: m.generate("a", stop=[""]), "stop is ['']: expected strings that are not empty"),
        (
            lambda m: m.stream("a", Sampling(n=2)),
            "n is 2: a stream has one completion, use generate for more",
        ),
        (
            lambda m: m.generate(["a", "b"], [GREEDY]),
            "1 sampling settings for 2 prompts: give one, or one for each",
        ),
        (lambda m: m.generate([1.5]), "expected a list of token ids"),
    ],
)
def test_refusals_before_any_work(model, call, message):
    with pytest.raises(GptOssError) as error:
        call(model)
    assert message in str(error.value)
