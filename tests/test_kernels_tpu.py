"""The TPU kernels, interpreted on CPU against the operations' definitions and float64, and compiled
for TPUs that are not there (slow).
"""

import contextlib
import functools
import importlib
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from gptoss_jax import loading, mxfp4, ops, sharding
from gptoss_jax.cache import make_cache
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels.tpu import layout, moe
from gptoss_jax.model import apply, letters
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends
from gptoss_jax.ops.experts import mlp as definition
from gptoss_jax.sampling import Sampling

kernel_attention = importlib.import_module("gptoss_jax.kernels.tpu.attention")
ops_attention = importlib.import_module("gptoss_jax.ops.attention")
ALPHA, LIMIT = 1.702, 7.0
X = 4
# Buffers that nothing was written to hold NaN, and a read beyond an array raises.
STRICT = pltpu.InterpretParams()
jit: Any = functools.partial(jax.jit, compiler_options=tiny.QUICK)


@functools.partial(jit, static_argnames="strict")
def mlp(*parts, strict=False):
    return moe.mlp(*parts, alpha=ALPHA, limit=LIMIT, interpret=STRICT if strict else True)


@functools.partial(jit, static_argnames=("window", "strict"))
def attend(*parts, window=None, extent=None, strict=False):
    interpret = STRICT if strict else True
    return kernel_attention.attention(*parts, window=window, extent_B=extent, interpret=interpret)


def random_experts(shape: tuple[int, ...], seed=0, scales=(118, 123)) -> Any:
    generator: Any = np.random.default_rng(seed)
    grid: Any = (*shape[:-1], shape[-1] // 32)
    blocks = generator.integers(0, 256, (*grid, 16), dtype=np.uint8)
    return MxTensor(
        jnp.asarray(blocks), jnp.asarray(generator.integers(*scales, grid, dtype=np.uint8))
    )


def held(weight: MxTensor, form: layout.Storage = "packed") -> layout.TpuExperts:
    found, why = layout.to_tpu(weight, form)
    assert found is not None, why
    return found


# ---- layout


@pytest.mark.parametrize("shape", [(3, 48, 2, 96), (2, 136, 2, 64), (3, 96, 224), (2, 130, 32)])
def test_packed_experts_go_back_bit_for_bit(shape):
    weight = random_experts(shape, scales=(0, 253))
    there = held(weight)
    assert there.shape == weight.shape
    back = there.released()
    assert (back.blocks == weight.blocks).all()
    assert (back.scales == weight.scales).all()
    tree = jax.tree.leaves(there)
    assert all(leaf.shape[-1] % 128 == 0 and leaf.shape[0] == shape[0] for leaf in tree)


@pytest.mark.parametrize("shape", [(3, 48, 2, 96), (3, 96, 224)])
def test_folded_experts_are_the_same_values(shape):
    weight = random_experts(shape, scales=(110, 137))  # 26 binades: as many as there may be
    there = held(weight, "folded")
    assert there.shape == weight.shape
    exact = mxfp4.unpack(np.asarray(weight.blocks), np.asarray(weight.scales))
    np.testing.assert_array_equal(np.asarray(there.dequantize(jnp.float32)), exact)
    normal = np.abs(np.asarray(there.values).astype(np.float32))
    assert normal[normal > 0].min() >= 2.0**-14  # a TPU may take a subnormal for zero


def test_scales_too_far_apart_are_not_folded_and_zero_blocks_do_not_count():
    weight = random_experts((2, 16, 64), scales=(100, 101))
    far: Any = MxTensor(weight.blocks, weight.scales.at[1, 3, 1].set(127))
    found, why = layout.to_tpu(far, "folded", "layers.0.mlp.down")
    assert found is None
    assert why is not None
    assert why.startswith("layers.0.mlp.down: scales of one output differ by 2^27")
    zero = MxTensor(far.blocks.at[1, 3, 1].set(0x80), far.scales)
    exact = mxfp4.unpack(np.asarray(zero.blocks), np.asarray(zero.scales))
    np.testing.assert_array_equal(np.asarray(held(zero, "folded").dequantize(jnp.float32)), exact)


@pytest.mark.parametrize("form", ["packed", "folded"])
def test_scales_of_infinite_values_are_refused(form):
    weight = random_experts((2, 16, 64), scales=(230, 231))
    top: Any = MxTensor(weight.blocks, weight.scales.at[1, 3, 1].set(254))
    found, why = layout.to_tpu(top, form)
    assert found is None
    assert why == (
        "experts: a block scale of 254 where 252 is the most that finite bfloat16 values need: "
        "kept as released"
    )
    assert layout.to_tpu(MxTensor(top.blocks, top.scales.at[1, 3, 1].set(252)))[0] is not None


def test_unpacking_in_the_kernel_is_exact_for_every_code_and_scale():
    """Rows of the identity times weights that hold every code with every scale; 0 and 1 would need
    subnormals, which a TPU flushes.
    """
    blocks = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 2, 16))[None]
    run = jit(functools.partial(
        moe._product, moe._down, result=(64, jnp.float32), rows=64, interpret=True
    ))  # fmt: skip
    for first in range(0, 253, 23):
        scales = (first + np.arange(512).reshape(1, 256, 2) % 23).clip(0, 252).astype(np.uint8)
        weight = MxTensor(jnp.asarray(blocks), jnp.asarray(scales))
        eye = jnp.pad(jnp.eye(64, dtype=jnp.float32), ((0, 0), (0, 64)))
        one = jnp.zeros(1, jnp.int32)
        visits = moe.Visits(one, one + 1, one + 1, one, one)
        got = run(visits, eye, held(weight), jnp.zeros((1, 1, 256)), jnp.ones((1, 64, 1)))
        exact = mxfp4.unpack(blocks, scales)[0].T
        normal = np.repeat(scales[0] >= 2, 32, axis=1).T
        np.testing.assert_array_equal(np.asarray(got)[normal], exact[normal])
        assert np.abs(np.asarray(got)[~normal]).max(initial=0) < 2.0**-122


def test_storage_is_folded_only_where_it_fits_with_room():
    small, large = 22_700_000_000, 119_000_000_000
    assert layout.storage("TPU v5 lite", small, 16 << 30) == "packed"
    assert layout.storage("TPU v6 lite", small, 31 << 30) == "folded"
    assert layout.storage("TPU v6 lite", large // 4, 31 << 30) == "packed"
    assert layout.storage("TPU v5", large // 4, 95 << 30) == "folded"
    assert layout.storage("TPU7x", small, 95 << 30) == "packed"


@pytest.mark.parametrize("form", ["packed", "folded"])
def test_shapes_are_those_of_the_arrays(form):
    weight = random_experts((3, 48, 2, 96))
    there = held(weight, form)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), there) == jax.tree.map(
        lambda x: (x.shape, x.dtype), layout.shapes(weight, form)
    )


# ---- visits


@functools.partial(jit, static_argnames=("together", "E"))
def arranged(x_MD, weights_MX, experts_MX, together, E):
    arrange = moe._together if together else moe._sorted
    _, x, shares, visits, _ = arrange(x_MD, weights_MX, experts_MX, E)
    return x, shares, visits


@functools.partial(jit, static_argnames=("together", "E"))
def gathered(out, x_MD, weights_MX, experts_MX, together, E):
    arrange = moe._together if together else moe._sorted
    return arrange(x_MD, weights_MX, experts_MX, E)[-1](out)


@given(st.data(), st.sampled_from([1, 7, 40]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_chosen_expert_is_visited_once_and_meets_its_rows(data, M, together):
    E, row = 6, st.lists(st.integers(0, 6), min_size=2, max_size=2)
    experts = data.draw(st.lists(row, min_size=M, max_size=M))
    weights_MX = np.arange(1.0, 2 * M + 1, dtype=np.float32).reshape(M, 2)
    x_MD = np.arange(1.0, M + 1, dtype=np.float32)[:, None]
    parts = x_MD, weights_MX, np.asarray(experts, np.int32)
    x, shares, visits = arranged(*parts, together=together, E=E)
    rows, x = shares.shape[1], np.asarray(x)
    visits: Any = jax.tree.map(np.asarray, visits)
    live = visits.live == 1
    read = visits.experts[(visits.fresh == 1)]
    assert sorted(read) == sorted({e for row in experts for e in row if e < E})
    assert (np.diff(visits.experts[live]) >= 0).all()
    assert not live[np.argmin(live) :].any() or live.all()  # visits to nobody come last
    # expert e makes (e + 1) x: what comes out is the definition
    out = np.zeros((len(x), 1), np.float32)
    for g in np.flatnonzero(live):
        block = x[visits.rows[g] * rows :][:rows]
        out[visits.outs[g] * rows :][:rows] += (
            np.asarray(shares[g]) * (visits.experts[g] + 1) * block
        )
    got = np.asarray(gathered(out, *parts, together=together, E=E))[:, 0]
    factors = np.where(np.asarray(experts) < E, np.asarray(experts) + 1, 0)
    want = (np.asarray(weights_MX) * factors).sum(1) * np.arange(1, M + 1)
    np.testing.assert_allclose(got, want)


# ---- the experts' feed-forward


def exact_mlp(x, weights, experts, gate_up, gate_up_bias, down, down_bias):
    """The definition in float64; experts of E or more add nothing."""
    up, dn = (
        mxfp4.unpack(np.asarray(w.blocks), np.asarray(w.scales)).astype(np.float64)
        for w in (gate_up, down)
    )
    gb, db = (np.asarray(b).astype(np.float64) for b in (gate_up_bias, down_bias))
    x = np.asarray(x).astype(np.float64)
    out = np.zeros_like(x)
    for m, row in enumerate(np.asarray(experts)):
        for weight, e in zip(np.asarray(weights)[m], row, strict=True):
            if e < len(up):
                h = up[e] @ x[m] + gb[e]
                gate, value = np.minimum(h[:, 0], LIMIT), np.clip(h[:, 1], -LIMIT, LIMIT)
                act = gate / (1 + np.exp(-ALPHA * gate)) * (value + 1)
                out[m] += np.float64(weight) * (dn[e] @ act + db[e])
    return out


@functools.lru_cache
def weights(E, D, F):
    generator = np.random.default_rng(3)
    return (
        random_experts((E, F, 2, D), 1),
        jnp.asarray(generator.normal(size=(E, F, 2)), jnp.bfloat16),
        random_experts((E, D, F), 2),
        jnp.asarray(generator.normal(size=(E, D)), jnp.bfloat16),
    )


def routed(M, E, seed, kind):
    """Weights and ids; of `kind`: random ones, one expert for all, a few, or nobody's among
    them.
    """
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(E)[:X] for _ in range(M)])
    if kind == "one":
        ids = np.tile(np.arange(X) + 1, (M, 1))
        ids[:, 1:] = E
    elif kind == "few":
        ids = np.where(ids < 3, ids, E)
    elif kind == "nobody":
        ids[:] = E
    return jnp.asarray(generator.random((M, X)), jnp.float32), jnp.asarray(ids, jnp.int32)


def rms(x):
    return np.sqrt((np.asarray(x, np.float64) ** 2).mean())


@jit
def reference(*parts):
    with backends.use("xla"):
        return definition(*parts, low_rank={}, alpha=ALPHA, limit=LIMIT, some=True)


@pytest.mark.parametrize("form", ["packed", "folded"])
@pytest.mark.parametrize("M", [5, 67])
@pytest.mark.parametrize("kind", ["random", "few", "one", "nobody"])
def test_experts_are_as_exact_as_the_reference(M, kind, form):
    E, D, F = 6, 96, 160
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    chosen = routed(M, E, M, kind)
    x = jnp.asarray(np.random.default_rng(M).normal(size=(M, D)), jnp.bfloat16)
    parts = x, *chosen, held(gate_up, form), gate_up_bias, held(down, form), down_bias
    got = mlp(*parts)
    assert got.dtype == jnp.float32
    if kind == "nobody":
        np.testing.assert_array_equal(np.asarray(got), 0.0)
        return
    exact = exact_mlp(x, *chosen, gate_up, gate_up_bias, down, down_bias)
    own = rms(np.asarray(reference(x, *chosen, gate_up, gate_up_bias, down, down_bias)) - exact)
    assert 0 < own < 0.01 * rms(exact)
    assert rms(np.asarray(got) - exact) < 1.05 * own
    if kind == "random":
        strict = mlp(*parts, strict=True)
        np.testing.assert_allclose(np.asarray(strict), np.asarray(got), rtol=1e-2, atol=1e-2 * own)


@pytest.mark.parametrize("M", [1, 17, 81])
def test_experts_in_float32(M):
    E, D, F = 6, 96, 160
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    chosen = routed(M, E, M, "random")
    x = jnp.asarray(np.random.default_rng(M).normal(size=(M, D)), jnp.float32)
    biases = gate_up_bias.astype(jnp.float32), down_bias.astype(jnp.float32)
    got = mlp(x, *chosen, held(gate_up), biases[0], held(down), biases[1])
    exact = exact_mlp(x, *chosen, gate_up, gate_up_bias, down, down_bias)
    np.testing.assert_allclose(np.asarray(got), exact, rtol=0, atol=3e-6 * np.abs(exact).max())


@pytest.mark.parametrize("sizes", [(2, 704, 672), (130, 32, 32)])
def test_experts_of_other_sizes(sizes):
    """More than one tile of outputs and a tail; more experts than 120b has."""
    E, D, F = sizes
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    for M in (3, 66)[: 1 if E == 2 else 2]:
        generator = np.random.default_rng(M)
        ids = jnp.asarray(generator.integers(0, E + 1, (M, X)), jnp.int32)
        shares = jnp.asarray(generator.random((M, X)), jnp.float32)
        x = jnp.asarray(generator.normal(size=(M, D)), jnp.float32)
        biases = gate_up_bias.astype(jnp.float32), down_bias.astype(jnp.float32)
        got = mlp(x, shares, ids, held(gate_up), biases[0], held(down), biases[1])
        exact = exact_mlp(x, shares, ids, gate_up, gate_up_bias, down, down_bias)
        atol = 5e-6 * np.abs(exact).max()
        np.testing.assert_allclose(np.asarray(got), exact, rtol=0, atol=atol)


def test_a_row_that_nobody_counts_cannot_spoil_others():
    """NaN in a row whose experts are nobody's stays there, whichever block it shares."""
    E, D, F = 6, 96, 160
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    for M in (5, 67):
        shares, ids = routed(M, E, 1, "random")
        ids = ids.at[4].set(E)
        x = jnp.asarray(np.random.default_rng(M).normal(size=(M, D)), jnp.bfloat16)
        parts = shares, ids, held(gate_up), gate_up_bias, held(down), down_bias
        clean, spoilt = mlp(x, *parts), mlp(x.at[4].set(jnp.nan), *parts)
        np.testing.assert_array_equal(np.asarray(spoilt), np.asarray(clean))


# ---- attention


def exact_attention(parts, q_positions, k_positions, window=None):
    """The definition in float64, a loop over everything."""
    q, k, v, sinks = (np.asarray(x).astype(np.float64) for x in parts)
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            at, slots = int(q_positions[b, t]), np.asarray(k_positions[b])
            seen = (slots >= 0) & (slots <= at)
            seen &= window is None or slots > at - window
            for n in range(N):
                keys, values = k[b, seen, n // group], v[b, seen, n // group]
                scores = np.append(keys @ q[b, t, n] / np.sqrt(H), sinks[n])
                share = np.exp(scores - scores.max())
                out[b, t, n] = (share[:-1] / share.sum()) @ values
    return out


def drawn(B, T, S, N=6, K=3, H=14, dtype=jnp.float32, seed=0) -> Any:
    generator = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (N,)
    return tuple(jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes)


def ints(x):
    return jnp.asarray(x, jnp.int32)


def full(lengths, S):
    slots = np.arange(S)[None]
    return ints(np.where(slots < np.asarray(lengths)[:, None], slots, -1))


def check(parts, q_positions, k_positions, window=None, extent=None, strict=False):
    got = attend(*parts, q_positions, k_positions, window=window, extent=extent, strict=strict)
    want = exact_attention(parts, q_positions, k_positions, window)
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-6)


@pytest.mark.parametrize("window", [None, 128])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_decode_sees_the_window_exactly(length, window):
    lengths = [length, 300, 1]
    positions = ints(np.asarray(lengths)[:, None] - 1)
    check(drawn(3, 1, 384), positions, full(lengths, 384), window)


@pytest.mark.parametrize("size", [127, 128, 129])
def test_windows_next_to_128(size):
    parts = drawn(1, 3, 160)
    check(parts, ints([[130, 131, 140]]), full([160], 160), size)


@pytest.mark.parametrize("last", [0, 100, 127, 128, 5000, 131_071])
def test_rings_at_any_position(last):
    """A ring of 136 slots, a window of 128: position p lies in slot p % 136."""
    S, slots = 136, np.arange(136)
    held_here = last - (last - slots) % S
    positions = ints(np.maximum(held_here, -1)[None])
    check(drawn(1, 1, S), ints([[last]]), positions, 128, strict=True)


def test_full_caches_far_out_read_what_is_seen():
    """Positions to 131,071 in a cache whose slots are in any order."""
    S = 2100  # three blocks of slots, the last one ragged
    generator = np.random.default_rng(0)
    positions = np.sort(generator.permutation(131_072)[:S])
    positions[-1] = 131_071
    order = generator.permutation(S)
    check(drawn(1, 2, S), ints([[131_071, 65_000]]), ints(positions[order][None]))


@pytest.mark.parametrize(("T", "window"), [(5, None), (70, None), (70, 8), (130, 64)])
def test_chunks_of_prompts_begin_anywhere(T, window):
    before = np.array([0, 37])
    q_positions = before[:, None] + np.arange(T)
    k_positions = full(before + T, 200)
    check(drawn(2, T, 200), ints(q_positions), k_positions, window, strict=True)


@pytest.mark.parametrize(
    ("B", "T", "S", "K", "G", "window"),
    [(1, 1, 1, 1, 1, None), (3, 1, 40, 3, 5, 7), (2, 9, 33, 2, 3, None), (1, 4, 17, 1, 16, 1)],
)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=10, deadline=None)
def test_attention_of_any_shape(B, T, S, K, G, window, seed):
    generator = np.random.default_rng(seed)
    q_positions = generator.integers(-1, 50, (B, T))
    k_positions = generator.integers(-1, 50, (B, S))
    parts = drawn(B, T, S, N=K * G, K=K, H=6, seed=seed)
    check(parts, ints(q_positions), ints(k_positions), window)


def test_attention_in_bfloat16_is_as_exact_as_the_reference():
    parts = drawn(2, 40, 300, N=16, K=2, H=64, dtype=jnp.bfloat16)
    q_positions, k_positions = ints(np.arange(40)[None] + [[200], [100]]), full([240, 140], 300)
    exact = exact_attention(parts, q_positions, k_positions)
    got = attend(*parts, q_positions, k_positions)
    assert got.dtype == jnp.bfloat16
    with backends.use("xla"):
        reference = ops_attention.attention(*parts, q_positions, k_positions)
    own = rms(np.asarray(reference, np.float64) - exact)
    assert rms(np.asarray(got, np.float64) - exact) < 1.05 * own


def test_queries_that_see_nothing_give_zeros_and_slots_beyond_the_extent_are_not_read():
    q, k, v, sinks = drawn(2, 2, 2048)
    k, v = (x.at[:, 1500:].set(jnp.nan) for x in (k, v))
    positions = ints([[-1, 3], [-1, -1]]), full([2048, 0], 2048)
    got = np.asarray(attend(q, k, v, sinks, *positions, extent=ints([4, 0])))
    assert np.isfinite(got).all()
    assert (got[0, 0] == 0).all()
    assert (got[1] == 0).all()
    assert (got[0, 1] != 0).any()


def test_what_is_read_follows_the_length_and_not_the_capacity():
    S = 131_072
    lengths = np.array([1, 1024, 1025, 131_072])
    positions = ints(lengths[:, None, None] - 1)
    first, blocks = kernel_attention._ranges(positions, full(lengths, S), None, None, 1024)
    assert np.asarray(first)[:, 0].tolist() == [0, 0, 0, 0]
    assert np.asarray(blocks)[:, 0].tolist() == [1, 1, 2, 128]
    first, blocks = kernel_attention._ranges(positions, full(lengths, S), 128, None, 1024)
    assert np.asarray(first)[:, 0].tolist() == [0, 0, 0, 127]
    assert np.asarray(blocks)[:, 0].tolist() == [1, 1, 2, 1]


# ---- the network on top of them


@functools.partial(jit, static_argnames=("config", "kernels"))
def forward(params, tokens, cache, mask, config, kernels):
    with contextlib.ExitStack() as stack:
        if kernels:
            stack.enter_context(backends.use(experts="tpu", attention="tpu"))
        return apply(params, tokens, cache, config=config, mask=mask)


def laid_out(form, mesh=None):
    """Parameters of the test model in a layout; the cached ones are not changed."""
    params = jax.tree.map(lambda x: x, tiny.params(tiny.SMALL))
    if mesh is not None:
        where = sharding.parameter_shardings(letters(tiny.SMALL), params, mesh)
        params = jax.device_put(params, where)
    return params if form == "released" else loading.laid_out(params, form, mesh)


def read_and_continue(params, kernels, mesh=None):
    """Logits of a chunk that fills a ring, and of a decode step; rows of two lengths."""
    config, B = tiny.SMALL, 2
    cache = make_cache(config, B, 64, jnp.float32)
    out = []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for seed, (length, short) in enumerate([(11, 7), (1, 1)]):
            mask = jnp.arange(length)[None] < jnp.asarray([[length], [short]])
            tokens = tiny.tokens(B, length, seed)
            logits, cache = forward(params, tokens, cache, mask, config, kernels)
            out.append(np.where(np.asarray(mask)[..., None], np.asarray(logits), 0))
    return out


@functools.lru_cache
def as_released():
    return read_and_continue(laid_out("released"), kernels=False)


@pytest.mark.parametrize(
    ("form", "mesh", "kernels"),
    [
        pytest.param("packed", None, True, marks=pytest.mark.slow),
        ("packed", None, False),
        pytest.param("packed", {"data": 2, "expert": 4}, True, marks=pytest.mark.slow),
        pytest.param("folded", None, True, marks=pytest.mark.slow),
    ],
)
def test_the_network_with_kernels_is_the_network(form, mesh, kernels, monkeypatch):
    for room, name in ((moe, "mlp"), (kernel_attention, "attention")):
        monkeypatch.setattr(room, name, functools.partial(getattr(room, name), interpret=True))
    # the interpreter's own constants do not vary over a mesh (jax 0.10.2), compiled kernels do
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    mesh = None if mesh is None else sharding.make_mesh(mesh, tiny.SMALL)
    got = read_and_continue(laid_out(form, mesh), kernels, mesh)
    for ours, reference in zip(got, as_released(), strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5)


def test_operations_take_the_kernels_where_they_are_forced_and_say_why_not(monkeypatch):
    E, D, F = 6, 96, 160
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    biases = gate_up_bias.astype(jnp.float32), down_bias.astype(jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, D)), jnp.float32)
    shares, ids = routed(5, E, 0, "random")
    heads, positions = drawn(2, 3, 9), (ints([[5, 6, 7], [0, 1, 2]]), full([8, 3], 9))

    def run(up, dn):
        counted = jnp.asarray([True, True, False, True, True])
        out = ops.expert_mlp(
            x, shares, ids, up, biases[0], dn, biases[1], alpha=ALPHA, limit=LIMIT,
            counted_M=counted,
        )  # fmt: skip

        def total(q, k, v):
            return (ops_attention.attention(q, k, v, heads[3], *positions, 4) ** 2).sum()

        return out, *jax.value_and_grad(total, (0, 1, 2))(*heads[:3])

    with backends.use("xla"):
        expected = jit(run)(gate_up, down)
    used = []

    def interpreted(name, call):
        return lambda *parts, **rest: used.append(name) or call(*parts, **rest, interpret=True)

    for room, name in ((moe, "mlp"), (kernel_attention, "attention")):
        monkeypatch.setattr(room, name, interpreted(name, getattr(room, name)))
    with backends.use(experts="tpu", attention="tpu"):
        got = jit(lambda *w: run(*w))(held(gate_up), held(down))
        with pytest.raises(GptOssError, match="do not lie as the kernel reads them"):
            run(gate_up, down)
    assert set(used) == {"mlp", "attention"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4),
        got,
        expected,
    )


def test_a_loaded_model_is_laid_out_and_goes_back():
    released = loading.load()
    packed = loading.load(experts="packed")
    assert isinstance(packed.params["layers"][0]["mlp"]["down"], layout.TpuExperts)
    greedy = Sampling(temperature=0)
    tokens = [m.generate("347+285=", greedy, max_new_tokens=3).tokens for m in (released, packed)]
    assert tokens[0] == tokens[1]
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), released.params, loading.released(packed).params
    )
    assert all(jax.tree.leaves(same))
    assert loading.released(released) is released
    with pytest.raises(GptOssError, match="load the model with experts='released'"):
        loading.released(loading.load(experts="folded"))


def test_experts_that_a_form_cannot_hold_take_the_next_one(caplog):
    params = laid_out("released")
    mlp = params["layers"][0]["mlp"]
    far: Any = mlp["down"]
    scales = far.scales.at[0, 0, 0].set(160).at[0, 0, 1].set(100)
    mlp["down"] = MxTensor(far.blocks.at[0, 0].set(0x11), scales)
    top: Any = mlp["gate_up"]
    mlp["gate_up"] = MxTensor(top.blocks.at[0, 0].set(0x11), top.scales.at[0, 0].set(254))
    with caplog.at_level("INFO", "gptoss_jax.loading"):
        found = loading.laid_out(params, "folded")["layers"]
    assert found[0]["mlp"]["down"].packed
    assert isinstance(found[0]["mlp"]["gate_up"], MxTensor)
    assert not found[1]["mlp"]["down"].packed
    assert "layers.0.mlp.down: scales of one output differ by 2^60" in caplog.text
    assert "layers.0.mlp.gate_up: a block scale of 254" in caplog.text


# ---- compiled for TPUs that are not there

libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e '.[plan]'"
)
TPUS = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1")


def shapes_on(topology) -> Any:
    from gptoss_jax.plan import hardware, programs

    device = programs.devices(hardware.parse(topology))[0]
    where = SingleDeviceSharding(device)
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def compiled(function, *arguments) -> Any:
    """The program's memory, and its text after XLA's last pass."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )
        texts = [f.read_text() for f in Path(folder).glob("*.after_optimizations.txt")]
    return program.memory_analysis(), max(texts, key=len)


def made_again(text: str, shape: tuple[int, ...]) -> list[str]:
    """Operations of a program whose result has this shape, arguments aside."""
    wanted = f"[{','.join(map(str, shape))}]"
    lines = [line for line in text.splitlines() if re.search(r" = \w+" + re.escape(wanted), line)]
    return [line for line in lines if " parameter(" not in line and " bitcast(" not in line]


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize("form", ["packed", "folded"])
@pytest.mark.parametrize(("E", "M"), [(32, 1), (32, 64), (32, 512), (128, 1), (128, 512)])
def test_experts_of_20b_and_120b_compile_and_no_copy_is_made(topology, form, E, M):
    array, D = shapes_on(topology), 2880

    def experts(P):
        grid = (E, D, P, D // 32) if P == 2 else (E, D, D // 32)
        weight: Any = MxTensor(array((*grid, 16), jnp.uint8), array(grid, jnp.uint8))
        return jax.tree.map(lambda x: array(x.shape, x.dtype), layout.shapes(weight, form))

    memory, text = compiled(
        functools.partial(moe.mlp, alpha=ALPHA, limit=LIMIT),
        array((M, D), jnp.bfloat16), array((M, X), jnp.float32), array((M, X), jnp.int32),
        experts(2), array((E, D, 2), jnp.bfloat16), experts(1), array((E, D), jnp.bfloat16),
    )  # fmt: skip
    bytes_packed = E * 3 * D * D * 17 // 32
    # activations: a block of rows for every visit
    limit = {1: 4 << 20, 64: 128 << 20, 512: 512 << 20}[M]
    assert memory.temp_size_in_bytes < min(limit, 1.1 * bytes_packed)
    least = bytes_packed if form == "packed" else E * 3 * D * D
    assert least < memory.argument_size_in_bytes < 1.06 * least + M * 10_000
    for P in (1, 2):
        for leaf in jax.tree.leaves(experts(P)):
            assert not made_again(text, leaf.shape)


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", TPUS)
@pytest.mark.parametrize(
    ("B", "T", "S", "window"),
    [
        (1, 1, 131_072, None),
        (8, 1, 8192, None),
        (8, 1, 128, 128),
        (1, 512, 131_072, None),
        (1, 512, 640, 128),
        (2, 32, 3000, None),
    ],
)
def test_attention_of_gpt_oss_compiles_and_the_cache_is_not_copied(topology, B, T, S, window):
    array, (N, K, H) = shapes_on(topology), (64, 8, 64)
    cache = array((B, S, K, H), jnp.bfloat16)
    memory, text = compiled(
        functools.partial(kernel_attention.attention, window=window),
        array((B, T, N, H), jnp.bfloat16), cache, cache, array((N,), jnp.bfloat16),
        array((B, T), jnp.int32), array((B, S), jnp.int32),
    )  # fmt: skip
    assert memory.temp_size_in_bytes < max(1 << 20, 12 * B * T * N * H * 2)
    if S > 4096:
        assert not made_again(text, (B, S, K, H))
        assert not made_again(text, (B, K, H, S))


@libtpu
@pytest.mark.slow
def test_a_decode_step_of_120b_moves_little_more_than_it_must():
    """v6e:2x2, 131,072 tokens, batch 1: 21 MB of temporaries are what plain XLA needed."""
    from gptoss_jax import bounds
    from gptoss_jax.config import GptOssConfig
    from gptoss_jax.plan import hardware, programs

    config, sizes = GptOssConfig.preset("gpt-oss-120b"), {"tensor": 4}
    devices = programs.devices(hardware.parse("v6e:2x2"))
    steps = programs.Steps(config, sizes, devices, form="packed")
    found = steps.decode(1, 131_072)
    least = bounds.step(config, sizes, 1, 1, 131_072).bytes
    assert found.moved is not None
    moved = sum(found.moved.values())
    print(f"temporaries {found.temporaries / 1e6:.1f} MB, moved {moved / least:.3f} of the least")
    assert found.temporaries < 21e6
    assert least < moved < 1.1 * least
