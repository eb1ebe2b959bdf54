"""Sampling against sorting, against closed forms, and against its own promise: the seed alone
decides.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import sampling
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling, to_arrays

V = 53
draw = jax.jit(sampling.sample)


def choose(logits, rows, position=0, seen=None, counts=None, choices=None):
    B = len(rows)
    return np.asarray(
        draw(
            jnp.asarray(logits, jnp.float32),
            to_arrays(rows, choices or [0] * B, V),
            jnp.zeros((B, V), jnp.int8) if seen is None else jnp.asarray(seen, jnp.int8),
            jnp.zeros((B, V), jnp.int32) if counts is None else jnp.asarray(counts, jnp.int32),
            jnp.full(B, position, jnp.int32),
        )
    )


def allowed(logits, s: Sampling):
    """The tokens that top-k, top-p and min-p leave, by sorting, in float64; and whether rounding
    may blur the border.
    """
    x = np.asarray(logits, np.float64) / s.temperature
    order = np.argsort(-x, kind="stable")
    kept = set(order[: s.top_k or V])
    p = np.where([i in kept for i in range(V)], np.exp(x - x.max()), 0)
    p /= p.sum()
    total, nucleus = 0.0, set()
    for i in sorted(kept, key=lambda i: -p[i]):
        if total >= s.top_p - 1e-6 and s.top_p < 1:
            break
        nucleus.add(i)
        total += p[i]
    return {i for i in nucleus if p[i] >= s.min_p * p.max() * (1 - 1e-6)}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6), st.floats(0.3, 3.0), st.sampled_from([0, 1, 2, 7, 52, 1000]),
    st.floats(0.05, 1.0), st.floats(0, 0.9),
)  # fmt: skip
def test_filters_by_sorting(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=V).astype(np.float32) * 3
    row = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scaled = jnp.asarray(logits[None] / np.float32(temperature))
    found = jax.jit(sampling._filter)(scaled, to_arrays([row], [0], V))
    kept = set(np.flatnonzero(np.isfinite(np.asarray(found[0]))).tolist())
    expected = allowed(logits, row)
    # a token exactly on top-p's border may fall on either side in float32
    assert kept == expected or len(kept ^ expected) == 1
    assert int(logits.argmax()) in kept


def test_frequencies_follow_the_distribution():
    """20,000 draws at different positions against the softmax, by a chi-square bound."""
    logits = np.linspace(0, 3, V, dtype=np.float32)
    positions = jnp.arange(20000, dtype=jnp.int32)
    keys = jnp.tile(to_arrays([Sampling(seed=3)], [0], V).keys_B2, (20000, 1))
    noise = sampling._gumbel(keys, positions, V)
    counts = np.bincount(np.asarray(jnp.argmax(noise + logits[None], axis=1)), minlength=V)
    expected = 20000 * np.exp(logits) / np.exp(logits).sum()
    assert ((counts - expected) ** 2 / expected).sum() < V + 5 * math.sqrt(2 * V)


def test_the_seed_alone_decides():
    logits = np.random.default_rng(0).normal(size=(4, V))
    rows = [Sampling(seed=s) for s in (7, 8, 7, 2**63)]
    together = choose(np.tile(logits[:1], (4, 1)), rows, position=5)
    alone = [choose(logits[:1], [row], position=5)[0] for row in rows]
    assert together.tolist() == alone
    assert together[0] == together[2]
    many = [choose(logits[:1], [Sampling(seed=7)], position=p)[0] for p in range(20)]
    assert len(set(many)) > 5
    others = [choose(logits[:1], [Sampling(seed=7)], position=5, choices=[c])[0] for c in range(20)]
    assert len(set(others)) > 5


def test_greedy_and_drawn_rows_mix():
    logits = np.random.default_rng(1).normal(size=(3, V))
    rows = [
        Sampling(temperature=0),
        Sampling(temperature=1.5, seed=1, top_k=1),
        Sampling(temperature=0),
    ]
    assert choose(logits, rows).tolist() == logits.argmax(1).tolist()


def test_penalties_and_bias_by_hand():
    logits = np.random.default_rng(2).normal(size=(1, V)).astype(np.float32)
    seen, counts = np.zeros((1, V)), np.zeros((1, V))
    seen[0, :10], counts[0, 5:20] = 1, np.arange(15)
    row = Sampling(
        temperature=0,
        repetition_penalty=1.7,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={3: 2.5, 52: -1},
    )
    expected = logits[0].astype(np.float64)
    for i in range(V):
        if seen[0, i] or counts[0, i]:
            expected[i] = expected[i] / 1.7 if expected[i] > 0 else expected[i] * 1.7
        expected[i] -= 0.2 * counts[0, i] + 0.3 * (counts[0, i] > 0)
    expected[3] += 2.5
    expected[52] -= 1
    found = sampling._adjust(
        jnp.asarray(logits),
        to_arrays([row], [0], V),
        jnp.asarray(seen, jnp.int8),
        jnp.asarray(counts, jnp.int32),
    )
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    assert choose(logits, [row], seen=seen, counts=counts)[0] == expected.argmax()


def test_logprobs_against_scipy_style_log_softmax():
    logits = np.random.default_rng(3).normal(size=(2, V)).astype(np.float32)
    chosen, ids, values = sampling.logprobs(jnp.asarray(logits), jnp.array([4, 9], jnp.int32), 3)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(chosen, expected[[0, 1], [4, 9]], rtol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1)[:, :3])
    np.testing.assert_allclose(values, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": math.nan}, "temperature is nan: expected a number from 0.0 to 100.0"),
        ({"temperature": -1}, "temperature is -1: expected a number from 0.0 to 100.0"),
        ({"top_p": 0.0}, "top_p is 0.0: expected a number above 0.0 and at most 1.0"),
        ({"top_p": math.inf}, "top_p is inf: expected a number above 0.0 and at most 1.0"),
        ({"top_k": 1.5}, "top_k is 1.5: expected an integer from 0 to 2147483647"),
        ({"min_p": True}, "min_p is True: expected a number from 0.0 to 1.0"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty is 0: expected a number above 0.0 and at most 100.0",
        ),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"seed": 2**64}, "seed is 18446744073709551616: expected an integer from"),
        ({"n": 0}, "n is 0: expected an integer from 1 to 1024"),
        ({"top_logprobs": 21}, "top_logprobs is 21: expected an integer from 0 to 20"),
        ({"logit_bias": {3: math.nan}}, "logit_bias[3] is nan"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(GptOssError) as error:
        dataclasses.replace(Sampling(), **change)
    assert message in str(error.value)


def test_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(
        GptOssError, match="token id of logit_bias is 53: expected an integer from 0 to 52"
    ):
        to_arrays([Sampling(logit_bias={53: 1.0})], [0], V)
