"""The CPU's attention with segments and its gradient, against autodiff of sums in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu
from gptoss_jax.kernels.cpu import library
from gptoss_jax.ops import attention, backends
from gptoss_jax.ops.attention import banded

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason="no C++ compiler")
B, T, S, N, K = 2, 75, 610, 6, 2


def exact(q, k, v, sinks, q_positions, k_positions, window, segments):
    """Attention with sinks, all scores at once."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(q.shape[-1])
    at, seen = q_positions[:, :, None], k_positions[:, None]
    visible = (seen >= 0) & (seen <= at) & (seen > at - (window or 1 << 30))
    if segments is not None:
        visible &= segments[0][:, :, None] == segments[1][:, None]
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    sinks = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1), axis=-1)[..., :-1]
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


def case(H, dtype, window, packed) -> Any:
    """Queries after 500 keys of the past, or rows of packed documents with padding between."""
    rng = np.random.default_rng(0)
    arrays = [2 * rng.normal(size=(B, T, N, H)), *rng.normal(size=(2, B, S, K, H))]
    arrays = [jnp.asarray(x, dtype) for x in arrays] + [jnp.asarray(2 * rng.normal(size=N), dtype)]
    lengths = [[31, 280, 239, 20], [1, 300, 245, 5]]  # and what is left
    segments = np.stack([np.repeat(np.arange(5), [*row, S - sum(row)]) for row in lengths])
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    k_positions = (np.arange(S)[None] - starts if packed else np.tile(np.arange(S), (B, 1))).astype(
        np.int32
    )
    rows = slice(S - T - 7, S - 7)  # the last keys are later than all queries
    q_positions = k_positions[:, rows]
    if packed:
        k_positions = np.where(segments == 3, -1, k_positions)  # padding: its queries see nothing
    kept = (segments[:, rows].astype(np.int32), segments.astype(np.int32)) if packed else None
    return arrays, (q_positions, k_positions.astype(np.int32), window, kept)


def on_device(rest) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, rest)


def of_float64(arrays, rest, weight):
    """Result and gradients of sum(weight * result)."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x.astype(jnp.float32), np.float64)) for x in arrays]
        out, pull = jax.vjp(lambda *arrays: exact(*arrays, *rest), *wide)
        return [np.asarray(x) for x in (out, *pull(jnp.asarray(weight, jnp.float64)))]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("H", "dtype"), [(32, "float32"), (64, "float32"), (64, "bfloat16"), (32, "bfloat16")])  # fmt: skip
def test_result_and_gradients_in_float64(arithmetic, H, dtype, window, packed):
    arrays, rest = case(H, dtype, window, packed)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), dtype)

    @jax.jit
    def run(*arrays):
        with backends.use(attention="cpu"):
            out, pull = jax.vjp(lambda *arrays: attention(*arrays, *on_device(rest)), *arrays)
            return out, *pull(weight)

    expected = of_float64(arrays, rest, weight.astype(jnp.float32))
    tolerance = 3e-6 if dtype == "float32" else 1.2e-2
    for name, found, want in zip(["out", *"qkv", "sinks"], run(*arrays), expected, strict=True):
        error = abs(np.asarray(found.astype(jnp.float32), np.float64) - want).max()
        assert error < tolerance * abs(want).max(), (name, error / abs(want).max())
        assert abs(want).max() > 1e-3
    if packed:
        nothing = rest[3][0] == 3
        assert nothing.any()
        np.testing.assert_array_equal(run(*arrays)[0][nothing], 0)


@pytest.mark.parametrize("H", [32, 64])
def test_a_query_does_not_depend_on_the_others(arithmetic, H):
    (q, k, v, sinks), (q_positions, k_positions, window, kept) = case(H, jnp.float32, 40, True)
    call = jax.jit(cpu.attention, static_argnums=6)
    q_positions, k_positions, window, kept = on_device((q_positions, k_positions, window, kept))
    whole = call(q, k, v, sinks, q_positions, k_positions, window, kept)
    for t in (0, 33, 74):
        one = slice(t, t + 1)
        alone = kept[0][:, one], kept[1]
        found = call(q[:, one], k, v, sinks, q_positions[:, one], k_positions, window, alone)
        np.testing.assert_array_equal(found[:, 0], whole[:, t])


def test_gradients_of_a_band():
    """Queries with the keys before them, as training calls it."""
    rng = np.random.default_rng(2)
    window, H = 24, 32
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, window + T, K, H)), jnp.float32) for _ in range(2))
    sinks = jnp.asarray(rng.normal(size=N), jnp.float32)
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
    positions = np.where(segments > 0, np.arange(T)[None], -1).astype(np.int32)
    pad = [(0, 0), (window, 0)]
    before, kept = np.pad(positions, pad, constant_values=-1), (segments, np.pad(segments, pad))
    positions, before, kept = on_device((positions, before, kept))

    def gradients(name):
        def total(q, k, v, sinks):
            out = banded(q, k, v, sinks, positions, before, window, kept)
            return jnp.sin(out).sum(), out

        both: Any = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        with backends.use(attention=name):
            return both(q, k, v, sinks)

    (_, out), found = gradients("cpu")
    (_, want), expected = gradients("xla")
    np.testing.assert_allclose(out, want, atol=2e-6)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(abs(b).max()))


def test_what_the_kernel_cannot_compute_is_said():
    q, k, v = (jnp.zeros((1, 2, n, 33)) for n in (2, 1, 1))
    at = jnp.zeros((1, 2), jnp.int32)
    with backends.use(attention="cpu"), pytest.raises(GptOssError, match="no multiple of 32"):
        attention(q, k, v, jnp.zeros(2), at, at)
