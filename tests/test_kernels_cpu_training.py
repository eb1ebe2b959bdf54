"""What the CPU's kernels compute between the products of a training step, and its gradients, against
autodiff of the definitions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import model, sampling
from gptoss_jax.kernels.cpu import library
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends, expert_mlp, experts_kernels, rms_norm, rotate
from gptoss_jax.ops.loss import cross_entropy
from gptoss_jax.ops.product import product
from gptoss_jax.train import objective

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason="no C++ compiler")


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def compare(call, *arrays, tolerance=3e-6):
    """Result and gradients by kernels, and by XLA; returns whether a kernel was there."""

    def both(name):
        def run(*arrays):
            out, pull = jax.vjp(call, *arrays)
            return out, *pull(jnp.cos(3 * out))

        if name is None:
            return jax.jit(run)(*arrays), jax.jit(run).lower(*arrays).as_text()
        with backends.use(name):
            return jax.jit(run)(*arrays), ""

    (found, text), (expected, _) = both(None), both("xla")
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        largest = float(jnp.abs(b).max())
        assert largest > 1e-3
        np.testing.assert_allclose(a, b, atol=tolerance * largest, rtol=0, err_msg=str(i))
    return text


@pytest.mark.parametrize("D", [96, 37])
def test_norm(arithmetic, D):
    x, scale = normal(0, (3, 50, D), (D,))
    text = compare(lambda x, scale: rms_norm(x, scale, 1e-3), x, scale)
    assert "gptoss_norm_gradient" in text


@pytest.mark.parametrize("H", [64, 14])
def test_rotation(arithmetic, H):
    x, angles = normal(1, (2, 45, 3, H), (2, 45, H // 2))
    text = compare(lambda x: rotate(x, 1.3 * jnp.cos(angles), 1.3 * jnp.sin(angles)), x)
    assert text.count("gptoss_rotate") >= 2


@pytest.mark.parametrize("V", [7, 64, 331])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_loss(arithmetic, V, factor):
    """Against float64: XLA's own rounds a log-sum-exp of 60 by 2e-6."""
    logits, weights = normal(2, (3, 40, V), (3, 40))
    targets = jnp.asarray(np.random.default_rng(3).integers(0, V, (3, 40)), jnp.int32)
    weights = jnp.where(weights > 0.8, 0, jnp.abs(weights))
    logits = 20 * logits

    def both(logits):
        return jax.value_and_grad(lambda x: factor * cross_entropy(x, targets, weights))(logits)

    assert "gptoss_cross_entropy" in jax.jit(both).lower(logits).as_text()
    wide, w = np.asarray(logits, np.float64), np.asarray(weights, np.float64)
    own = np.eye(V)[np.asarray(targets)]
    exps = np.exp(wide - wide.max(-1, keepdims=True))
    losses = np.log(exps.sum(-1)) + wide.max(-1) - (own * wide).sum(-1)
    expected = (w * losses).sum(), w[..., None] * (exps / exps.sum(-1, keepdims=True) - own)
    for found, true in zip(jax.jit(both)(logits), expected, strict=True):
        true = factor * true
        np.testing.assert_allclose(found, true, atol=3e-6 * np.abs(true).max(), rtol=0)
    for bad in (jnp.nan, jnp.inf):
        hurt = logits.at[1, 2, V - 1].set(bad)
        assert not jnp.isfinite(jax.value_and_grad(cross_entropy)(hurt, targets, weights)[0])


def test_feed_forward(arithmetic):
    """Biases, routing weights and clamping too."""
    rng = np.random.default_rng(4)
    M, X, E, F, D = 70, 3, 5, 64, 96

    def packed(*shape):
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16)).astype(np.uint8)
        scales = rng.integers(119, 123, blocks.shape[:-1]).astype(np.uint8)
        return MxTensor(jnp.asarray(blocks), jnp.asarray(scales))

    gate_up, down = packed(E, F, 2, D), packed(E, D, F)
    experts = np.stack([rng.permutation(E)[:X] for _ in range(M)])
    experts = jnp.asarray(experts.astype(np.int32))
    x, weights, gate_up_bias, down_bias = normal(5, (M, D), (M, X), (E, F, 2), (E, D))

    def call(x, weights, gate_up_bias, down_bias):
        parts = gate_up, gate_up_bias, down, down_bias
        return expert_mlp(x, weights, experts, *parts, alpha=1.7, limit=1.5)

    text = compare(call, x, weights, gate_up_bias, down_bias, tolerance=1e-5)
    for name in ("swiglu", "swiglu_gradient", "weighted", "weighted_gradient"):
        assert f"@gptoss_{name}(" in text


def test_without_a_gradient_xla_computes():
    x, scale = normal(6, (3, 50, 96), (96,))
    text = jax.jit(lambda x, scale: rms_norm(x, scale, 1e-3)).lower(x, scale).as_text()
    assert "gptoss" not in text


@pytest.mark.parametrize("chunk", [1 << 27, 4 * 29 * 2 * 8])
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_by_chunks(monkeypatch, chunk, frozen):
    """One chunk or four, against all logits at once; supervised positions anywhere."""
    monkeypatch.setattr(objective, "CHUNK_BYTES", chunk)
    x, weights, table = normal(7, (2, 29, 12), (2, 29), (29, 12))
    weights = jnp.where(weights < 0.3, 0, weights)
    targets = jnp.asarray(np.random.default_rng(8).integers(0, 29, (2, 29)), jnp.int32)

    def ours(x, table):
        return 1.5 * objective.cross_entropy({"unembedding": table}, x, targets, weights)

    def plain(x, table):
        with backends.use("xla"):
            logits = model.unembed({"unembedding": table}, x)
        losses = (
            jax.nn.logsumexp(logits, -1)
            - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        )
        return 1.5 * (weights * losses).sum()

    wanted = (0,) if frozen else (0, 1)
    found, expected = (
        jax.jit(jax.value_and_grad(call, argnums=wanted))(x, table) for call in (ours, plain)
    )
    assert float(jax.jit(ours)(x, table)) == pytest.approx(float(expected[0]), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(5, 7, 33), (400, 150, 96), (193, 64, 37)])
def test_dense_products(arithmetic, rows, outputs, inputs):
    x, weight = normal(9, (2, rows, inputs), (outputs, inputs))
    weight = weight / 8  # results of about 1: `compare` takes the cosine of three times these
    text = compare(lambda x, weight: product("BTD,OD->BTO", x, weight), x, weight)
    assert text.count("gptoss_dense") == 2  # forward, and with respect to x


def wide_parts():
    """Each part of wide rows: a function of the rows alone, and rows."""
    D, H, F, E = 2080, 64, 1040, 3
    scale, angles, x, q, h, bias = normal(9, (D,), (7, 1, H // 2), (7, D), (7, 1, 33, H), (7, 2 * F), (E, 2 * F))  # fmt: skip
    experts = jnp.arange(7, dtype=jnp.int32) % E

    def swiglu(h, experts=experts):
        return experts_kernels._biased_swiglu(h, bias, experts, 1.702, 7.0, jnp.bfloat16)

    return {
        "norm": (lambda x: rms_norm(x, scale, 1e-3), x.astype(jnp.bfloat16)),
        "rotate": (
            lambda q: rotate(q, jnp.cos(angles)[: len(q)], jnp.sin(angles)[: len(q)]),
            q.astype(jnp.bfloat16),
        ),
        "swiglu": (lambda h: swiglu(h, experts[: len(h)]), h),
    }


@pytest.mark.parametrize("name", ["norm", "rotate", "swiglu"])
def test_wide_rows_of_bfloat16(arithmetic, name):
    """By kernels without a gradient too, rounded as the definition is but for one in a thousand."""
    call, rows = wide_parts()[name]
    assert f"gptoss_{name}" in jax.jit(call).lower(rows).as_text()
    found = jax.jit(call)(rows)
    with backends.use("xla"):
        expected = jax.jit(call)(rows)
    assert found.dtype == jnp.bfloat16
    assert float((found == expected).mean()) > 0.999
    wide = [np.asarray(x, np.float32) for x in (found, expected)]
    np.testing.assert_allclose(*wide, rtol=2**-7)
    for some in (1, 4):
        np.testing.assert_array_equal(jax.jit(call)(rows[:some]), found[:some])


@pytest.mark.parametrize("name", ["norm", "rotate", "swiglu"])
def test_gradients_of_wide_rows(name):
    call, rows = wide_parts()[name]

    def gradient(rows):
        return jax.grad(lambda x: jnp.sin(call(x).astype(jnp.float32)).sum())(rows)

    found = np.asarray(jax.jit(gradient)(rows), np.float32)
    with backends.use("xla"):
        expected = np.asarray(jax.jit(gradient)(rows), np.float32)
    np.testing.assert_allclose(found, expected, atol=0.02 * abs(expected).max(), rtol=0)


def test_weighted_sum_of_wide_rows(arithmetic):
    y, weights, bias = normal(11, (7, 3, 2080), (7, 3), (4, 2080))
    experts = jnp.arange(21, dtype=jnp.int32).reshape(7, 3) % 4

    def call(y):
        return experts_kernels._weighted_sum(y, weights, bias, experts)

    assert "gptoss_weighted" in jax.jit(call).lower(y).as_text()
    with backends.use("xla"):
        expected = jax.jit(call)(y)
    np.testing.assert_allclose(jax.jit(call)(y), expected, atol=3e-6 * abs(expected).max())


def test_first_place_of_the_largest(arithmetic):
    (x,) = normal(10, (5, 2083))
    x = x.at[1, [2082, 2081]].set(9).at[2, [5, 70]].set(9).at[3].set(-jnp.inf)
    x = x.at[4, 1000:].set(-jnp.inf)
    assert "gptoss_first_largest" in jax.jit(sampling._argmax).lower(x).as_text()
    found = jax.jit(sampling._argmax)(x)
    with backends.use("xla"):
        np.testing.assert_array_equal(found, jax.jit(sampling._argmax)(x))
    assert list(found[1:4]) == [2081, 5, 0]
