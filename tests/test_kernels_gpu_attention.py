"""The GPU's attention, interpreted on CPU against its definition in float64, and compiled for GPUs
that are not there (slow).
"""

import functools
import importlib
import importlib.util
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import sharding
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels.gpu import attention as kernel
from gptoss_jax.kernels.gpu import attention_gradient
from gptoss_jax.kernels.gpu.blocks import Tuning
from gptoss_jax.ops import backends

ops_attention = importlib.import_module("gptoss_jax.ops.attention")
jit: Any = functools.partial(jax.jit, compiler_options=tiny.QUICK)


def definition(q, k, v, sinks, q_positions, k_positions, window=None, segments=None):
    """A softmax over all keys and the sink, the simplest way."""
    B, T, N, H = q.shape
    k, v = (jnp.repeat(x, N // k.shape[2], axis=2) for x in (k, v))
    place, at = k_positions[:, None], q_positions[:, :, None]
    shown = (place >= 0) & (place <= at)
    if window is not None:
        shown &= place > at - window
    if segments is not None:
        shown &= segments[0][:, :, None] == segments[1][:, None]
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(H)
    scores = jnp.where(shown[:, None], scores, -jnp.inf)
    sink = jnp.broadcast_to(sinks[None, :, None, None], (B, N, T, 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def exact(parts, *rest, weigh=None, **options):
    """`definition` in float64, and with `weigh` the gradients of its sum, so weighted."""
    parts = [np.asarray(x).astype(np.float64) for x in parts]
    with jax.enable_x64(True):
        if weigh is None:
            return np.asarray(definition(*map(jnp.asarray, parts), *rest, **options))
        weigh = jnp.asarray(np.asarray(weigh).astype(np.float64))

        def total(*parts):
            return (definition(*parts, *rest, **options) * weigh).sum()

        return [np.asarray(x) for x in jax.grad(total, (0, 1, 2, 3))(*map(jnp.asarray, parts))]


def drawn(B, T, S, N=6, K=3, H=14, dtype=jnp.float32, seed=0) -> Any:
    generator = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (N,)
    return tuple(jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes)


ROWS = Tuning().attention_rows


def ints(x) -> Any:
    return jnp.asarray(x, jnp.int32)


def full(lengths, S) -> Any:
    slots = np.arange(S)[None]
    return ints(np.where(slots < np.asarray(lengths)[:, None], slots, -1))


@functools.partial(jit, static_argnames=("window", "rows"))
def attend(*parts: Any, segments=None, window=None, rows=ROWS):
    """In float32 too by the blocks of bfloat16, if `rows` is not another number."""
    with mock.patch.object(kernel, "FLOAT32_ROWS", rows):
        return kernel.attention(*parts, segments=segments, window=window, interpret=True)


def check(parts, q_positions, k_positions, window=None, segments=None, rows=ROWS):
    options: Any = {"window": window, "segments": segments}
    got = attend(*parts, q_positions, k_positions, rows=rows, **options)
    want = exact(parts, q_positions, k_positions, window=window, segments=segments)
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-6)


# ---- decode


@pytest.mark.parametrize("window", [None, 128])
def test_decode_sees_the_window_exactly(window):
    """Six blocks of slots over four programs; lengths around one, two and all of them."""
    assert kernel.cut(3, 1, 384, 3, 2, 14, jnp.float32).splits == 4
    for length in (1, 64, 127, 128, 129, 300, 384):
        lengths = [length, 300, 1]
        positions = ints(np.asarray(lengths)[:, None] - 1)
        check(drawn(3, 1, 384), positions, full(lengths, 384), window)


@pytest.mark.parametrize("size", [127, 128, 129])
def test_windows_next_to_128(size):
    check(drawn(1, 3, 160), ints([[130, 131, 140]]), full([160], 160), size)


def test_rings_at_any_position():
    """A ring of 136 slots, a window of 128: position p lies in slot p % 136."""
    S, slots = 136, np.arange(136)
    for last in (0, 100, 127, 128, 135, 136, 5000, 131_071):
        held_here = last - (last - slots) % S
        check(drawn(1, 1, S), ints([[last]]), ints(np.maximum(held_here, -1)[None]), 128)


def test_full_caches_far_out_in_any_order():
    """Positions to 131,071; 33 blocks of slots, the last one ragged."""
    S = 2100
    generator = np.random.default_rng(0)
    positions = np.sort(generator.permutation(131_072)[:S])
    positions[-1] = 131_071
    order = generator.permutation(S)
    check(drawn(1, 2, S), ints([[131_071, 65_000]]), ints(positions[order][None]))


def test_decode_has_work_for_a_whole_gpu_and_few_blocks_need_no_second_kernel():
    def programs(B, S):
        blocks = kernel.cut(B, 1, S, 8, 8, 64, jnp.bfloat16)
        assert blocks.rows == 16
        return blocks.splits, B * 8 * blocks.splits

    assert programs(1, 131_072) == (32, 256)
    assert programs(1, 8192) == (32, 256)
    assert programs(1, 1024) == (16, 128)
    assert programs(4, 8192) == (8, 256)
    assert programs(64, 8192) == (1, 512)
    assert programs(1, 128) == (1, 8)
    assert programs(1, 128 + 64) == (1, 8)


def test_what_is_read_follows_the_length_and_not_the_capacity():
    S = 131_072
    lengths = np.array([1, 64, 65, 131_072])
    blocks = kernel.cut(4, 1, S, 8, 8, 64, jnp.bfloat16)
    for window, begins, ends in (
        (None, [0, 0, 0, 0], [1, 1, 2, 2048]),
        (128, [0, 0, 0, 2046], [1, 1, 2, 2048]),
    ):
        seen = kernel.seen(ints(lengths[:, None] - 1), full(lengths, S), None, window, blocks)
        first, end = kernel.extent(seen)
        assert np.asarray(first)[:, 0].tolist() == begins
        assert np.asarray(end)[:, 0].tolist() == ends


def test_queries_that_see_nothing_give_zeros_and_blocks_that_are_not_seen_are_not_read():
    q, k, v, sinks = drawn(2, 2, 640)
    k, v = (x.at[:, 64:].set(jnp.nan) for x in (k, v))
    for last in (True, False):
        positions = ints([[-1, 3], [-1, -1]]), full([64, 0] if last else [4, 64], 640)
        got = np.asarray(attend(q, k, v, sinks, *positions))
        assert np.isfinite(got).all()
        assert (got[0, 0] == 0).all()
        assert (got[1] == 0).all()
        assert (got[0, 1] != 0).any()
    empty = attend(q, k, v, sinks, ints([[5, 6], [7, 8]]), full([0, 0], 640))
    assert (np.asarray(empty) == 0).all()
    none = attend(q, k, v, jnp.full_like(sinks, -jnp.inf), *positions)
    assert np.isfinite(np.asarray(none)).all()


# ---- chunks of prompts, whole sequences


@pytest.mark.parametrize(
    ("T", "window", "rows"), [(5, None, 128), (70, None, 128), (70, 8, 16), (130, 64, 128)]
)
def test_chunks_of_prompts_begin_anywhere(T, window, rows):
    before = np.array([0, 37])
    q_positions = before[:, None] + np.arange(T)
    check(drawn(2, T, 200), ints(q_positions), full(before + T, 200), window, rows=rows)


@pytest.mark.parametrize("window", [None, 20])
def test_packed_rows_see_their_own_segment(window):
    segments = ints(np.sort(np.random.default_rng(3).integers(0, 5, (2, 150))))
    first = jnp.argmax(segments[:, :, None] == segments[:, None], axis=-1).astype(jnp.int32)
    positions = jnp.arange(150, dtype=jnp.int32)[None] - first
    known = jnp.where(segments > 0, positions, -1)
    parts = drawn(2, 150, 150, N=5, K=1, H=20)
    check(parts, positions, known, window, (segments, segments))
    blocks = kernel.cut(2, 150, 150, 1, 5, 20, jnp.float32)
    seen = kernel.seen(positions, known, (segments, segments), window, blocks)
    assert 0 < seen.sum() < seen.size


@pytest.mark.parametrize(
    ("B", "T", "S", "K", "G", "window"),
    [(1, 1, 1, 1, 1, None), (3, 1, 40, 3, 5, 7), (2, 9, 33, 2, 3, None), (1, 4, 17, 1, 16, 1)],
)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=10, deadline=None)
def test_attention_of_any_shape(B, T, S, K, G, window, seed):
    generator = np.random.default_rng(seed)
    q_positions, k_positions = (generator.integers(-1, 50, (B, n)) for n in (T, S))
    parts = drawn(B, T, S, N=K * G, K=K, H=6, seed=seed)
    check(parts, ints(q_positions), ints(k_positions), window)


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@pytest.mark.parametrize("S", [200, 640])
def test_bfloat16_is_as_exact_as_the_reference(S):
    parts = drawn(2, 40, S, N=16, K=2, H=64, dtype=jnp.bfloat16)
    positions = ints(np.arange(40)[None] + [[S - 60], [100]]), full([S - 20, 140], S)
    want = exact(parts, *positions)
    got = attend(*parts, *positions)
    assert got.dtype == jnp.bfloat16
    with backends.use("xla"):
        reference = ops_attention.attention(*parts, *positions)
    own = rms(np.asarray(reference, np.float64) - want)
    assert rms(np.asarray(got, np.float64) - want) < 1.05 * own


# ---- gradients


@functools.partial(jit, static_argnames="window")
def pull(parts: Any, positions: Any, segments: Any, weigh: Any, window=None) -> Any:
    options: Any = {"window": window, "interpret": True}
    with mock.patch.object(kernel, "FLOAT32_ROWS", ROWS):
        found = kernel.forward(*parts, *positions, segments=segments, **options)
        given = *parts, *positions, segments, *found, weigh
        return attention_gradient.backward(*given, **options)


@pytest.mark.parametrize(
    ("T", "S", "window", "packed"), [(70, 70, None, True), (67, 83, 20, False), (9, 130, 128, True)]
)
def test_gradients_of_everything(T, S, window, packed):
    generator = np.random.default_rng(T)
    parts = drawn(2, T, S, N=15, K=3)
    positions = ints(S - T + np.arange(T)[None] + [[0], [-3]]), full([S, S - 7], S)
    segments = None
    if packed:
        ids = np.sort(generator.integers(0, 4, (2, S)))
        segments = ints(ids[:, -T:]), ints(ids)
    weigh = jnp.asarray(generator.normal(size=parts[0].shape), jnp.float32)
    got = pull(parts, positions, segments, weigh, window=window)
    want = exact(parts, *positions, weigh=weigh, window=window, segments=segments)
    for ours, theirs in zip((*got[:3], got[3].sum(0)), want, strict=True):
        assert np.abs(theirs).max() > 0.01
        np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-5)


def test_gradients_of_rows_that_see_nothing_are_zero():
    parts = drawn(1, 20, 40)
    positions = ints(np.where(np.arange(20) < 10, -1, np.arange(20))[None]), full([15], 40)
    d_q, d_k, d_v, d_sinks = map(np.asarray, pull(parts, positions, None, jnp.ones_like(parts[0])))
    assert all(np.isfinite(x).all() for x in (d_q, d_k, d_v, d_sinks))
    assert (d_q[0, :10] == 0).all()
    assert (d_k[0, 15:] == 0).all()
    assert (d_v[0, 15:] == 0).all()
    assert (d_q[0, 10:] != 0).any()


# ---- behind the operation


def _noted(used, real, *parts, **rest):
    used.append(real.__name__)
    return real(*parts, **{**rest, "interpret": True})


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels interpreted; their names as they are used."""
    used = []
    for room, name in (
        (kernel, "attention"), (kernel, "forward"), (attention_gradient, "backward"),
    ):  # fmt: skip
        monkeypatch.setattr(room, name, functools.partial(_noted, used, getattr(room, name)))
    return used


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 3}])
def test_the_operation_takes_the_kernel_where_it_is_forced(mesh, interpreted, monkeypatch):
    # the interpreter's own constants do not vary over a mesh (jax 0.10.2), compiled kernels do
    monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
    parts = drawn(2, 12, 12)
    segments = ints(np.repeat([[1, 2], [0, 3]], 6, axis=1))
    positions = ints(np.tile(np.arange(6), 2)[None] + np.zeros((2, 1)))

    def loss(*parts):
        out = ops_attention.attention(*parts, positions, positions, 4, (segments, segments))
        return (out**2).sum(), out

    def run(*parts):
        return jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)(*parts)

    with backends.use("xla"):
        want = jit(run)(*parts)
    context = (
        jax.set_mesh(sharding.make_mesh(mesh, devices=jax.devices()[:6]))
        if mesh
        else backends.use()
    )
    with context, backends.use(attention="gpu"):
        got = jit(lambda *parts: run(*parts))(*parts)
        plain = jit(lambda *parts: loss(*parts)[1])(*parts)
    assert {"attention", "forward", "backward"} <= set(interpreted)
    for ours, theirs in zip(
        jax.tree.leaves((got, plain)), jax.tree.leaves((want, want[0][1])), strict=True
    ):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_take_is_said():
    positions = ints(np.arange(3)[None])
    with backends.use(attention="gpu"):
        with pytest.raises(GptOssError, match="heads are wider than 256"):
            ops_attention.attention(*drawn(1, 3, 3, H=264), positions, positions)
        with pytest.raises(GptOssError, match="more than 64 query heads share a kv head"):
            ops_attention.attention(*drawn(1, 3, 3, N=65, K=1), positions, positions)
        parts = drawn(1, 3, 3, dtype=jnp.float8_e4m3fn)
        with pytest.raises(GptOssError, match="not float8_e4m3fn"):
            ops_attention.attention(*parts, positions, positions)


# ---- compiled for GPUs that are not there

cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs jax's CUDA plugin: pip install -e '.[cuda]'",
)
NO_SPILLS: Any = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


def compiled(topology, function, *shapes, given=()) -> Any:
    """Compiled for one GPU; fails where ptxas spills registers."""
    from jax.sharding import SingleDeviceSharding

    from gptoss_jax.plan import hardware, programs

    device = programs.devices(hardware.parse(topology))[0]
    where = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
    with programs.in_place_of(device):
        lowered = jax.jit(function, donate_argnums=given).trace(*arrays)
        return lowered.lower(lowering_platforms=("cuda",)).compile(compiler_options=NO_SPILLS)


def shapes_of(B, T, S, dtype=jnp.bfloat16):
    N, K, H = 64, 8, 64
    cache = ((B, S, K, H), dtype)
    numbers = ((B, T), jnp.int32), ((B, S), jnp.int32)
    return ((B, T, N, H), dtype), cache, cache, ((N,), dtype), *numbers


slow_on_gpus = [
    cuda,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]
slow_on_gpus = functools.reduce(lambda f, g: lambda x: f(g(x)), slow_on_gpus)
GPUS = ("h200:1", "a100:1", "l4:1")


@slow_on_gpus
@pytest.mark.parametrize("topology", GPUS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("B", "T", "S", "window"),
    [(1, 1, 128, 128), (1, 1, 131_072, None), (64, 1, 8192, None), (1, 512, 8192, None),
     (2, 512, 640, 128)],
)  # fmt: skip
def test_attention_of_gpt_oss_compiles_without_spills(topology, dtype, B, T, S, window):
    found = compiled(
        topology,
        lambda *parts: kernel.attention(*parts, window=window),
        *shapes_of(B, T, S, dtype),
    )
    # the partial sums of 256 programs, and nothing as long as the cache but one number a block
    assert found.memory_analysis().temp_size_in_bytes < 2 << 20


@slow_on_gpus
@pytest.mark.parametrize("topology", GPUS)
@pytest.mark.parametrize("window", [None, 128])
def test_gradient_compiles_without_spills(topology, window):
    def gradient(*parts: Any):
        segments = parts[4:6]
        found = kernel.forward(*parts, segments=segments, window=window)
        parts = *parts, segments, *found, found[0]
        return attention_gradient.backward(*parts, window=window)

    found = compiled(topology, gradient, *shapes_of(1, 2048, 2048))
    assert found.memory_analysis().temp_size_in_bytes < 64 << 20
