"""The network against itself: cache or none, chunked or whole, padded or alone, packed or plain;
and against loops.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import dims, mxfp4, ops
from gptoss_jax.cache import cache_bytes, full_positions, make_cache, ring_positions
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.model import forward, hidden, letters
from gptoss_jax.ops import experts as ops_experts
from gptoss_jax.ops.attention import banded

attention_module = importlib.import_module(
    "gptoss_jax.ops.attention"
)  # ops.attention is the function

LENGTH = 37  # more than four windows
TOLERANCE = 2e-5  # of the logits' standard deviation, float32


def close(found, expected):
    difference = np.abs(np.asarray(found) - np.asarray(expected)).max() / np.asarray(expected).std()
    assert difference < TOLERANCE, difference


@pytest.fixture(scope="module")
def whole():
    tokens = tiny.tokens(2, LENGTH)
    return tokens, forward(tiny.params(), tokens, config=tiny.CONFIG)[0]


@pytest.mark.parametrize("cuts", [[37], [1] * 37, [11, 1, 17, 8], [8, 8, 8, 8, 5], [7, 9, 21]])
def test_chunks_and_steps_give_the_logits_of_the_whole(whole, cuts):
    tokens, expected = whole
    cache, found, at = make_cache(tiny.CONFIG, 2, 40, jnp.float32), [], 0
    for cut in cuts:
        logits, cache = forward(tiny.params(), tokens[:, at : at + cut], cache, config=tiny.CONFIG)
        found.append(logits)
        at += cut
    close(jnp.concatenate(found, axis=1), expected)
    assert cache.length_B.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("cached", [False, True])
def test_left_right_and_mixed_padding_change_nothing(whole, cached):
    tokens, expected = np.asarray(whole[0]), whole[1]
    ids, mask = np.full((3, 45), 7, np.int32), np.zeros((3, 45), bool)
    rows = [(0, slice(8, 45), 37), (1, slice(0, 29), 29), (0, slice(3, 16), 13)]
    for row, (source, where, n) in enumerate(rows):
        ids[row, where], mask[row, where] = tokens[source, :n], True
    cache = make_cache(tiny.CONFIG, 3, 64, jnp.float32) if cached else None
    logits, cache = forward(
        tiny.params(), jnp.asarray(ids), cache, config=tiny.CONFIG, mask=jnp.asarray(mask)
    )
    for row, (source, where, n) in enumerate(rows):
        close(logits[row, where], expected[source, :n])
    if cached:  # and go on from there, one row standing still
        steps = np.array([[5], [6], [9]], np.int32)
        logits, after = forward(
            tiny.params(),
            jnp.asarray(steps),
            cache,
            config=tiny.CONFIG,
            mask=jnp.array([[True], [True], [False]]),
        )
        assert after.length_B.tolist() == [38, 30, 13]
        for row, (source, _, n) in enumerate(rows[:2]):
            alone = jnp.asarray(np.append(tokens[source, :n], steps[row])[None])
            close(logits[row, 0], forward(tiny.params(), alone, config=tiny.CONFIG)[0][0, -1])
        # the row that stood still goes on as if nothing had been
        logits, _ = forward(tiny.params(), jnp.asarray(steps), after, config=tiny.CONFIG)
        alone = jnp.asarray(np.append(tokens[0, :13], steps[2])[None])
        close(logits[2, 0], forward(tiny.params(), alone, config=tiny.CONFIG)[0][0, -1])


def test_a_row_depends_on_no_other(whole):
    tokens, expected = whole
    other = tokens.at[1].set((tokens[1] + 1) % tiny.CONFIG.vocab_size)
    close(forward(tiny.params(), other, config=tiny.CONFIG)[0][0], expected[0])


def test_packed_segments_equal_documents_alone(whole):
    tokens, expected = whole
    packed = jnp.concatenate([tokens[:1, :20], tokens[1:, :12], tokens[:1, :5]], axis=1)
    segments = jnp.asarray([[1] * 20 + [2] * 12 + [0] * 5], jnp.int32)
    found, _ = forward(tiny.params(), packed, config=tiny.CONFIG, segments=segments)
    close(found[0, :20], expected[0, :20])
    close(found[0, 20:32], expected[1, :12])


def test_packed_experts_equal_their_values():
    packed = tiny.params()
    plain = jax.tree.map(
        lambda x: x.dequantize(jnp.float32) if isinstance(x, mxfp4.MxTensor) else x,
        packed, is_leaf=lambda x: isinstance(x, mxfp4.MxTensor),
    )  # fmt: skip
    tokens = tiny.tokens(1, 9)
    close(
        forward(packed, tokens, config=tiny.CONFIG)[0],
        forward(plain, tokens, config=tiny.CONFIG)[0],
    )


def test_parameters_have_the_shapes_of_their_letters():
    def check(path, axes, leaf):
        assert leaf.shape == dims.shape(axes, tiny.CONFIG), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, letters(tiny.CONFIG), tiny.params(packed=False))


def test_cache_is_24_kib_a_token_for_20b():
    config = GptOssConfig.preset("gpt-oss-20b")
    assert cache_bytes(config, 1, 1001) - cache_bytes(config, 1, 1000) == 24 * 1024
    assert cache_bytes(config, 1, 1000) - 1000 * 24 * 1024 == 3 * 1024 * 1024
    cache = jax.eval_shape(lambda: make_cache(config, 2, 1000))
    leaves = jax.tree.leaves((cache.keys, cache.values))
    assert sum(x.size * x.dtype.itemsize for x in leaves) == cache_bytes(config, 2, 1000)
    with pytest.raises(
        GptOssError, match="cache of 131073 tokens asked for: the model's context is 1 to 131072"
    ):
        make_cache(config, 1, 131073)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.sampled_from([1, 2, 8, 127, 128]))
def test_ring_and_full_positions_by_replay(length, window):
    ring, full = [-1] * window, [-1] * 600
    for position in range(length):
        ring[position % window] = full[position] = position
    assert ring_positions(jnp.array([length], jnp.int32), window)[0].tolist() == ring
    assert full_positions(jnp.array([length], jnp.int32), 600)[0].tolist() == full


def attention_by_loops(q, k, v, sinks, q_positions, k_positions, window):
    """The definition, one query, one head, one key at a time, in float64."""
    B, T, N, H = q.shape
    G = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        weights, total = {}, np.exp(np.float64(sinks[n]))
        for s in range(k.shape[1]):
            p, r = q_positions[b, t], k_positions[b, s]
            if r < 0 or r > p or (window and r <= p - window):
                continue
            weights[s] = np.exp(np.float64(q[b, t, n] @ k[b, s, n // G]) / np.sqrt(H))
            total += weights[s]
        for s, weight in weights.items():
            out[b, t, n] += weight / total * v[b, s, n // G]
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 8, 40])
def test_attention_by_loops(window, monkeypatch):
    generator = np.random.default_rng(0)
    q, k, v = (generator.normal(size=(2, 13, n, 6)).astype(np.float32) for n in (15, 3, 3))
    sinks = generator.normal(size=15).astype(np.float32)
    positions = np.tile(np.arange(13, dtype=np.int32), (2, 1))
    known = positions.copy()
    known[1, :4] = -1
    expected = attention_by_loops(q, k, v, sinks, positions, known, window)
    arrays = [jnp.asarray(x) for x in (q, k, v, sinks, positions, known)]
    np.testing.assert_allclose(ops.attention(*arrays, window), expected, atol=2e-6)
    monkeypatch.setattr(attention_module, "SCORES_LIMIT", 1)
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 4)
    np.testing.assert_allclose(ops.attention(*arrays, window), expected, atol=2e-6)
    if window:
        k, v = (np.pad(x, [(0, 0), (window, 0), (0, 0), (0, 0)], constant_values=9) for x in (k, v))
        known = np.pad(known, [(0, 0), (window, 0)], constant_values=-1)
        arrays = [jnp.asarray(x) for x in (q, k, v, sinks, positions, known)]
        np.testing.assert_allclose(banded(*arrays, window), expected, atol=2e-6)


def test_a_query_that_sees_nothing_gives_zero():
    ones = jnp.ones((1, 2, 4, 6))
    nowhere = jnp.full((1, 2), -1, jnp.int32)
    out = ops.attention(ones, ones, ones, jnp.zeros(4), jnp.zeros((1, 2), jnp.int32), nowhere)
    np.testing.assert_array_equal(out, np.zeros((1, 2, 4, 6)))


def experts_by_loops(x, weights, experts, layer, limit, alpha):
    out = np.zeros(x.shape)
    gate_up, down = (
        np.asarray(layer[n].dequantize(jnp.float32), np.float64) for n in ("gate_up", "down")
    )
    for m in range(x.shape[0]):
        for weight, e in zip(weights[m], experts[m], strict=True):
            h = np.einsum("fpd,d->fp", gate_up[e], x[m]) + layer["gate_up_bias"][e]
            gate, up = np.minimum(h[:, 0], limit), np.clip(h[:, 1], -limit, limit)
            act = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            out[m] += weight * (down[e] @ act + layer["down_bias"][e])
    return out


@pytest.mark.parametrize(("rows", "limit_bytes"), [(2, None), (2, 1), (200, None), (200, 1)])
@pytest.mark.parametrize("load", ["random", "one expert", "last expert"])
def test_experts_by_loops(rows, limit_bytes, load, monkeypatch):
    """All four paths (pairs or groups, at once or one after another), balanced or not."""
    if limit_bytes:
        monkeypatch.setattr(ops_experts, "UNPACKED_LIMIT", limit_bytes)
    layer, generator = tiny.params()["layers"][1]["mlp"], np.random.default_rng(rows)
    x = (3 * generator.normal(size=(rows, 96))).astype(np.float32)
    experts = np.argsort(generator.random((rows, 12)), axis=1)[:, :4].astype(np.int32)
    if load != "random":
        experts[:] = 0 if load == "one expert" else 11
    weights = generator.random((rows, 4)).astype(np.float32)
    expected = experts_by_loops(x, weights, experts, layer, 0.7, 1.702)
    names = ("gate_up", "gate_up_bias", "down", "down_bias")
    found = ops.expert_mlp(
        *(jnp.asarray(a) for a in (x, weights, experts)),
        *(layer[n] for n in names),
        alpha=1.702,
        limit=0.7,
    )
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.sampled_from([1, 4, 16]))
def test_groups_hold_every_row_once(experts, block):
    slots, sources, block_experts = ops_experts.group(jnp.asarray(experts, jnp.int32), 7, block)
    slots, sources, block_experts = (np.asarray(x) for x in (slots, sources, block_experts))
    assert len(set(slots.tolist())) == len(experts)
    for row, expert in enumerate(experts):
        assert sources[slots[row]] == row
        assert block_experts[slots[row] // block] == expert


def test_router_weights_by_numpy():
    layer, x = (
        tiny.params()["layers"][0]["mlp"],
        np.random.default_rng(0).normal(size=(50, 96)).astype(np.float32),
    )
    weights, experts = ops.route(jnp.asarray(x), layer["router"], layer["router_bias"], 4)
    logits = x @ np.asarray(layer["router"]).T + np.asarray(layer["router_bias"])
    order = np.argsort(-logits, axis=1)[:, :4]
    np.testing.assert_array_equal(experts, order)
    top = np.exp(np.take_along_axis(logits, order, 1))
    np.testing.assert_allclose(weights, top / top.sum(1, keepdims=True), rtol=1e-4)


def test_no_step_unpacks_all_experts():
    """The compiled decode step of a wide layer holds temporaries of the chosen experts, not of
    all.
    """
    config = dataclasses.replace(
        tiny.CONFIG,
        num_layers=2,
        hidden_size=512,
        intermediate_size=1024,
        num_experts=64,
        layer_types=(),
    )
    from gptoss_jax.model import init_params

    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.bfloat16))
    for layer in params["layers"].values():
        for name in ("gate_up", "down"):
            *lead, last = layer["mlp"][name].shape
            layer["mlp"][name] = mxfp4.MxTensor(
                jax.ShapeDtypeStruct((*lead, last // 32, 16), jnp.uint8),
                jax.ShapeDtypeStruct((*lead, last // 32), jnp.uint8),
            )
    cache = jax.eval_shape(lambda: make_cache(config, 1, 64))
    step = jax.jit(hidden, static_argnames="config").lower(
        params, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache, config=config
    )
    one_expert = 3 * 512 * 1024
    assert (
        step.compile().memory_analysis().temp_size_in_bytes
        < 4 * one_expert * 14
        < 64 * one_expert * 2
    )
