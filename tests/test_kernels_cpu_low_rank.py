"""The CPU's products with low-rank additions and their gradients, against sums in float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.kernels.cpu import library
from gptoss_jax.ops import LowRank, backends, linear
from gptoss_jax.ops.linear import PACKED, Base, adapted_product

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason="no C++ compiler")


def chosen(z, experts):
    """Of each row's experts; zeros of nobody."""
    return jnp.concatenate([z, jnp.zeros_like(z[:1])])[experts]


# A product and its gradients as sums of their definition, so that what is tested is what is added.
BASE = Base(
    lambda x, experts, w, trained: jnp.einsum(
        "MXOI,MI->MXO", chosen(w, experts), x, preferred_element_type=jnp.float32
    ),
    lambda g, experts, w: jnp.einsum(
        "MXOI,MXO->MXI", chosen(w, experts), g, preferred_element_type=jnp.float32
    ),
    lambda g, x, w: None,
)


def case(M, X, E, inputs, outputs, R, dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (E, outputs, inputs), (M, inputs), (E, R, inputs), (E, outputs, R), (M, R), (outputs,)
    weight, x, a, b, gain, bias = (rng.normal(size=shape) for shape in shapes)
    experts = jnp.asarray(rng.integers(0, E + 1, (M, X)).astype(np.int32))  # E is nobody
    arrays = [jnp.asarray(z, dtype) for z in (x, a, b)]
    arrays += [jnp.asarray(z, jnp.float32) for z in (gain, bias)]
    return jnp.asarray(weight, dtype), arrays, experts


def exact(experts, weight, x, a, b, gain, bias):
    here = (experts < len(a))[..., None]
    a, b, weight = (chosen(z, experts) for z in (a, b, weight))
    h = jnp.einsum("MXRI,MI->MXR", a, x) * gain[:, None]
    out = jnp.einsum("MXOI,MI->MXO", weight, x) + jnp.einsum("MXOR,MXR->MXO", b, h)
    return out + jnp.where(here, bias, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("M", "X", "E", "inputs", "outputs", "R"),
    [(1, 4, 5, 96, 40, 8), (7, 2, 3, 33, 17, 5), (700, 2, 3, 64, 48, 8), (90, 1, 1, 20, 30, 19)],
)
def test_sums_and_gradients_in_float64(arithmetic, M, X, E, inputs, outputs, R, dtype):
    base, arrays, experts = case(M, X, E, inputs, outputs, R, dtype)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(M, X, outputs)), jnp.float32)

    @jax.jit
    def run(*arrays):
        call = functools.partial(adapted_product, BASE)
        out, pull = jax.vjp(lambda x, *rest: call(x, experts, base, *rest), *arrays)
        return out, *pull(weight)

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z.astype(jnp.float32), np.float64)) for z in (base, *arrays)]
        out, pull = jax.vjp(functools.partial(exact, np.asarray(experts), wide[0]), *wide[1:])
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
    weight, (x, a, b, gain, bias), experts = case(300, 2, 3, 64, 48, 8, jnp.float32)
    call = jax.jit(functools.partial(adapted_product, PACKED))
    whole = call(x, experts, weight, a, b, gain, bias)
    for rows in (slice(0, 1), slice(5, 40), slice(100, 300)):
        found = call(x[rows], experts[rows], weight, a, b, gain[rows], bias)
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


def test_weights_that_lie_otherwise_are_computed_by_the_reference():
    """Inputs first, as many as outputs: a kernel that took them for rows would be wrong unseen."""
    rng = np.random.default_rng(4)
    x, weight, a, b, gain = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 5, 8), (8, 8), (3, 8), (8, 3), (1, 3))
    )
    out = jax.jit(lambda *parts: linear("BTD,DN->BTN", x, weight, None, LowRank(*parts)))
    want = x @ weight + ((x @ a.T) * gain[None]) @ b.T
    np.testing.assert_allclose(out(a, b, gain), want, rtol=1e-5, atol=1e-5)
