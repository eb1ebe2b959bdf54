"""The CPU's kernels against sums in float64, for every instruction set of this machine."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import mxfp4
from gptoss_jax.bench.tune import tune
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu, tuning
from gptoss_jax.kernels.cpu import library
from gptoss_jax.kernels.cpu.experts import in_turn
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import attention, backends, expert_mlp
from gptoss_jax.ops.product import product

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason="no C++ compiler")
FLOAT32 = 2e-6  # of the largest result: sums of up to 5,760 products in another order
product_of = jax.jit(cpu.grouped_product)
transposed_of = jax.jit(cpu.grouped_product_transposed)


def packed(rng, experts, outputs, inputs, scales=(118, 123)):
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    scale = rng.integers(*scales, (experts, outputs, inputs // 32)).astype(np.uint8)
    values = mxfp4.unpack(blocks, scale).astype(np.float64)
    return MxTensor(jnp.asarray(blocks), jnp.asarray(scale)), values


def plain(rng, experts, outputs, inputs, dtype):
    weight = jnp.asarray(rng.normal(size=(experts, outputs, inputs)), dtype)
    return weight, np.asarray(weight.astype(jnp.float32), np.float64)


def check(rng, M, X, E, N, K, dtype, kind, transposed):
    weight, values = plain(rng, E, N, K, dtype) if kind == "plain" else packed(rng, E, N, K)
    weight = in_turn(weight) if kind == "in turn" else weight
    values = np.concatenate([values, np.zeros((1, N, K))])  # nobody's
    experts = rng.integers(0, E + 1, (M, X)).astype(np.int32)
    x = jnp.asarray(rng.normal(size=(M, X, N) if transposed else (M, K)), dtype)
    exact = np.asarray(x.astype(jnp.float32), np.float64)
    if transposed:
        found = transposed_of(x, jnp.asarray(experts), weight)
        expected = np.einsum("mxn,mxnk->mxk", exact, values[experts])
    else:
        found = product_of(x, jnp.asarray(experts), weight)
        expected = np.einsum("mk,mxnk->mxn", exact, values[experts])
    np.testing.assert_allclose(found, expected, atol=FLOAT32 * abs(expected).max() + 1e-30, rtol=0)


@pytest.mark.parametrize("transposed", [False, True], ids=["product", "transposed"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("packed", "bfloat16"),
        ("packed", "float32"),
        ("in turn", "bfloat16"),
        ("in turn", "float32"),
        ("plain", "bfloat16"),
        ("plain", "float32"),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 4, 5, 6, 96),
        (3, 2, 4, 70, 32),
        (67, 3, 4, 34, 160),
        (7, 1, 1, 38, 2880),
        (203, 1, 1, 66, 320),
    ],
    ids=str,
)
def test_sums_of_float64(arithmetic, shape, kind, dtype, transposed):
    M, X, E, N, K = shape
    N = 4 * N if kind == "in turn" else N
    check(np.random.default_rng(0), M, X, E, N, K, jnp.dtype(dtype), kind, transposed)


@settings(max_examples=67, deadline=None)
@given(st.integers(0, 70), st.integers(1, 4), st.integers(1, 7), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 2**31))  # fmt: skip
def test_any_shape(M, X, E, half, blocks, transposed, seed):
    kind, dtype = [
        ("packed", jnp.bfloat16),
        ("plain", jnp.bfloat16),
        ("in turn", jnp.bfloat16),
        ("packed", jnp.float32),
        ("in turn", jnp.float32),
    ][seed % 5]
    N = 4 * half if kind == "in turn" else 2 * half
    check(np.random.default_rng(seed), M + 1, X, E, N, 32 * blocks, dtype, kind, transposed)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("E", "fours", "blocks"), [(1, 1, 1), (3, 7, 5), (2, 9, 90)])
def test_rows_in_turn_are_the_released_bytes(E, fours, blocks, paired):
    rng = np.random.default_rng(0)
    shape = (E, 2 * fours, 2, blocks) if paired else (E, 4 * fours, blocks)
    weight = MxTensor(
        jnp.asarray(rng.integers(0, 256, (*shape, 16)).astype(np.uint8)),
        jnp.asarray(rng.integers(0, 256, shape).astype(np.uint8)),
    )
    held = in_turn(weight)
    assert (held.shape, held.ndim, held.nbytes) == (weight.shape, weight.ndim, weight.nbytes)
    # as arithmetic.h says: word i of row n's block
    codes = np.asarray(jnp.stack([weight.blocks & 15, weight.blocks >> 4], -1)).astype(np.uint16)
    codes = codes.reshape(E, fours, 4, blocks, 32)
    words = sum(codes[:, :, row] << 4 * row for row in range(4))
    np.testing.assert_array_equal(np.asarray(held.blocks).view("<u2"), words)
    for found, expected in (
        (held.released(), weight),
        (held[E - 1].released(), weight[E - 1]),
        (held[1:].released(), weight[1:]),
        (held.as_rows().released(), weight.as_rows() if paired else weight),
    ):
        np.testing.assert_array_equal(found.blocks, expected.blocks)
        np.testing.assert_array_equal(found.scales, expected.scales)
    first = weight[0].dequantize().reshape(-1, 32 * blocks)[0]
    np.testing.assert_array_equal(held.head(), first)


def test_experts_that_stay_as_released(monkeypatch):
    monkeypatch.setattr(library, "arithmetics", lambda: ["avx512_bf16"])
    shape = 2, 520, 64  # just over a MiB
    blocks, scales = jnp.zeros((*shape, 16), jnp.uint8), jnp.zeros(shape, jnp.uint8)
    assert isinstance(cpu.as_cpu_experts(MxTensor(blocks, scales)), cpu.CpuExperts)
    assert cpu.as_cpu_experts(MxTensor(blocks[:1], scales[:1])) is None
    assert cpu.as_cpu_experts(MxTensor(blocks[:, 1:], scales[:, 1:])) is None
    monkeypatch.setattr(library, "arithmetics", lambda: ["avx512", "portable"])
    assert cpu.as_cpu_experts(MxTensor(blocks, scales)) is None


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13])
def test_rows_in_turn_give_every_bit_of_the_released(arithmetic, rows):
    rng = np.random.default_rng(rows)
    weight, _ = packed(rng, 3, 72, 224)
    x = jnp.asarray(rng.normal(size=(rows, 224)), jnp.bfloat16)
    experts = jnp.full((rows, 1), 2, jnp.int32)
    found, expected = (product_of(x, experts, w) for w in (in_turn(weight), weight))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("layout", [in_turn, lambda weight: weight], ids=["in turn", "released"])
def test_a_row_does_not_depend_on_the_others(arithmetic, layout):
    rng = np.random.default_rng(1)
    weight = layout(packed(rng, 3, 40, 192)[0])
    x = jnp.asarray(rng.normal(size=(57, 192)), jnp.bfloat16)
    experts = jnp.asarray(rng.integers(0, 3, (57, 2)).astype(np.int32))
    whole = product_of(x, experts, weight)
    for rows in (slice(0, 1), slice(3, 8), slice(0, 40)):
        np.testing.assert_array_equal(product_of(x[rows], experts[rows], weight), whole[rows])


@pytest.mark.parametrize("layout", [in_turn, lambda weight: weight], ids=["in turn", "released"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_code_and_scale(arithmetic, dtype, layout):
    """Each of the 16 codes with every scale, read out by unit vectors: the bits `decode` gives."""
    codes = np.arange(32, dtype=np.uint8) % 16
    blocks = np.broadcast_to(codes[0::2] | codes[1::2] << 4, (1, 256, 1, 16))
    scales = np.arange(256).astype(np.uint8).reshape(1, 256, 1)
    weight = MxTensor(jnp.asarray(blocks), jnp.asarray(scales))
    expected = np.asarray(weight.dequantize(jnp.float32))[0].T
    normal = scales.reshape(-1) <= 250  # beyond, halves leave bfloat16's range
    for some in (32, 5):  # rows at once: several passes, and one
        for start in range(0, 32, some):
            x = jnp.eye(32, dtype=dtype)[start : start + some]
            found = product_of(x, jnp.zeros((len(x), 1), jnp.int32), layout(weight))[:, 0]
            np.testing.assert_array_equal(found[:, normal], expected[start : start + some, normal])


@pytest.mark.parametrize("experts", [[0] * 33, [5] * 33, [*range(5)] * 6 + [1, 1, 1]], ids=["one", "nobody", "all"])  # fmt: skip
def test_loads_of_experts(experts):
    rng = np.random.default_rng(2)
    weight, values = packed(rng, 5, 12, 64)
    x = jnp.asarray(rng.normal(size=(33, 64)), jnp.float32)
    found = product_of(x, jnp.asarray(experts, jnp.int32)[:, None], weight)[:, 0]
    values = np.concatenate([values, np.zeros((1, 12, 64))])
    expected = np.einsum("mk,mnk->mn", np.asarray(x, np.float64), values[experts])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def feed_forward(dtype, M=9, counted=False):
    rng = np.random.default_rng(3)
    E, F, D, X = 6, 64, 96, 3
    gate_up, _ = packed(rng, E, 2 * F, D)
    gate_up = MxTensor(gate_up.blocks.reshape(E, F, 2, -1, 16), gate_up.scales.reshape(E, F, 2, -1))
    down, _ = packed(rng, E, D, F)
    biases = [jnp.asarray(rng.normal(size=s), dtype) for s in ((E, F, 2), (E, D))]
    x = jnp.asarray(rng.normal(size=(M, D)), dtype)
    weights = jax.nn.softmax(jnp.asarray(rng.normal(size=(M, X)), jnp.float32))
    experts = jnp.asarray(np.stack([rng.permutation(E)[:X] for _ in range(M)]).astype(np.int32))
    mask = jnp.asarray(rng.integers(0, 2, M).astype(bool)) if counted else None

    def run(x, gate_up, down):
        return expert_mlp(
            x, weights, experts, gate_up, biases[0], down, biases[1],
            alpha=1.702, limit=1.5, counted_M=mask,
        )  # fmt: skip

    return run, x, gate_up, down


@pytest.mark.parametrize("counted", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("layout", [in_turn, lambda weight: weight], ids=["in turn", "released"])
@pytest.mark.parametrize("M", [1, 9, 90])
def test_feed_forward_as_the_reference(M, counted, layout):
    run, x, *released = feed_forward(jnp.float32, M, counted)
    given = x, *map(layout, released)
    with backends.use(experts="cpu"):
        found = jax.jit(run)(*given)
    with backends.use(experts="xla"):
        expected = jax.jit(run)(*given)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layout", [in_turn, lambda weight: weight], ids=["in turn", "released"])
def test_bfloat16_is_no_worse_than_the_reference(layout):
    run, x, gate_up, down = feed_forward(jnp.bfloat16, 60)
    with backends.use("xla"):
        reference = jax.jit(run)(x, gate_up, down).astype(jnp.float32)
        exact = jax.jit(feed_forward(jnp.float32, 60)[0])
        wide = np.asarray(exact(x.astype(jnp.float32), gate_up, down), np.float64)
    with backends.use(experts="cpu"):
        found = jax.jit(run)(x, layout(gate_up), layout(down)).astype(jnp.float32)
    errors = [np.sqrt(np.mean((np.asarray(y, np.float64) - wide) ** 2)) for y in (found, reference)]
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("layout", [in_turn, lambda weight: weight], ids=["in turn", "released"])
def test_gradient_of_the_feed_forward(layout):
    run, x, gate_up, down = feed_forward(jnp.float32)
    held = layout(gate_up), layout(down)
    gradient = jax.grad(lambda x: (run(x, *held) ** 2).sum())
    with backends.use(experts="cpu"):
        found = jax.jit(gradient)(x)
    wide = [w.dequantize(jnp.float32) for w in (gate_up, down)]
    with backends.use("xla"):
        expected = jax.jit(jax.grad(lambda x: (run(x, *wide) ** 2).sum()))(x)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * float(abs(expected).max()))


def test_dense_product_and_its_gradient():
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 16)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(10, 4, 16)), jnp.bfloat16)

    def both(x, w):
        value, pull = jax.vjp(lambda x, w: product("BTNH,DNH->BTD", x, w), x, w)
        return value, *pull(value)

    with backends.use(product="cpu"):
        found = jax.jit(both)(x, w)
    with backends.use(product="xla"):
        expected = jax.jit(both)(x, w)
    for a, b in zip(found, expected, strict=True):
        b = np.asarray(b.astype(jnp.float32))
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=4e-3 * abs(b).max())


def attended(q, k, v, sinks, q_positions, k_positions, window):
    """Attention with sinks in float64, key by key."""
    q, k, v, sinks = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, sinks))
    (B, T, N, H), K = q.shape, k.shape[2]
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        at, seen = q_positions[b, t], k_positions[b]
        visible = (seen >= 0) & (seen <= at) & (seen > at - (window or 1 << 30))
        scores = k[b, visible, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        largest = max(scores.max(initial=-np.inf), sinks[n])
        weights = np.exp(scores - largest)
        total = weights.sum() + np.exp(sinks[n] - largest)
        out[b, t, n] = weights @ v[b, visible, n // (N // K)] / total
    return out


def attention_case(B, T, S, dtype, first, window, seed=0, ring=False, heads=(6, 2)):
    """Queries at positions first .. first + T - 1; slots hold their own positions, or a ring's."""
    rng = np.random.default_rng(seed)
    (N, K), H = heads, 64
    q = jnp.asarray(2 * rng.normal(size=(B, T, N, H)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(B, S, K, H)), dtype) for _ in range(2))
    sinks = jnp.asarray(2 * rng.normal(size=N), jnp.float32)
    first = np.asarray([first + 3 * b for b in range(B)])
    q_positions = (first[:, None] + np.arange(T)).astype(np.int32)
    last = q_positions[:, -1:]
    slots = np.arange(S)[None]
    k_positions = last - (last - slots) % S if ring else np.where(slots <= last, slots, -1)
    k_positions = np.maximum(k_positions, -1).astype(np.int32)
    return (q, k, v, sinks, q_positions, k_positions), window


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("T", "S", "first", "window", "ring"),
    [
        (1, 300, 0, None, False), (1, 300, 290, None, False), (1, 128, 127, 128, True),
        (1, 128, 128, 128, True), (1, 128, 129, 128, True), (1, 128, 50, 128, True),
        (1, 136, 131_063, 128, True), (5, 64, 0, None, False), (40, 600, 500, None, False),
        (37, 700, 400, 128, False), (1, 1, 0, None, False), (3, 257, 254, 127, False),
        (3, 600, 131_071 - 602, 129, True),
    ],
)  # fmt: skip
def test_attention_in_float64(arithmetic, T, S, first, window, ring, dtype):
    parts, window = attention_case(2, T, S, dtype, first, window, ring=ring)
    found = jax.jit(cpu.attention, static_argnums=6)(*map(jnp.asarray, parts), window)
    expected = attended(*parts, window)
    # bfloat16: the result's own rounding, and that of the weights
    tolerance = 2e-6 if dtype == jnp.float32 else 1.5e-2
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("first", "window"), [(0, None), (252, None), (294, 128)])
def test_one_query_of_eight_heads_in_float64(arithmetic, first, window):
    """gpt-oss's group, in decode: bfloat16's values are multiplied without a panel."""
    parts, window = attention_case(2, 1, 300, jnp.bfloat16, first, window, heads=(24, 3))
    found = jax.jit(cpu.attention, static_argnums=6)(*map(jnp.asarray, parts), window)
    expected = attended(*parts, window)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=1.5e-2, rtol=0)


def test_attention_is_no_worse_than_the_reference():
    parts, _ = attention_case(2, 30, 300, jnp.bfloat16, 250, None)
    expected, errors = attended(*parts, None), []
    for name in ("cpu", "xla"):
        with backends.use(attention=name):
            found = jax.jit(attention)(*map(jnp.asarray, parts)).astype(jnp.float32)
        errors.append(np.sqrt(np.mean((np.asarray(found, np.float64) - expected) ** 2)))
    assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("heads", [(6, 2), (16, 2)])
@pytest.mark.parametrize("window", [None, 128])
def test_a_query_does_not_depend_on_the_others(arithmetic, window, heads):
    parts, _ = attention_case(1, 70, 700, jnp.bfloat16, 600, window, heads=heads)
    call = jax.jit(cpu.attention, static_argnums=6)
    whole = call(*map(jnp.asarray, parts), window)
    q, k, v, sinks, q_positions, k_positions = parts
    for t in (0, 33, 69):
        one = call(q[:, t : t + 1], k, v, sinks, q_positions[:, t : t + 1], k_positions, window)
        np.testing.assert_array_equal(one[:, 0], whole[:, t])


def test_keys_that_nobody_sees_may_hold_anything():
    (q, k, v, sinks, q_positions, k_positions), _ = attention_case(1, 2, 800, jnp.float32, 100, 128)
    call = jax.jit(cpu.attention, static_argnums=6)
    clean = call(q, k, v, sinks, q_positions, k_positions, 128)
    k, v = (x.at[:, 256:].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(call(q, k, v, sinks, q_positions, k_positions, 128), clean)
    nothing = call(q, k, v, sinks, q_positions, jnp.full_like(k_positions, -1), 128)
    np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


def test_gradient_of_attention():
    parts, _ = attention_case(1, 20, 20, jnp.float32, 0, None)
    arrays, positions = parts[:4], parts[4:]

    def gradients(name):
        with backends.use(attention=name):
            return jax.jit(jax.grad(
                lambda *arrays: (attention(*arrays, *map(jnp.asarray, positions), 8) ** 2).sum(),
                argnums=(0, 1, 2, 3),
            ))(*arrays)  # fmt: skip

    for a, b in zip(gradients("cpu"), gradients("xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(abs(b).max()))


def test_rows_of_a_table():
    table = jnp.asarray(np.random.default_rng(5).normal(size=(7, 6)), jnp.bfloat16)
    found = jax.jit(cpu.table_rows)(table, jnp.asarray([3, 0, 6, 3], jnp.int32))
    np.testing.assert_array_equal(found, table[jnp.asarray([3, 0, 6, 3])])


@pytest.mark.parametrize("donated", [False, True])
def test_rows_of_a_cache(donated):
    rng = np.random.default_rng(6)
    stored, new = (jnp.asarray(rng.normal(size=(2, n, 3, 4)), jnp.bfloat16) for n in (9, 3))
    slots = np.array([[0, 8, 4], [9, 2, -1]], np.int32)
    expected = np.array(stored)
    for b, t in np.ndindex(2, 3):
        if 0 <= slots[b, t] < 9:
            expected[b, slots[b, t]] = new[b, t]
    before = np.array(stored)
    call = jax.jit(cpu.store_rows, donate_argnums=(0,) if donated else ())
    np.testing.assert_array_equal(call(stored, new, slots), expected)
    if not donated:
        np.testing.assert_array_equal(stored, before)


@pytest.fixture
def untuned():
    yield
    library.tune(library.Tuning())


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize(
    "values", [{"columns": 8}, {"columns": 128, "cache": 1}, {"columns": 64}]
)  # fmt: skip
def test_no_result_depends_on_tuning(values):
    rng = np.random.default_rng(7)
    layouts = packed(rng, 3, 70, 192)[0], in_turn(packed(rng, 3, 72, 192)[0])
    x = jnp.asarray(rng.normal(size=(40, 192)), jnp.bfloat16)
    experts = jnp.asarray(rng.integers(0, 3, (40, 2)).astype(np.int32))
    calls = [lambda n=n, w=w: product_of(x[:n], experts[:n], w) for n in (2, 40) for w in layouts]
    before = [call() for call in calls]
    library.tune(library.Tuning(**values))
    for call, expected in zip(calls, before, strict=True):
        np.testing.assert_array_equal(call(), expected)


@pytest.mark.usefixtures("untuned")
def test_tuned_values_are_kept_and_found(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTOSS_COMPILATION_CACHE", str(tmp_path))
    config = dataclasses.replace(tiny.CONFIG, hidden_size=64, intermediate_size=32)
    found = tune(config, repeats=1, rows=(1, 3), say=lambda text: None)
    kept = tuning.find("cpu", library.Tuning())
    assert dataclasses.asdict(kept) == found["tuned"]
    tuning.save("cpu", library.Tuning(columns=16), {})
    assert tuning.find("cpu", library.Tuning()) == library.Tuning(columns=16)
    file = tmp_path / "kernels" / tuning.file_name(tuning.kind("cpu"))
    file.write_text('{"cpu": {"rows": 1}}')
    with pytest.raises(GptOssError, match="make it again with gptoss bench --tune"):
        tuning.find("cpu", library.Tuning())
    monkeypatch.setenv("GPTOSS_COMPILATION_CACHE", "off")
    assert tuning.find("cpu", library.Tuning()) == library.Tuning()
    with pytest.raises(GptOssError, match="no place"):
        tuning.save("cpu", library.Tuning(), {})


def test_without_a_compiler_xla_computes(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("GPTOSS_COMPILATION_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            run, *given = feed_forward(jnp.float32)
            found = jax.jit(run)(*given)
        assert "no-such-compiler is not there" in caplog.text
        assert "install a C++ compiler" in caplog.text
        assert len(caplog.records) == 1
        with backends.use("xla"):
            np.testing.assert_array_equal(found, jax.jit(run)(*given))
        with backends.use(experts="cpu"), pytest.raises(GptOssError, match="no-such-compiler"):
            run(*given)
    finally:
        library._load.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FLAGS", ["--no-such-flag"])
    with pytest.raises(library.CannotBuild, match="no-such-flag"):
        library.build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"experts": "cuda"}, {"attentions": "xla"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(GptOssError, match="no back end"), backends.use(**wrong):
        pass


def test_the_environment_forces(monkeypatch):
    run, *given = feed_forward(jnp.float32)
    monkeypatch.setenv("GPTOSS_KERNELS", "product=xla,experts=cpu")
    found = jax.jit(run)(*given)
    with backends.use(experts="cpu"):
        np.testing.assert_array_equal(found, jax.jit(run)(*given))
    monkeypatch.setenv("GPTOSS_KERNELS", "experts=xla,product=nothing")
    with pytest.raises(GptOssError, match="nothing"):
        run(*given)
