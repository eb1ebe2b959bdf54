"""Continuous batching: what each request gets is what it would get alone, whatever else runs, is
cancelled, refused or broken.
"""

import collections
import contextlib
import dataclasses
import queue
import threading
import time

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_jax as gj
from gptoss_jax.batching import (
    Busy,
    Closing,
    Engine,
    EngineSettings,
    Failure,
    Request,
    choices,
    pages,
)
from gptoss_jax.completions import join
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling

V = tiny.CONFIG.vocab_size
SETTINGS = EngineSettings(slots=4, max_context=256, chunk=16, max_queue=20)


@pytest.fixture(scope="module")
def model():
    return tiny.model(config=tiny.SMALL, params=tiny.params(tiny.SMALL))


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, SETTINGS)
    engine.warm_up()
    yield engine
    engine.close(0)


def submit(engine, requests, heard=lambda k, i: None):
    """Generations, and a function that waits for what every completion gets: {(request, index):
    pieces}. `heard` is called after each piece.
    """
    came: queue.Queue = queue.Queue()

    def listener(k):
        def listen(i, piece):
            came.put((k, i, piece))
            heard(k, i)

        return listen

    generations = [engine.submit(request, listener(k)) for k, request in enumerate(requests)]

    def wait():
        left, parts = sum(request.sampling.n for request in requests), {}
        while left:
            k, i, piece = came.get(timeout=120)
            parts.setdefault((k, i), []).append(piece)
            left -= isinstance(piece, Failure) or piece.finish_reason is not None
        return parts

    return generations, wait


class Gate:
    """Where a listener holds the engine, which is at work in the thread that calls it."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def hold(self):
        self.reached.set()
        self.opened.wait(60)


def run(engine, requests, submitted=lambda: None):
    """Completions (or Failures) of every request, as a list of lists; `submitted` is called when
    all are.
    """
    wait = submit(engine, requests)[1]
    submitted()
    parts = wait()
    ends = {
        key: pieces[-1] if isinstance(pieces[-1], Failure) else join(pieces)
        for key, pieces in parts.items()
    }
    return [[ends[k, i] for i in range(r.sampling.n)] for k, r in enumerate(requests)]


def workload(count, seed=0):
    """Random requests with every kind of setting."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        sampling = Sampling(
            temperature=[0.0, 1.0, 0.7][i % 3],
            seed=int(rng.integers(1 << 40)),
            n={3: 2, 7: 5}.get(i, 1),  # 5 are more than there are slots
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            presence_penalty=float(rng.choice([0.0, 0.5])),
            logit_bias={int(rng.integers(V)): 2.0} if i % 5 == 0 else {},
            logprobs=i % 3 == 0,
            top_logprobs=3 * (i % 3 == 0),
            ignore_eos=bool(i % 2),
        )
        prompt = rng.integers(0, V, int(rng.integers(1, 90))).tolist()
        yield Request(prompt, sampling, int(rng.integers(1, 40)))


def test_every_request_gets_what_generate_gives(model, engine):
    requests = list(workload(10))
    alone = model.generate(
        [r.prompt for r in requests],
        [r.sampling for r in requests],
        [r.max_new_tokens for r in requests],
    )
    for expected, found in zip(alone, run(engine, requests), strict=True):
        expected = expected if isinstance(expected, list) else [expected]
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        for a, b in zip(found, expected, strict=True):
            assert (a.text, a.finish_reason, a.stop) == (b.text, b.finish_reason, b.stop)
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs and b.logprobs:
                pairs = list(zip(a.logprobs, b.logprobs, strict=True))
                assert max(abs(x.logprob - y.logprob) for x, y in pairs) < 1e-4
                assert all([i for i, _ in x.top] == [i for i, _ in y.top] for x, y in pairs)


def test_gpt_oss_tiny_answers_the_same_alone_and_in_a_crowd():
    """To the bit of the log probabilities."""
    model = gj.load("gpt-oss-tiny")
    engine = Engine(model, EngineSettings(slots=8, max_context=512))
    rng = np.random.default_rng(4)
    text = "What is 12 + 7? Tell me about the sea. "
    some = [
        Request(
            model.tokenizer.encode(text * int(rng.integers(1, 9)))[i:],
            Sampling(seed=i, logprobs=True, top_p=0.9 if i % 2 else 1.0),
            int(rng.integers(5, 40)),
        )
        for i in range(4)
    ]
    alone = [run(engine, [request])[0][0] for request in some]
    crowd = [
        Request(rng.integers(256, 1600, int(rng.integers(1, 400))).tolist(), Sampling(), 30)
        for _ in range(12)
    ]
    order = rng.permutation(16)
    together = run(engine, [[*some, *crowd][i] for i in order])
    assert [together[list(order).index(i)][0] for i in range(4)] == alone
    engine.close()


class Only:
    """A grammar that allows the ids of some residues, by place."""

    def __init__(self, pattern):
        self.pattern, self.accepted = pattern, []

    def _set(self):
        divisor, residue = self.pattern[len(self.accepted) % len(self.pattern)]
        return np.arange(V) % divisor == residue

    def fill(self, allowed):
        bits = np.zeros(32 * len(allowed), np.uint8)
        bits[:V] = self._set()
        allowed[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token):
        good = bool(self._set()[token])
        if good:
            self.accepted.append(token)
        return good


def test_masked_choices_are_the_allowed_ones(engine):
    """Beside others that are free; a grammar that allows all changes nothing."""
    pattern = [(2, 0), (7, 3), (1, 0), (1, 0)]
    masks = [Only(pattern) for _ in range(3)] + [Only([(1, 0)])]
    base = [Sampling(temperature=t, seed=5, ignore_eos=True) for t in (0, 1, 1, 1)]
    base[2] = Sampling(temperature=1, seed=6, top_k=1, presence_penalty=1.5, ignore_eos=True)
    prompt = list(range(30, 50))
    requests = [
        Request(prompt, s, 24, masks=[mask]) for s, mask in zip(base, masks, strict=True)
    ] + [Request(prompt, base[1], 24)]
    found = [c[0] for c in run(engine, requests)]
    for completion, mask in zip(found, masks, strict=False):
        assert completion.tokens == mask.accepted
        check = Only(mask.pattern)
        assert all(check.accept(token) for token in completion.tokens)
    assert found[3].tokens == found[4].tokens
    time.sleep(0.2)
    assert engine.statistics()["slots_busy"] == 0


class Dead(Only):
    """Allows nothing after three tokens."""

    def _set(self):
        return np.full(V, len(self.accepted) < 3)


def test_a_grammar_without_a_way_on_fails_alone(engine):
    s = Sampling(seed=1, ignore_eos=True)
    ends = run(engine, [Request([5, 6], s, 9, masks=[Dead(None)]), Request([5, 6], s, 9)])
    assert "allows no token" in str(getattr(ends[0][0], "error", ""))
    assert len(ends[1][0].tokens) == 9


def settled(engine, **expected):
    """Waits until the statistics are as expected: the last piece comes before the last book."""
    until = time.monotonic() + 30
    while any(engine.statistics()[name] != value for name, value in expected.items()):
        assert time.monotonic() < until, engine.statistics()
        time.sleep(0.01)


def test_prompts_are_read_once(engine):
    """What pages give is, to the bit, what reading gives; usage says what was not read."""
    rng = np.random.default_rng(7)
    head = rng.integers(0, V, 75).tolist()
    sampling = Sampling(seed=1, n=2, logprobs=True, top_logprobs=2, ignore_eos=True)
    requests = [Request(head, sampling, 8), Request([*head[:70], 5, 6, 7], sampling, 8)]
    first = [run(engine, [request]) for request in requests]
    before = engine.statistics()["cached_tokens_total"]
    generations, wait = submit(engine, requests)
    parts = wait()
    assert [g.cached_tokens for g in generations] == [64, 64]
    assert engine.statistics()["cached_tokens_total"] == before + 128
    for k, completions in enumerate(first):
        for i, completion in enumerate(completions[0]):
            assert join(parts[k, i]) == completion
    other = rng.integers(0, V, 75).tolist()
    generations, wait = submit(engine, [Request(other[:1] + head[1:], sampling, 2)])
    wait()
    assert generations[0].cached_tokens == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("find add forget".split()), st.integers(0, 6))),
    st.integers(0, 4),
)
def test_page_table_against_brute_force(calls, count):
    """A list of names by last use, and what was written to each page."""
    table, used, written = pages.PageTable(count), [], {}
    for call, number in calls:
        name = bytes([number])
        if call == "forget":
            table.forget([name])
            used = [n for n in used if n != name]
            written = {page: held for page, held in written.items() if held != name}
        elif name in used:
            page = table.find(name)
            assert written[page] == name
            used.append(used.pop(used.index(name)))
        else:
            assert table.find(name) is None
            if call == "add":
                page = table.add(name)
                assert (page is None) == (count == 0)
                if page is not None:
                    assert 0 <= page < count
                    used = [n for n in used if n != written.get(page)]
                    assert len(used) < count
                    written[page] = name
                    used.append(name)
        assert len(table) == len(used) <= count


def test_page_names_are_of_all_tokens_before():
    ids = np.arange(40, dtype=np.int32)
    base = pages.names(ids, 8, 0)
    assert len(base) == 4  # the last token is never in a page
    assert pages.names(ids[:33], 8, 0) == base
    assert pages.names(ids[:32], 8, 0) == base[:3]
    for place in range(32):
        changed = ids.copy()
        changed[place] = 99
        found = pages.names(changed, 8, 0)
        assert [a == b for a, b in zip(found, base, strict=True)] == [
            8 * i + 8 <= place for i in range(4)
        ]
    assert not set(pages.names(ids, 8, 1)) & set(base)


def test_cancel_ends_within_a_step_and_frees(engine):
    rng = np.random.default_rng(3)
    long = Sampling(seed=1, ignore_eos=True, n=2)
    came = collections.defaultdict(list)
    started, ended, done = Gate(), Gate(), threading.Event()

    def listen(i, piece):
        came[i].append(piece)
        if i == 0 and len(came[0]) == 4:
            started.hold()
        if i == 0 and piece.finish_reason:
            ended.hold()
        if i == 1 and piece.finish_reason:
            done.set()

    generation = engine.submit(Request(rng.integers(0, V, 60).tolist(), long, 180), listen)
    assert started.reached.wait(60)
    steps = engine.statistics()["steps_total"]
    generation.cancel(0)
    generation.cancel(0)
    started.opened.set()
    assert ended.reached.wait(60)
    assert engine.statistics()["steps_total"] - steps <= 1
    assert came[0][-1].finish_reason == "cancelled"
    assert not came[1][-1].finish_reason
    generation.cancel()
    ended.opened.set()
    assert done.wait(60)
    assert came[1][-1].finish_reason == "cancelled"
    settled(engine, slots_busy=0, queue=0)
    # in the queue, and while the prompt is read
    before, reading, heard = Gate(), Gate(), collections.Counter()

    def third(k, i):
        heard[k, i] += 1
        if heard[0, 0] == 3:
            reading.hold()

    engine.submit(Request([1], Sampling(), 1), lambda i, piece: before.hold())
    assert before.reached.wait(60)
    many = [Request(rng.integers(0, V, 200).tolist(), long, 40) for _ in range(6)]
    generations, wait = submit(engine, many, third)
    before.opened.set()
    assert reading.reached.wait(60)
    assert engine.statistics()["slots_busy"] == 4  # the second is at work
    assert not heard[1, 0]
    for generation in generations[1:]:
        generation.cancel()
    reading.opened.set()
    ends = {key: parts[-1].finish_reason for key, parts in wait().items()}
    assert [ends[0, i] for i in range(2)] == ["length"] * 2
    assert {ends[k, i] for k in range(1, 6) for i in range(2)} == {"cancelled"}
    settled(engine, slots_busy=0, queue=0)


def test_refusals(model, engine):
    def refused(match, **changes):
        request = Request(**{"prompt": [1, 2, 3], "max_new_tokens": 4} | changes)
        with pytest.raises(GptOssError, match=match):
            engine.submit(request, lambda i, piece: None)

    refused("empty", prompt=[])
    refused("out of range", prompt=[1, V])
    refused("context is 256", prompt=[1] * 250, max_new_tokens=10)
    refused("context is 256", prompt=[1] * 256, max_new_tokens=None)
    refused("no adapter 'x'", adapter="x")
    refused("max_new_tokens is 0", max_new_tokens=0)
    refused("stop", stop=[""])
    refused("1 masks for 2", masks=[Only([(1, 0)])], sampling=Sampling(n=2))
    refused("logit_bias", sampling=Sampling(logit_bias={V: 1.0}))
    for bad, match in (
        ({"slots": 0}, "slots"),
        ({"chunk": 12}, "multiple of the window"),
        ({"max_context": 4096}, "1 to 512"),
        ({"slots": 1 << 24, "max_context": 512}, "GB"),
    ):
        with pytest.raises(GptOssError, match=match):
            Engine(model, EngineSettings(**bad))


def test_priorities_and_a_bounded_queue(model):
    engine = Engine(model, SETTINGS)
    came: queue.Queue = queue.Queue()
    s = Sampling(seed=0, ignore_eos=True, n=SETTINGS.slots)  # one request takes all slots
    gates = {name: Gate() for name in ("first", "left", "late")}

    def listener(name):
        def listen(i, piece):
            if name in gates:  # holds the engine until what is to come before it has come
                gates[name].hold()
            if piece.finish_reason and i == 0:
                came.put((name, piece.finish_reason))

        return listen

    engine.submit(Request([1, 2], s, 3), listener("first"))
    while engine.statistics()["queue"] or not engine.statistics()["slots_busy"]:
        time.sleep(0.01)
    for name, priority in (("low", 5), ("a", 0), ("b", 0)):
        engine.submit(Request([3], s, 2, priority=priority), listener(name))
    rest = [engine.submit(Request([3], s, 2, priority=9), listener("rest")) for _ in range(17)]
    with pytest.raises(Busy, match="try again"):
        engine.submit(Request([3], s, 2), listener("busy"))
    for generation in rest:
        generation.cancel()
    gates["first"].opened.set()
    ends = [came.get(timeout=60) for _ in range(21)]
    assert [end for end in ends if end[0] != "rest"] == [
        (n, "length") for n in "first a b low".split()
    ]
    assert {end for end in ends if end[0] == "rest"} == {("rest", "cancelled")}
    left = engine.submit(Request([3], s, 200), listener("left"))
    closing = threading.Thread(target=engine.close)  # until all are done
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    left.cancel()
    gates["left"].opened.set()
    closing.join(60)
    assert not closing.is_alive()
    with pytest.raises(Closing):
        engine.submit(Request([3], s, 2), listener("too late"))
    assert came.get(timeout=10) == ("left", "cancelled")
    left.cancel()
    late = Engine(model, SETTINGS)
    late.submit(Request([3], s, 200), listener("late"))
    closing = threading.Thread(target=late.close, args=(0,))
    closing.start()
    refusal, end = None, time.monotonic() + 30
    while not isinstance(refusal, Closing):
        assert time.monotonic() < end
        try:
            late.submit(Request([3], s, 2), lambda i, piece: None)
        except (Busy, Closing) as error:
            refusal = error
    gates["late"].opened.set()
    closing.join(60)
    assert came.get(timeout=10) == ("late", "cancelled")


def test_drafts_change_nothing(model, engine):
    """Prompts that repeat themselves, greedy and drawn, with penalties, grammars and logprobs."""
    rng = np.random.default_rng(11)
    drafting = Engine(model, dataclasses.replace(SETTINGS, drafts=3))
    drafting.warm_up()
    requests = list(workload(8, seed=2))

    def masks():
        return [Only([(2, 0), (1, 0), (3, 1)])]

    for i in range(8):
        part = rng.integers(0, V, 6).tolist()
        sampling = Sampling(
            temperature=0.3 * (i % 2), seed=i, ignore_eos=True, logprobs=i == 3,
            repetition_penalty=0.7, presence_penalty=-1.0 * (i % 3),
        )  # fmt: skip
        requests.append(Request(part * 8, sampling, 150, masks=masks() if i > 5 else ()))
    expected = run(engine, requests)
    for i in (6, 7):
        requests[8 + i] = dataclasses.replace(requests[8 + i], masks=masks())
    with compilations() as compiled:
        found = run(drafting, requests)
    assert not compiled
    for a, b in zip(found, expected, strict=True):
        assert [c.tokens for c in a] == [c.tokens for c in b]
        assert [c.text for c in a] == [c.text for c in b]
    counts = drafting.statistics()
    assert counts["accepted_tokens_total"] > 100
    assert counts["accepted_tokens_total"] <= counts["draft_tokens_total"]
    drafting.close()


@contextlib.contextmanager
def compilations():
    """The compilations of its block."""
    compiled = []

    def listener(event, duration_secs, **_):
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_nothing_compiles_after_warm_up(engine):
    requests = list(workload(14, seed=5))
    masks = [Only([(2, 0), (3, 1)]) for _ in range(2)]
    requests.append(Request(list(range(20)), Sampling(n=2, logprobs=True), 20, masks=masks))
    with compilations() as compiled:
        generations, wait = submit(engine, requests)
        generations[2].cancel()
        wait()
    assert not compiled
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(1.5)
    assert compiled  # the listener hears


def test_failures_are_those_of_the_requests_at_work(engine, monkeypatch):
    request = Request(list(range(50)), Sampling(seed=4, ignore_eos=True), 20)
    expected = run(engine, [request])[0][0]
    advance, calls, everybody = choices.advance, [], threading.Event()

    def broken(params, slots, *rest, **keywords):
        everybody.wait(60)
        slots, logits = advance(params, slots, *rest, **keywords)
        calls.append(1)
        if len(calls) == 5:  # what was donated is lost
            raise RuntimeError("the device is gone")
        if 25 < len(calls) < 28:  # one row is not a number
            logits = logits.at[0].set(np.nan)
        return slots, logits

    monkeypatch.setattr(choices, "advance", broken)
    ends = [c[0] for c in run(engine, [request] * 4, everybody.set)]
    assert ["is gone" in str(getattr(end, "error", "")) for end in ends] == [True] * 4
    settled(engine, slots_busy=0)
    calls.extend([0] * (20 - len(calls)))
    everybody.clear()
    ends = [c[0] for c in run(engine, [request] * 4, everybody.set)]
    failed = [end for end in ends if isinstance(end, Failure)]
    assert len(failed) == 1
    assert "not numbers" in str(getattr(failed[0], "error", ""))
    assert [end for end in ends if not isinstance(end, Failure)] == [expected] * 3
    monkeypatch.undo()
    assert run(engine, [request] * 4) == [[expected]] * 4
    settled(engine, slots_busy=0, queue=0)
