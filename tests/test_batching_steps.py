"""The device's part of continuous batching: a row's numbers are its own, whatever the others do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gptoss_jax import model, ops
from gptoss_jax.batching import choices
from gptoss_jax.batching import slots as device
from gptoss_jax.cache import make_cache
from gptoss_jax.sampling import Sampling, sample, to_arrays

forward = jax.jit(model.forward, static_argnames="config")
CONFIG, V = tiny.SMALL, tiny.SMALL.vocab_size
ROWS, CONTEXT, BACK = 4, 300, 3
EVERYTHING = np.full((ROWS, -(-V // 32)), 0xFFFFFFFF, np.uint32)
PROMPTS = [np.asarray(tiny.tokens(1, n, seed=n))[0] for n in (150, 9, 21, 70)]
SAMPLING = Sampling(temperature=1, seed=3, presence_penalty=1.0)


def test_attention_up_to_an_extent_is_attention_over_the_keys_before_it():
    """Also on devices that take all rows together."""
    B, S, N, K, H = 3, 300, 6, 2, 14
    generator = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    q, k, v, sinks = draw(B, 2, N, H), draw(B, S, K, H), draw(B, S, K, H), draw(N)
    lengths = jnp.array([299, 7, 140], jnp.int32)
    slots = jnp.arange(S, dtype=jnp.int32)[None]
    known = jnp.where(slots < lengths[:, None], slots, -1)
    positions = lengths[:, None] - 2 + jnp.arange(2, dtype=jnp.int32)[None]
    attention = jax.jit(ops.attention)
    expected = attention(q, k, v, sinks, positions, known)
    k, v = (jnp.where((known >= 0)[:, :, None, None], x, 1e3) for x in (k, v))
    found = attention(q, k, v, sinks, positions, known, extent_B=lengths)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    from gptoss_jax.ops.attention import _by_keys

    together = _by_keys(
        sinks.reshape(K, -1),
        None,
        q.reshape(B, 2, K, -1, H),
        k,
        v,
        positions,
        known,
        jnp.int32(299),
    )
    np.testing.assert_allclose(together.reshape(q.shape), expected, atol=2e-6)


def test_experts_of_rows_that_count():
    layer = tiny.params(CONFIG)["layers"][0]["mlp"]
    weights = [layer[name] for name in ("gate_up", "gate_up_bias", "down", "down_bias")]
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.normal(size=(40, CONFIG.hidden_size)), jnp.float32)
    experts = jnp.asarray(generator.integers(0, 12, (40, 4)), jnp.int32)
    shares = jnp.full((40, 4), 0.25)
    mlp = jax.jit(functools.partial(ops.expert_mlp, alpha=1.7, limit=7.0))
    expected = mlp(x, shares, experts, *weights)
    several = jnp.asarray(generator.random(40) < 0.4)
    results = []
    for counted in (several, jnp.arange(40) == 7, jnp.ones(40, bool)):
        counted = counted | (jnp.arange(40) == 7)
        found = mlp(x, shares, experts, *weights, counted_M=counted)
        kept = np.asarray(counted)
        np.testing.assert_allclose(found[kept], expected[kept], atol=1e-5)
        assert not np.asarray(found)[~kept].any()
        results.append(np.asarray(found)[7])
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_a_mask_only_takes_away():
    """The choice among what filters keep and the mask allows; without such, among all allowed."""
    generator = np.random.default_rng(2)
    rows = [Sampling(temperature=t, top_k=k, seed=i) for i, (t, k) in enumerate(
        [(0, 0), (1, 0), (1, 4), (1, 1), (0.5, 3), (2, 0)] * 8)]  # fmt: skip
    B = len(rows)
    logits = jnp.asarray(3 * generator.normal(size=(B, V)), jnp.float32)
    allowed = generator.random((B, V)) < 0.3
    bits = np.zeros((B, -(-V // 32) * 32), np.uint8)
    bits[:, :V] = allowed
    words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    arrays = to_arrays(rows, [0] * B, V)
    zeros = jnp.zeros((B, V), jnp.int32)
    call = (logits, arrays, zeros, zeros, jnp.arange(B, dtype=jnp.int32))
    drawn = jax.jit(sample)
    free, masked = np.asarray(drawn(*call)), np.asarray(drawn(*call, jnp.asarray(words)))
    agreed = fell_back = 0
    for i, s in enumerate(rows):
        assert allowed[i, masked[i]]
        if allowed[i, free[i]]:
            assert masked[i] == free[i]
            agreed += 1
        order = np.argsort(-np.asarray(logits[i]))
        kept = set(order[: s.top_k or V].tolist()) & set(np.flatnonzero(allowed[i]).tolist())
        if s.temperature == 0:
            assert masked[i] == next(t for t in order if allowed[i, t])
        elif kept:
            assert masked[i] in kept
        else:
            fell_back += 1
    assert agreed >= 5
    assert fell_back >= 5


def begin(slots, row, prompt, sampling=SAMPLING, chunk=16):
    """Reads a prompt into a row by chunks and lets it generate."""
    for at in range(0, len(prompt) - 1, chunk):
        part = prompt[at : min(at + chunk, len(prompt) - 1)]
        ids = np.zeros((1, chunk), np.int32)
        ids[0, : len(part)] = part
        place = np.array([row, at, len(part), 0], np.int32)
        slots, _ = device.read(tiny.params(CONFIG), slots, ids, place, config=CONFIG)
    return device.admit(slots, device.start(row, prompt, sampling, 0, 7, 0, V))


def step(slots, allowed=EVERYTHING):
    slots, logits = choices.advance(tiny.params(CONFIG), slots, config=CONFIG)
    slots, tokens = choices.choose(slots, logits, allowed)
    return slots, logits, np.asarray(tokens)


def make():
    return device.make(CONFIG, ROWS, CONTEXT, BACK, jnp.dtype("float32"))


@pytest.fixture(scope="module")
def alone():
    """Tokens and logits of the first prompt in row 2, with nobody else."""
    slots, logits, tokens = begin(make(), 2, PROMPTS[0]), [], []
    for _ in range(12):
        slots, some, chosen = step(slots)
        logits.append(np.asarray(some)[2])
        tokens.append(int(chosen[2]))
    return tokens, logits


def test_logits_are_those_of_the_whole_sequence(alone):
    tokens, logits = alone
    whole = np.concatenate([PROMPTS[0], tokens[:-1]])[None]
    expected, _ = forward(tiny.params(CONFIG), jnp.asarray(whole), config=CONFIG)
    np.testing.assert_allclose(logits, expected[0, len(PROMPTS[0]) - 1 :], atol=1e-4)


def test_other_rows_change_no_bit(alone):
    """Others come before, between and go; one holds what is not a number."""
    slots = begin(make(), 0, PROMPTS[3])
    slots = step(begin(slots, 1, PROMPTS[1]))[0]
    slots = begin(slots, 2, PROMPTS[0])
    for i in range(12):
        if i == 3:
            slots = begin(slots, 3, PROMPTS[2], Sampling(top_p=0.5, repetition_penalty=1.3))
        if i == 5:
            slots = device.release(slots, np.array([True, False, False, False]))
        if i == 8:
            keys = tuple(k.at[1].set(jnp.nan) for k in slots.cache.keys)
            slots = dataclasses.replace(slots, cache=dataclasses.replace(slots.cache, keys=keys))
        slots, logits, tokens = step(slots)
        assert tokens[2] == alone[0][i]
        assert (np.asarray(logits)[2] == alone[1][i]).all()
        assert (tokens[1] == choices.BROKEN) == (i >= 8)


@pytest.mark.parametrize("steps_on", [0, 1, 2])
def test_a_row_taken_back_goes_on_as_if_it_had_never_gone_ahead(alone, steps_on):
    """Also over the border of a ring (window 8), with penalties that count what came after."""
    for place in range(1, 10):
        slots = begin(make(), 2, PROMPTS[0])
        for _ in range(place):
            slots, _, _ = step(slots)
        slots, logits = choices.advance(tiny.params(CONFIG), slots, config=CONFIG)
        length = slots.cache.length_B + 0
        wrong = EVERYTHING.copy()
        right = alone[0][place]
        wrong[2, right // 32] &= ~np.uint32(1 << right % 32)
        slots, tokens = choices.choose(slots, logits, wrong)
        assert int(tokens[2]) != right
        for _ in range(steps_on):
            slots, _, _ = step(slots)
        back = np.array([0, 0, 1 + steps_on, 0], np.int32)
        slots, tokens = choices.redo(slots, logits, EVERYTHING, length, back)
        found = [int(tokens[2])]
        while len(found) < 12 - place:
            slots, _, tokens = step(slots)
            found.append(int(tokens[2]))
        assert found == alone[0][place:]


def test_a_ring_with_slack_is_a_ring():
    """Chunks and steps over a cache with more slots than the window give the same logits."""
    ids = tiny.tokens(2, 39)
    expected, _ = forward(tiny.params(CONFIG), ids, config=CONFIG)
    cache, at = make_cache(CONFIG, 2, 64, jnp.float32, slack=3), 0
    for size in (12, 1, 1, 12, 1, 12):
        logits, cache = forward(tiny.params(CONFIG), ids[:, at : at + size], cache, config=CONFIG)
        np.testing.assert_allclose(logits, expected[:, at : at + size], atol=1e-4)
        at += size
