"""The GPU's kernels of a decode step, interpreted on CPU against the operations that they join."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_kernels_gpu_attention import GPUS, compiled, shapes_of, slow_on_gpus

from gptoss_jax import cache as kv
from gptoss_jax import ops
from gptoss_jax.cache import make_cache
from gptoss_jax.kernels.gpu import decode, dense
from gptoss_jax.model import apply
from gptoss_jax.ops import backends
from gptoss_jax.ops.rope import rotation

kernel_attention = importlib.import_module("gptoss_jax.kernels.gpu.attention")
kernel_experts = importlib.import_module("gptoss_jax.kernels.gpu.moe")
ops_decode = importlib.import_module("gptoss_jax.ops.decode")
jit: Any = functools.partial(jax.jit, compiler_options=tiny.QUICK)


def drawn(*shape, seed=0, dtype=jnp.float32, scale=1.0) -> Any:
    generator = np.random.default_rng((seed, *shape))
    return jnp.asarray(scale * generator.normal(size=shape), dtype)


def ints(x) -> Any:
    return jnp.asarray(x, jnp.int32)


# ---- attention of one token


@functools.partial(jit, static_argnames=("window", "kernel"))
def step(parts: Any, slots, sinks, positions, known, window, kernel):
    q, k, v, (cos, sin), (keys, values) = parts
    if kernel:
        out, *new = decode.attend_one(
            q, k, v, cos, sin, keys, values, slots, sinks, positions, known, window, interpret=True
        )
        return out, *new
    with backends.use("xla"):
        out, new = ops.attend_one(
            q,
            k,
            v,
            (cos, sin),
            (keys, values),
            slots,
            sinks,
            positions,
            known,
            window,
            None,
            kv.append,
        )
    return out, *new


@pytest.mark.parametrize(
    ("S", "window"), [(384, None), (136, 128), (64, 64)], ids=["split", "ring", "one-block"]
)
def test_one_kernel_rotates_stores_and_attends(S, window):
    """Lengths at the start, at the edges of blocks and rings, and a full cache, whose last slot is
    written over.
    """
    B, N, K, H = 3, 15, 3, 14
    inverse = (1 / 100 ** (np.arange(H // 2) / (H // 2))).astype(np.float32)
    for length in (0, 63, 64, 127, 128, 135, 136, 271, 383, 384, 130_000):
        before = ints([length, 0, max(0, length - 1)])
        if window is None:
            before = jnp.minimum(before, S)
            slots, known = before, kv.full_positions(before + 1, S)
        else:
            slots, known = before % S, kv.ring_positions(before + 1, S)
        positions = before[:, None]
        stored = drawn(B, S, K, H, seed=1), drawn(B, S, K, H, seed=2)
        new = drawn(B, 1, N, H, seed=3), drawn(B, 1, K, H, seed=4), drawn(B, 1, K, H, seed=5)
        parts = *new, rotation(positions, inverse, 1.3), stored
        rest = slots, drawn(N, seed=6), positions, known, window
        for ours, theirs in zip(
            step(parts, *rest, kernel=True), step(parts, *rest, kernel=False), strict=True
        ):
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=3e-6)


# ---- products


@functools.partial(jit, static_argnames=("eps", "dtype", "keep"))
def products(x, weights, biases, **options):
    return dense.products(x, weights, biases, interpret=True, **options)


@pytest.mark.parametrize("M", [1, 3, 17])
def test_norm_bias_and_residual_are_those_of_the_operations(M):
    D, outputs = 96 + 40, (45, 9, 300)
    x, scale = drawn(M, D), drawn(D, seed=1)
    weights = [drawn(n, D, seed=2) for n in outputs]
    biases = [drawn(n, seed=3) for n in outputs]
    *got, kept = products(x, weights, biases, norm_D=scale, eps=1e-5, keep=True)
    norm = ops.rms_norm(x, scale, 1e-5)
    np.testing.assert_allclose(np.asarray(kept), np.asarray(norm), rtol=1e-6)
    exact = np.asarray(norm, np.float64)
    for ours, w, b in zip(got, weights, biases, strict=True):
        want = exact @ np.asarray(w, np.float64).T + np.asarray(b, np.float64)
        np.testing.assert_allclose(np.asarray(ours), want, atol=2e-5)
    residual = drawn(M, outputs[0], seed=4)
    (got,) = products(x, weights[:1], biases[:1], residual_MO=residual)
    want = np.asarray(x, np.float64) @ np.asarray(weights[0], np.float64).T
    want += np.asarray(biases[0], np.float64) + np.asarray(residual, np.float64)
    np.testing.assert_allclose(np.asarray(got), want, atol=2e-5)


@pytest.mark.parametrize("M", [1, 5])
def test_bfloat16_products_round_where_the_operations_round(M):
    """Inputs longer than a step of one row, and than its norm's."""
    D = dense.NORM_DEPTH + 24
    x, scale = drawn(M, D, dtype=jnp.bfloat16), drawn(D, seed=1, dtype=jnp.bfloat16)
    weight = drawn(40, D, seed=2, dtype=jnp.bfloat16, scale=D**-0.5)
    bias = drawn(40, seed=3, dtype=jnp.bfloat16)
    got, kept = products(x, [weight], [bias], norm_D=scale, eps=1e-5, keep=True, dtype=jnp.float32)
    norm = ops.rms_norm(x, scale, 1e-5)
    assert (np.asarray(kept) != np.asarray(norm)).mean() < 0.01  # the sum's order: a last bit
    exact = np.asarray(kept, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(np.asarray(got), exact + np.asarray(bias, np.float64), atol=2e-5)


@pytest.mark.parametrize(("M", "E"), [(1, 12), (5, 32), (2, 128)])
def test_experts_are_chosen_as_top_k_chooses_them(M, E):
    logits = np.asarray(drawn(M, E)).round(1)  # some are equal: the first one counts
    logits[0, :6] = logits.max() + 1
    got = dense.choose(jnp.asarray(logits, jnp.float32), 4, interpret=True)
    top, ids = jax.lax.top_k(jnp.asarray(logits, jnp.float32), 4)
    np.testing.assert_array_equal(np.asarray(got[1]), np.asarray(ids))
    np.testing.assert_allclose(np.asarray(got[0]), np.asarray(jax.nn.softmax(top, -1)), rtol=1e-6)


# ---- the network on top of them


@pytest.fixture
def interpreted(monkeypatch):
    """Every kernel of a GPU interpreted; the names of those used."""
    used = set()

    def noted(name, real, *parts, **rest):
        used.add(name)
        return real(*parts, **{**rest, "interpret": True})

    for room, name in (
        (kernel_attention, "attention"), (decode, "attend_one"), (dense, "products"),
        (dense, "choose"), (kernel_experts, "mlp"),
    ):  # fmt: skip
        real = getattr(room, name)
        monkeypatch.setattr(room, name, functools.partial(noted, name, real))
    return used


def test_the_network_with_all_kernels_is_the_network(interpreted):
    """A prompt, then tokens one by one past the ring's end."""
    config = tiny.SMALL
    params = tiny.params(config)

    @functools.partial(jit, static_argnames="platform")
    def forward(tokens, cache, platform):
        with backends.compiling_for(platform) if platform else backends.use("xla"):
            return apply(params, tokens, cache, config=config)

    found = []
    for platform in ("gpu", None):
        cache, out = make_cache(config, 2, 32, jnp.float32), []
        for tokens in (tiny.tokens(2, 7), *(tiny.tokens(2, 1, seed) for seed in (2, 3, 4))):
            logits, cache = forward(tokens, cache, platform)
            out.append(np.asarray(logits))
        found.append(out)
    assert interpreted == {"attention", "attend_one", "products", "choose", "mlp"}
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_more_rows_and_other_types_are_left_to_the_operations():
    x, weight = drawn(1, 65, 8), drawn(5, 8)
    assert ops_decode._why_not(x, weight) == "more than 64 rows"
    assert ops_decode._why_not(x[:, :64], weight) is None
    assert "different types" in str(ops_decode._why_not(x[:, :3], weight.astype(jnp.bfloat16)))


def test_what_is_joined_has_the_gradient_of_its_parts(interpreted):
    x, scale = drawn(1, 3, 8), drawn(8, seed=1)
    weights, biases = [drawn(5, 2, 8, seed=2)], [drawn(5, 2, seed=3)]

    def total(*arrays: Any):
        x, scale, weight, bias = arrays
        (y,) = ops.norm_linears(x, scale, 1e-5, ["BTD,NHD->BTNH"], [weight], [bias])
        return (y**2).sum()

    found = []
    for platform in ("gpu", "tpu"):
        with backends.compiling_for(platform):
            found.append(jax.grad(total, (0, 1, 2, 3))(x, scale, *weights, *biases))
    assert interpreted == {"products"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4), *found
    )


# ---- compiled for GPUs that are not there


@slow_on_gpus
@pytest.mark.parametrize("topology", GPUS)
@pytest.mark.parametrize(
    ("B", "S", "window"), [(1, 128, 128), (1, 131_072, None), (64, 8192, None)]
)
def test_one_token_compiles_without_spills_and_the_cache_is_not_copied(topology, B, S, window):
    (q, cache, _, sinks, at, known), (K, H) = shapes_of(B, 1, S), (8, 64)
    row, angle = ((B, 1, K, H), jnp.bfloat16), ((B, 1, H // 2), jnp.float32)
    found = compiled(
        topology,
        lambda *parts: decode.attend_one(*parts, window=window),
        q, row, row, angle, angle, cache, cache, ((B,), jnp.int32), sinks, at, known,
        given=(5, 6),
    )  # fmt: skip
    memory = found.memory_analysis()
    assert memory.temp_size_in_bytes < 2 << 20
    assert memory.alias_size_in_bytes == 2 * B * S * K * H * 2


@slow_on_gpus
@pytest.mark.parametrize("topology", GPUS)
@pytest.mark.parametrize("M", [1, 8, 64])
def test_products_of_gpt_oss_compile_without_spills(topology, M):
    D, outputs = 2880, (4096, 512, 512)

    def layer(x, scale, bias, router, *weights):
        biases = [jnp.zeros(len(w), x.dtype) for w in weights]
        parts = dense.products(x, weights, biases, norm_D=scale, eps=1e-5)
        logits, norm = dense.products(
            x, [router], [bias], norm_D=scale, eps=1e-5, dtype=jnp.float32, keep=True
        )
        return parts, norm, dense.choose(logits, 4)

    shapes = (M, D), (D,), (128,), (128, D), *((n, D) for n in outputs)
    compiled(topology, layer, *((shape, jnp.bfloat16) for shape in shapes))
