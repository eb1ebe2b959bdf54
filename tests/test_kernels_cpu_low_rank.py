"""The CPU's low-rank additions and their gradients, against sums in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.cpu import library
from gptoss_jax.ops import LowRank, backends, linear
from gptoss_jax.ops.linear import grouped_low_rank

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason="no C++ compiler")


@pytest.fixture(params=library.arithmetics())
def arithmetic(request):
    library.choose(request.param)
    yield request.param
    library.choose(library.arithmetics()[0])


def case(M, X, E, inputs, outputs, R, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (M, X, outputs), (M, inputs), (E, R, inputs), (E, outputs, R), (M, R)
    y, x, a, b, gain = (rng.normal(size=shape) for shape in shapes)
    experts = jnp.asarray(rng.integers(0, E + 1, (M, X)).astype(np.int32))  # E is nobody
    arrays = [jnp.asarray(y, jnp.float32)]
    arrays += [jnp.asarray(z, dtype) for z in (x, a, b)] + [jnp.asarray(gain, jnp.float32)]
    return arrays, experts


def exact(experts, y, x, a, b, gain):
    a, b = (jnp.concatenate([z, jnp.zeros_like(z[:1])])[experts] for z in (a, b))
    h = jnp.einsum("MXRI,MI->MXR", a, x) * gain[:, None]
    return y + jnp.einsum("MXOR,MXR->MXO", b, h)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("M", "X", "E", "inputs", "outputs", "R"),
    [(1, 4, 5, 96, 40, 8), (7, 2, 3, 33, 17, 5), (700, 2, 3, 64, 48, 8), (90, 1, 1, 20, 30, 19)],
)
def test_sums_and_gradients_in_float64(arithmetic, M, X, E, inputs, outputs, R, dtype):
    arrays, experts = case(M, X, E, inputs, outputs, R, dtype)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(M, X, outputs)), jnp.float32)

    @jax.jit
    def run(y, x, a, b, gain):
        out, pull = jax.vjp(
            lambda y, x, a, b, gain: grouped_low_rank(y, x, experts, a, b, gain), y, x, a, b, gain
        )
        return out, *pull(weight)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z.astype(jnp.float32), np.float64)) for z in arrays]
        out, pull = jax.vjp(lambda *arrays: exact(np.asarray(experts), *arrays), *wide)
        expected = [
            np.asarray(z) for z in (out, *pull(jnp.asarray(np.asarray(weight), jnp.float64)))
        ]
    for i, (found, want) in enumerate(zip(run(*arrays), expected, strict=True)):
        rounded = found.dtype == jnp.bfloat16
        tolerance = (4e-3 if rounded else 3e-6) * abs(want).max()
        np.testing.assert_allclose(
            np.asarray(found.astype(jnp.float32)), want, atol=tolerance, rtol=0, err_msg=str(i)
        )


def test_a_row_does_not_depend_on_the_others(arithmetic):
    (y, x, a, b, gain), experts = case(300, 2, 3, 64, 48, 8, jnp.float32)
    call = jax.jit(grouped_low_rank)
    whole = call(y, x, experts, a, b, gain)
    for rows in (slice(0, 1), slice(5, 40), slice(100, 300)):
        found = call(y[rows], x[rows], experts[rows], a, b, gain[rows])
        np.testing.assert_array_equal(found, whole[rows])


@pytest.mark.parametrize("gains", [1, 2])
def test_dense_additions_as_the_reference(gains):
    """Gains of all rows, or of each row of the batch."""
    rng = np.random.default_rng(3)
    x, weight, bias, a, b, gain = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 5, 3, 4), (6, 3, 4), (6,), (7, 3, 4), (6, 7), (gains, 7))
    )

    def gradients(name):
        def total(x, weight, bias, a, b, gain):
            out = linear("BTNH,DNH->BTD", x, weight, bias, LowRank(a, b, gain))
            return jnp.sin(out).sum()

        with backends.use(product=name) if name else contextlib.nullcontext():
            return jax.jit(jax.value_and_grad(total, argnums=range(6)))(x, weight, bias, a, b, gain)

    for found, want in zip(*map(jax.tree.leaves, (gradients(None), gradients("xla"))), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5 * float(abs(want).max()))
