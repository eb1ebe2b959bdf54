"""The GPU kernels of the experts, interpreted on CPU against float64 and the operations'
definitions, and compiled for GPUs that are not there (slow).
"""

import contextlib
import functools
import importlib
import importlib.util
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import mxfp4, ops, sharding
from gptoss_jax.cache import make_cache
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels.gpu import blocks, moe, triton
from gptoss_jax.kernels.gpu.unpack import HIGH, LOW, QUICK, QUICK_HIGH, QUICK_LOW, unpack
from gptoss_jax.model import apply, letters
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends
from gptoss_jax.ops.experts import mlp as definition
from gptoss_jax.ops.linear import LowRank, Rounded

ALPHA, LIMIT = 1.702, 7.0
X = 4
# Several steps of each loop, several blocks of an expert's rows; sorted or not.
SMALL = blocks.Tuning(outputs=32, depth=16, most_rows=16)
SORTED = blocks.Tuning(outputs=32, depth=32, most_rows=16, together=0)
jit: Any = functools.partial(jax.jit, compiler_options=tiny.QUICK)


@functools.partial(jit, static_argnames="chosen")
def mlp(*parts, chosen=SMALL):
    return moe.mlp(*parts, alpha=ALPHA, limit=LIMIT, chosen=chosen, interpret=True)


def random_experts(shape: tuple[int, ...], seed=0, scales=(118, 123)) -> Any:
    generator: Any = np.random.default_rng(seed)
    grid: Any = (*shape[:-1], shape[-1] // 32)
    packed = generator.integers(0, 256, (*grid, 16), dtype=np.uint8)
    return MxTensor(
        jnp.asarray(packed), jnp.asarray(generator.integers(*scales, grid, dtype=np.uint8))
    )


def exact_values(weight: MxTensor) -> np.ndarray:
    return mxfp4.unpack(np.asarray(weight.blocks), np.asarray(weight.scales)).astype(np.float64)


@functools.lru_cache
def weights(E, D, F):
    generator = np.random.default_rng(3)
    return (
        random_experts((E, F, 2, D), 1),
        jnp.asarray(generator.normal(size=(E, F, 2)), jnp.bfloat16),
        random_experts((E, D, F), 2),
        jnp.asarray(generator.normal(size=(E, D)), jnp.bfloat16),
    )


def routed(M, E, kind="random", seed=0):
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


def rows(M, D, dtype: Any = jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(M, D)), dtype)


def exact_mlp(x, shares, experts, gate_up, gate_up_bias, down, down_bias):
    """The definition in float64; experts that are not there add nothing."""
    up, dn = exact_values(gate_up), exact_values(down)
    gb, db = (np.asarray(b).astype(np.float64) for b in (gate_up_bias, down_bias))
    x = np.asarray(x).astype(np.float64)
    out = np.zeros_like(x)
    for m, row in enumerate(np.asarray(experts)):
        for share, e in zip(np.asarray(shares)[m], row, strict=True):
            if 0 <= e < len(up):
                h = up[e] @ x[m] + gb[e]
                gate, value = np.minimum(h[:, 0], LIMIT), np.clip(h[:, 1], -LIMIT, LIMIT)
                act = gate / (1 + np.exp(-ALPHA * gate)) * (value + 1)
                out[m] += np.float64(share) * (dn[e] @ act + db[e])
    return out


def rms(x):
    return np.sqrt((np.asarray(x, np.float64) ** 2).mean())


# ---- unpacking


def test_unpacking_is_exact_for_every_code_and_scale():
    """0 and 1 would need subnormals, which are zeros; 254 reaches infinity, as in the reference."""
    packed = np.tile(np.arange(256, dtype=np.uint8)[None, :], (256, 1))
    scales = np.tile(np.arange(255, dtype=np.uint8)[:, None], (1, 16))
    scales = np.concatenate([scales, scales[:1]])
    low, high = jit(lambda b, s: unpack(b, s, jnp.bfloat16, assembly=False))(packed, scales)
    got = np.stack([low, high], axis=-1).astype(np.float32).reshape(256, 512)
    exact = mxfp4.unpack(packed.reshape(256, 16, 16), scales)
    normal = scales[:, 0] >= 2
    np.testing.assert_array_equal(got[normal], exact[normal])
    np.testing.assert_array_equal(np.signbit(got[normal]), np.signbit(exact[normal]))
    assert np.abs(got[~normal]).max() < 2.0**-122
    assert np.isfinite(got[~normal]).all()
    run = jit(lambda b, s: unpack(b, s, jnp.bfloat16, assembly=False, quick=True))
    quick = np.stack(run(packed, scales), axis=-1).astype(np.float32).reshape(256, 512)
    small = scales[:, 0] <= QUICK
    np.testing.assert_array_equal(quick[small], got[small])
    assert not np.isfinite(quick[~small]).any()


def run_ptx(text, codes, scales, subnormals=False):
    """The few instructions of unpack.py, as the PTX manual defines them; a subnormal operand of an
    arithmetic one is an error, or with `subnormals` what it says.
    """
    held = {"$1": codes, "$2": scales}

    def value(name):
        return np.uint32(int(name, 0)) if name[0].isdigit() else held[name]

    def halves(name):
        word = np.broadcast_to(value(name), codes.shape)
        out = np.stack([word << np.uint32(16), word & np.uint32(0xFFFF0000)]).view(np.float32)
        assert subnormals or not ((out != 0) & (np.abs(out) < 2.0**-126)).any(), name
        return out.astype(np.float64)

    def packed(values):
        bits = values.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
        return bits[0] | bits[1] << np.uint32(16)

    for line in re.findall(r"^ +([a-z].*);$", text, re.MULTILINE):
        name, *rest = re.split(r"[ ,]+", line)
        if name == "mov.b32":
            held[rest[0]] = value(rest[1])
        elif name == "shl.b32":
            held[rest[0]] = value(rest[1]) << value(rest[2])
        elif name == "and.b32":
            held[rest[0]] = value(rest[1]) & value(rest[2])
        elif name == "mul.lo.u32":
            held[rest[0]] = value(rest[1]) * value(rest[2])
        elif name == "prmt.b32":
            pool = np.uint64(value(rest[1])) | np.uint64(value(rest[2])) << np.uint64(32)
            picks = [int(rest[3], 0) >> 4 * i & 15 for i in range(4)]
            taken = [(pool >> np.uint64(8 * pick)) & np.uint64(255) for pick in picks]
            held[rest[0]] = sum(
                byte.astype(np.uint32) << np.uint32(8 * i) for i, byte in enumerate(taken)
            )
        elif name == "mad.lo.u32":
            held[rest[0]] = value(rest[1]) * value(rest[2]) + value(rest[3])
        elif name == "lop3.b32":
            assert rest[4] == "0xEA"  # (a & b) | c, the table of 0xF0, 0xCC, 0xAA
            held[rest[0]] = (value(rest[1]) & value(rest[2])) | value(rest[3])
        else:
            assert name in ("fma.rn.bf16x2", "fma.rn.relu.bf16x2")
            a, b, c = map(halves, rest[1:])
            held[rest[0]] = packed(np.maximum(a * b + c, 0.0 if "relu" in name else -np.inf))
    return held["$0"]


def test_the_quick_assembly_is_exact_for_every_code_and_scale_that_it_takes():
    """Also where 0.5 is the least value that there is; scales of 0 and 1 give less than any."""
    assert QUICK_LOW.count("fma.rn.bf16x2") == QUICK_HIGH.count("fma.rn.bf16x2") == 1
    first = np.arange(256, dtype=np.uint32)[:, None]
    scales = np.arange(QUICK + 1, dtype=np.uint32)[None]
    codes, factors = first | ((255 - first) << np.uint32(16)), (scales + 126) << np.uint32(7)
    both = factors | factors << np.uint32(16)
    codes, both = np.broadcast_arrays(codes, both.astype(np.uint32))
    for text, shift in ((QUICK_LOW, 0), (QUICK_HIGH, 4)):
        with np.errstate(over="ignore"):
            got = run_ptx(text, codes, both, subnormals=True)
        for half in range(2):
            bits = ((got >> np.uint32(16 * half)) << np.uint32(16)).view(np.float32)
            code = (codes >> np.uint32(16 * half + shift)) & np.uint32(15)
            exact = np.ldexp(mxfp4.E2M1[code], scales.astype(np.int32) - 127).astype(np.float32)
            normal = np.broadcast_to(scales >= 2, exact.shape)
            np.testing.assert_array_equal(bits[normal], exact[normal])
            np.testing.assert_array_equal(np.signbit(bits), np.signbit(exact))
            assert np.abs(bits[~normal]).max() < 2.0**-122


def test_bytes_are_widened_in_their_order():
    word = np.asarray([0x04030201, 0xFFFE80C0], np.uint32)
    lines = [f"  {part.strip()};" for part in triton.WIDEN.strip("{} ").split(";") if part.strip()]
    pieces = []
    for line, out in zip(lines, ("$0", "$1"), strict=True):
        pieces.append(
            run_ptx(line.replace("$2", "$1").replace(f"b32 {out},", "b32 $0,"), word, word)
        )
    got = np.stack(pieces, axis=-1).view(np.uint16)
    np.testing.assert_array_equal(got, word.view(np.uint8).reshape(2, 4))


def test_the_assembly_is_exact_for_every_code_and_scale():
    """Two bytes and scales a register; rounding a float64 is right where it is exact, as here."""
    assert 0xEA == (0xF0 & 0xCC) | 0xAA
    first = np.arange(256, dtype=np.uint32)[:, None]
    scales = np.arange(255, dtype=np.uint32)[None]
    codes, both = first | ((255 - first) << np.uint32(16)), (scales << 7) | (scales << 23)
    codes, both = np.broadcast_arrays(codes, both.astype(np.uint32))
    for text, shift in ((LOW, 0), (HIGH, 4)):
        with np.errstate(over="ignore"):
            got = run_ptx(text, codes, both)
            for half in range(2):
                bits = ((got >> np.uint32(16 * half)) << np.uint32(16)).view(np.float32)
                code = (codes >> np.uint32(16 * half + shift)) & np.uint32(15)
                exact = np.ldexp(mxfp4.E2M1[code], scales.astype(np.int32) - 127)
                normal = np.broadcast_to(scales >= 2, exact.shape)
                np.testing.assert_array_equal(bits[normal], exact.astype(np.float32)[normal])
                assert np.abs(bits[~normal]).max() < 2.0**-122


# ---- who is with whom


@functools.partial(jit, static_argnames=("E", "chosen"))
def visited(experts_MX, E, chosen):
    """Of every program: its expert, its blocks' count, and the pairs of each block."""
    tile, pairs = moe._arranged(experts_MX, E, jnp.bfloat16, chosen)
    most = experts_MX.size // tile.rows + 1

    def kernel(*refs):
        expert, count, pairs_of = moe._visit(refs[: pairs.sizes[0]], pairs.sizes, tile.rows)
        p = moe.program_id(1)
        refs[-1][p, 0, 0] = expert
        refs[-1][p, 1, 0] = count

        def block(i, _):
            refs[-1][p, 2 + i, :] = pairs_of(i)
            return 0

        jax.lax.fori_loop(0, count, block, 0)

    return triton.call(
        kernel, *pairs.arrays, grid=(1, pairs.programs),
        result=((pairs.programs, 2 + most, tile.rows), jnp.int32),
        warps=4, stages=1, name="visited", interpret=True,
    )  # fmt: skip


@pytest.mark.parametrize("chosen", [SMALL, SORTED], ids=["together", "sorted"])
@pytest.mark.parametrize("M", [1, 3, 30])
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_pair_is_met_once_by_its_expert_and_no_expert_is_read_in_vain(M, chosen, data):
    E, row = 6, st.lists(st.integers(-1, 7), min_size=2, max_size=2)
    experts = np.asarray(data.draw(st.lists(row, min_size=M, max_size=M)))
    found = np.asarray(visited(jnp.asarray(experts, jnp.int32), E, chosen))
    assert found.shape[2] == (1 if M == 1 else 16)
    met = []
    for program in found:
        expert, count = program[:2, 0]
        pairs = program[2 : 2 + count].reshape(-1)
        pairs = pairs[pairs < experts.size]
        assert len(pairs) > program.shape[1] * (count - 1)
        met += [(pair, expert) for pair in pairs]
    wanted = [(i, e) for i, e in enumerate(experts.reshape(-1)) if 0 <= e < E]
    assert sorted(met) == wanted


# ---- the experts' feed-forward


@jit
def reference(*parts):
    with backends.use("xla"):
        return definition(*parts, low_rank={}, alpha=ALPHA, limit=LIMIT, some=True)


@pytest.mark.parametrize("M", [1, 21])
@pytest.mark.parametrize("chosen", [SMALL, SORTED], ids=["together", "sorted"])
def test_experts_are_as_exact_as_the_reference(M, chosen):
    E, D, F = 6, 96, 160
    held = weights(E, D, F)
    for kind in ("random", "few", "one", "nobody"):
        shares, ids = routed(M, E, kind, seed=M)
        x = rows(M, D, jnp.bfloat16, seed=M)
        got = mlp(x, shares, ids, *held, chosen=chosen)
        assert got.dtype == jnp.float32
        exact = exact_mlp(x, shares, ids, *held)
        if not exact.any():
            np.testing.assert_array_equal(np.asarray(got), 0.0)
            continue
        own = rms(np.asarray(reference(x, shares, ids, *held)) - exact)
        assert 0 < own < 0.01 * rms(exact)
        assert rms(np.asarray(got) - exact) < 1.05 * own


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("chosen", [SMALL, SORTED], ids=["together", "sorted"])
def test_large_scales_are_computed_the_other_way(M, chosen):
    """One scale above `QUICK` in one output, the first or the last that is read."""
    E, O, I = 3, 72, 96
    for at in ((0, 0), (40, 2), (71, 1)):
        weight = random_experts((E, O, I), scales=(125, QUICK + 1))
        weight = MxTensor(weight.blocks, weight.scales.at[1, *at].set(QUICK + 1))
        ids = jnp.asarray([[1, 0, 2, 1]] * M, jnp.int32)
        x = rows(M, I, jnp.bfloat16)
        want = np.einsum("mi,mxoi->mxo", np.asarray(x, np.float64), exact_values(weight)[ids])
        got = jit(functools.partial(moe.grouped_product, chosen=chosen, interpret=True))(
            x, ids, weight
        )
        np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    ("sizes", "M"), [((2, 704, 672), 3), ((130, 32, 32), 2), ((130, 32, 32), 66), ((3, 160, 96), 7)]
)
def test_experts_of_other_sizes_in_float32(sizes, M):
    """More than one tile of outputs and of bytes, and tails; more experts than 120b has."""
    E, D, F = sizes
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    generator = np.random.default_rng(M)
    ids = jnp.asarray(generator.integers(-1, E + 2, (M, X)), jnp.int32)
    shares = jnp.asarray(generator.random((M, X)), jnp.float32)
    biases = gate_up_bias.astype(jnp.float32), down_bias.astype(jnp.float32)
    x = rows(M, D)
    got = mlp(x, shares, ids, gate_up, biases[0], down, biases[1], chosen=blocks.Tuning())
    exact = exact_mlp(x, shares, ids, gate_up, gate_up_bias, down, down_bias)
    np.testing.assert_allclose(np.asarray(got), exact, rtol=0, atol=5e-6 * np.abs(exact).max())


@pytest.mark.parametrize("chosen", [SMALL, SORTED], ids=["together", "sorted"])
def test_a_row_that_nobody_counts_cannot_spoil_others(chosen):
    E, D, F = 6, 96, 160
    held = weights(E, D, F)
    shares, ids = routed(5, E)
    ids = ids.at[4].set(E)
    x = rows(5, D, jnp.bfloat16)
    clean = np.asarray(mlp(x, shares, ids, *held, chosen=chosen))
    spoilt = np.asarray(mlp(x.at[4].set(jnp.nan), shares, ids, *held, chosen=chosen))
    np.testing.assert_array_equal(spoilt, clean)
    alone = mlp(x[:1], shares[:1], ids[:1], *held, chosen=chosen)
    np.testing.assert_allclose(np.asarray(alone)[0], clean[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", [SMALL, SORTED], ids=["together", "sorted"])
def test_products_and_their_transposes_are_those_of_float64(chosen):
    E, O, I, M = 5, 72, 96, 9
    weight = random_experts((E, O, I), scales=(125, 129))
    exact = exact_values(weight)
    ids = np.random.default_rng(0).integers(-1, E + 1, (M, 3))
    x, g = rows(M, I), jnp.asarray(np.random.default_rng(1).normal(size=(M, 3, O)), jnp.float32)
    there = ((ids >= 0) & (ids < E))[..., None]
    chosen_MXOI = exact[np.clip(ids, 0, E - 1)]
    want = np.where(there, np.einsum("mi,mxoi->mxo", np.asarray(x, np.float64), chosen_MXOI), 0)
    back = np.where(there, np.einsum("mxo,mxoi->mxi", np.asarray(g, np.float64), chosen_MXOI), 0)
    run = functools.partial(jit, static_argnames=("chosen", "interpret"))
    got = run(moe.grouped_product)(x, jnp.asarray(ids), weight, chosen=chosen, interpret=True)
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=1e-5 * np.abs(want).max())
    got = run(moe.grouped_product_transposed)(
        g, jnp.asarray(ids), weight, chosen=chosen, interpret=True
    )
    np.testing.assert_allclose(np.asarray(got), back, rtol=0, atol=1e-5 * np.abs(back).max())


# ---- the operation


@pytest.fixture
def interpreted(monkeypatch):
    """Names of the kernels that ran, interpreted."""
    used = []

    def noted(name, call):
        return lambda *parts, **rest: (
            used.append(name) or call(*parts, **rest, chosen=SMALL, interpret=True)
        )

    for name in ("mlp", "grouped_product", "grouped_product_transposed"):
        monkeypatch.setattr(moe, name, noted(name, getattr(moe, name)))
    return used


def operation(x, shares, gate_up_bias, down_bias, ids, gate_up, down, low_rank=None, counted=None):
    return ops.expert_mlp(
        x, shares, ids, gate_up, gate_up_bias, down, down_bias, alpha=ALPHA, limit=LIMIT,
        counted_M=counted, low_rank=low_rank,
    )  # fmt: skip


def close(got, expected, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        scale = max(1e-30, float(jnp.abs(b).max()))
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, atol=tolerance)


def operands(E=6, D=96, F=64):
    gate_up, gate_up_bias, down, down_bias = weights(E, D, F)
    shares, ids = routed(5, E)
    biases = gate_up_bias.astype(jnp.float32), down_bias.astype(jnp.float32)
    return rows(5, D), shares, *biases, ids, gate_up, down


def test_the_gradient_goes_through_the_packed_bytes(interpreted):
    parts = operands()

    def total(*parts):
        return jnp.sin(operation(*parts)).sum()

    wanted = (0, 1, 2, 3)
    with backends.use("xla"):
        expected = jit(jax.value_and_grad(total, wanted))(*parts)
    with backends.use(experts="gpu"):
        got = jit(jax.value_and_grad(lambda *parts: total(*parts), wanted))(*parts)
    close(got, expected)
    assert interpreted.count("mlp") == 1
    assert interpreted.count("grouped_product_transposed") == 2


def test_rows_that_do_not_count_give_zeros(interpreted):
    counted = jnp.asarray([True, True, False, True, True])
    with backends.use("xla"):
        expected = jit(operation)(*operands(), counted=counted)
    with backends.use(experts="gpu"):
        got = jit(lambda *parts: operation(*parts, counted=counted))(*operands())
    close(got, expected)
    assert not np.asarray(got)[2].any()
    assert interpreted == ["mlp"]


def test_low_rank_additions_take_the_products(interpreted):
    E, D, F, R = 6, 96, 64, 3
    parts = operands(E, D, F)
    generator = np.random.default_rng(0)
    shapes = {"gate_up": ((E, R, D), (E, F, 2, R)), "down": ((E, R, F), (E, D, R))}
    low_rank = {
        name: LowRank(
            jnp.asarray(0.1 * generator.normal(size=a), jnp.float32),
            jnp.asarray(0.1 * generator.normal(size=b), jnp.float32),
            jnp.ones((1, R)),
        )
        for name, (a, b) in shapes.items()
    }

    def total(x, low_rank, *rest: Any):
        return jnp.sin(operation(x, *rest, low_rank=low_rank)).sum()

    with backends.use("xla"):
        expected = jit(jax.value_and_grad(total, (0, 1)))(parts[0], low_rank, *parts[1:])
    with backends.use(experts="gpu"):
        got = jit(jax.value_and_grad(lambda *p: total(*p), (0, 1)))(parts[0], low_rank, *parts[1:])
    close(got, expected)
    assert set(interpreted) == {"grouped_product", "grouped_product_transposed"}


def test_what_it_cannot_do_is_said():
    x, shares, gate_up_bias, down_bias, ids, gate_up, down = operands()
    pair: Any = Rounded(jnp.zeros((6, 2, 96)), jnp.zeros((6, 64, 2, 2)), jnp.ones((1, 2)))
    with backends.use(experts="gpu"):
        plain = gate_up.dequantize(jnp.float32), down.dequantize(jnp.float32)
        with pytest.raises(GptOssError, match="experts are not packed"):
            operation(x, shares, gate_up_bias, down_bias, ids, *plain)
        with pytest.raises(GptOssError, match="rounded one after another"):
            operation(x, shares, gate_up_bias, down_bias, ids, gate_up, down, {"gate_up": pair})


def test_experts_spread_over_a_mesh(interpreted, monkeypatch):
    """Forward and gradient; ids outside a device are nobody's there."""
    parts = operands()
    x, shares, gate_up_bias, down_bias, ids, gate_up, down = parts

    def total(x, shares):
        out = ops.expert_mlp(
            x, shares, ids[:4], gate_up, gate_up_bias, down, down_bias, alpha=ALPHA, limit=LIMIT,
            rows=("data",),
        )  # fmt: skip
        return jnp.sin(out).sum(), out

    def run():
        step: Any = jit(jax.value_and_grad(lambda *p: total(*p), (0, 1), has_aux=True))
        return step(x[:4], shares[:4])

    with backends.use("xla"):
        expected = run()
    # the interpreter's own constants do not vary over a mesh (jax 0.10.2), compiled kernels do
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    mesh = sharding.make_mesh({"data": 4, "expert": 2}, tiny.SMALL)
    with backends.use(experts="gpu"), jax.set_mesh(mesh):
        got = run()
    close(got, expected)
    assert "mlp" in interpreted


@functools.partial(jit, static_argnames=("config", "kernels"))
def forward(params, tokens, cache, config, kernels):
    with backends.use(experts="gpu") if kernels else contextlib.nullcontext():
        return apply(params, tokens, cache, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [None, {"data": 2, "expert": 4}])
def test_the_network_with_kernels_is_the_network(sizes, interpreted, monkeypatch):
    """A chunk and a decode step, experts on one device or spread."""
    config, out = tiny.SMALL, {}
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    mesh = None if sizes is None else sharding.make_mesh(sizes, config)
    for kernels in (False, True):
        params, where = tiny.params(config), mesh if kernels else None
        if where is not None:
            params = jax.device_put(
                params, sharding.parameter_shardings(letters(config), params, where)
            )
        cache, found = make_cache(config, 2, 64, jnp.float32), []
        with jax.set_mesh(where) if where is not None else contextlib.nullcontext():
            for seed, length in enumerate((11, 1)):
                tokens = tiny.tokens(2, length, seed)
                logits, cache = forward(params, tokens, cache, config, kernels)
                found.append(np.asarray(logits))
        out[kernels] = found
    for ours, reference in zip(out[True], out[False], strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5)
    assert "mlp" in interpreted


@pytest.mark.filterwarnings("ignore:.*Pallas Triton:DeprecationWarning")
@pytest.mark.parametrize("M", [3, 900])
def test_kernels_and_gradient_lower_for_cuda(M):
    """Where no GPU and no plugin is, in any JAX: interpretation takes more than the lowering does."""
    from gptoss_jax.plan import programs

    card: Any = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    E, D, F = 6, 2880, 96
    held, (shares, ids) = weights(E, D, F), routed(M, E)

    def total(x, shares):
        out = ops.expert_mlp(x, shares, ids, *held, alpha=ALPHA, limit=LIMIT)
        return out.astype(jnp.float32).sum()

    for call, count in ((total, 2), (jax.grad(total, (0, 1)), 4)):
        with programs.in_place_of(card), backends.compiling_for("gpu"):
            traced = jax.jit(call).trace(rows(M, D, jnp.bfloat16), shares)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@__gpu$xla.gpu.triton") == count


# ---- block sizes


def test_blocks_follow_the_rows_and_the_card():
    chosen = blocks.Tuning()
    found = [blocks.tile(M * 4, 32, chosen).rows for M in (1, 64, 128, 256, 1024, 8192)]
    assert found == [16, 16, 32, 64, 256, 256]
    assert blocks.tile(8192 * 4, 32, chosen).outputs == chosen.many_outputs
    assert blocks.tile(4, 32, chosen, single=True).rows == 1
    assert blocks.tile(4, 32, chosen, exact=True, single=True).rows == 1
    assert blocks.tile(8192 * 4, 32, chosen, exact=True).rows == 16
    assert blocks.model("NVIDIA H200") == chosen
    for card in ("NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090"):
        assert blocks.model(card).most_rows < chosen.most_rows


# ---- compiled for GPUs that are not there


def cuda_plugin() -> bool:
    return bool(importlib.util.find_spec("jax_plugins")) and bool(
        importlib.util.find_spec("jax_plugins.xla_cuda13")
    )


@pytest.mark.skipif(not cuda_plugin(), reason="needs jax's plugin: pip install 'jax[cuda13]'")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Pallas Triton:DeprecationWarning")
@pytest.mark.parametrize("card", ["h200:1", "a100:1", "l4:1", "b200:1"])
@pytest.mark.parametrize(("E", "M"), [(32, 1), (128, 64), (32, 2048)])
@pytest.mark.parametrize("which", ["mlp", "transposed"])
def test_experts_of_20b_and_120b_compile_and_no_copy_is_made(card, E, M, which, tmp_path):
    from gptoss_jax.plan import hardware, programs, ptx

    device, D = programs.devices(hardware.parse(card))[0], 2880
    where = jax.sharding.SingleDeviceSharding(device)

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def packed(*outputs) -> Any:
        grid: Any = (E, *outputs, D // 32)
        parts: Any = array((*grid, 16), jnp.uint8), array(grid, jnp.uint8)
        return MxTensor(*parts)

    call: Any = functools.partial(moe.mlp, alpha=ALPHA, limit=LIMIT)
    arguments: Any = (
        array((M, D), jnp.bfloat16), array((M, X), jnp.float32), array((M, X), jnp.int32),
        packed(D, 2), array((E, D, 2), jnp.bfloat16), packed(D), array((E, D), jnp.bfloat16),
    )  # fmt: skip
    if which == "transposed":
        call = moe.grouped_product_transposed
        arguments = array((M, X, D), jnp.bfloat16), array((M, X), jnp.int32), packed(D)
    with programs.in_place_of(device), backends.compiling_for("gpu"):
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))
    program: Any = lowered.compile(compiler_options=ptx.options(tmp_path))
    pairs = M * X
    # hidden activations and results of pairs, and what sorts them
    least = pairs * D * (2 + 4 if which == "mlp" else 0)
    assert program.memory_analysis().temp_size_in_bytes < 1.05 * least + pairs * 6000
    text = program.as_text()
    assert text.count('"__gpu$xla.gpu.triton"') == (2 if which == "mlp" else 1)
    if pairs <= blocks.Tuning().together:  # and one that adds up, or leaves nobody's out
        entry = text[text.index("\nENTRY") :]
        others = re.findall(r" (?:fusion|copy|sort|scatter|transpose)\(", entry)
        assert len(others) == 1 or (len(others) == 2 and card == "l4:1")  # the mask by itself
    for one in ptx.kernels(tmp_path):
        if one.name.startswith("experts_"):
            print(card, E, M, one.name, one.registers, "registers,", one.spilled, "bytes spilled")
            assert one.spilled <= 64
