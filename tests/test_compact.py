"""Matrices that are held in 12 bits a value: the same bits come back, and the same bits come out of
every product.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_jax as gj
from gptoss_jax import adapters, checkpoint, loading, lora
from gptoss_jax.bench import weights
from gptoss_jax.kernels import cpu
from gptoss_jax.kernels.cpu import compact, experts, library
from gptoss_jax.lora import LoraConfig
from gptoss_jax.ops import LowRank, backends, linear, product

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason="no C++ compiler")
product_of = jax.jit(cpu.compact_product)
grouped = jax.jit(cpu.grouped_product)
# rows, columns: less than a group, an odd number, several groups and a rest; less than a unit (and
# attention's rows, whose sums are made otherwise), a unit and a half, three and four parts
SHAPES = [(35, 64), (5, 192), (16, 128), (35, 2880), (70, 320), (33, 4096)]


def matrix(rng, *shape):
    """With zeros, and values far from all others."""
    values = np.array(rng.normal(size=shape) * 0.02, jnp.bfloat16)
    flat = values.reshape(-1)
    odd = [0.0, -0.0, 1e30, -1e30, 1e-30, 2**-133, 3.0, 1e-9]
    flat[rng.choice(flat.size, len(odd), replace=False)] = np.array(odd, jnp.bfloat16)
    return jnp.asarray(values)


def bits(x):
    return np.asarray(jax.lax.bitcast_convert_type(x, jnp.uint16))


def packed(weight, inputs=1):
    found = compact.packed(weight, inputs)
    assert found is not None
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_comes_back(monkeypatch, shape):
    monkeypatch.setattr(compact, "MOST_EXCEPTIONS", 1)
    weight = matrix(np.random.default_rng(0), *shape)
    found = packed(weight)
    assert (found.shape, found.dtype, len(found)) == (shape, weight.dtype, shape[0])
    np.testing.assert_array_equal(bits(found.released()), bits(weight))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES[:4]), st.integers(0, 2**31), st.integers(0, 16))
def test_any_bits_come_back(shape, seed, random_bits):
    """From rows of equal exponents to rows of any bits at all, most of them exceptions."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 1 << 16, shape) & ((1 << random_bits) - 1)
    weight = jax.lax.bitcast_convert_type(jnp.asarray(drawn ^ 0x3C80, jnp.uint16), jnp.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "MOST_EXCEPTIONS", 1)
        found = packed(weight)
    np.testing.assert_array_equal(bits(found.released()), bits(weight))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 19, 40, 64, 101])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_of_a_product(arithmetic, monkeypatch, shape, rows):
    monkeypatch.setattr(compact, "MOST_EXCEPTIONS", 1)
    rng = np.random.default_rng(1)
    weight = matrix(rng, *shape)
    x = jnp.asarray(rng.normal(size=(rows, shape[1])), jnp.bfloat16)
    expected = grouped(x, jnp.zeros((rows, 1), jnp.int32), weight[None])[:, 0]
    np.testing.assert_array_equal(product_of(x, packed(weight)), expected)


def test_in_float64():
    rng = np.random.default_rng(2)
    weight = jnp.asarray(rng.normal(size=(35, 2880)) * 0.02, jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(3, 2880)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = product_of(x, packed(weight))
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * abs(exact).max())


@pytest.mark.parametrize(
    ("subscripts", "shape", "inputs"),
    [
        ("BTD,NHD->BTNH", (5, 7, 64), 1),
        ("BTNH,DNH->BTD", (9, 4, 48), 2),
        ("BD,VD->BV", (11, 64), 1),
    ],
)
@pytest.mark.parametrize("backend", [None, "xla"])
def test_products_by_letters_and_their_gradients(subscripts, shape, inputs, backend):
    rng = np.random.default_rng(3)
    weight = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    rows = (2, 3)[: subscripts.index(",") - inputs]
    x = jnp.asarray(rng.normal(size=(*rows, *shape[len(shape) - inputs :])), jnp.bfloat16)

    def value_and_gradient(weight):
        return jax.vjp(lambda x: product(subscripts, x, weight), x)

    with backends.use(backend) if backend else backends.use():
        expected, pull = value_and_gradient(weight)
        found, pull_found = value_and_gradient(packed(weight, inputs))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(bits(pull_found(expected)[0]), bits(pull(expected)[0]))


def test_low_rank_additions():
    rng = np.random.default_rng(4)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    weight, bias, x = draw(9, 4, 48), draw(9), draw(2, 3, 4, 48)
    addition = LowRank(
        draw(2, 4, 48), draw(9, 2), jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)
    )

    def value_and_gradient(weight):
        return jax.vjp(lambda x: linear("BTNH,DNH->BTD", x, weight, bias, addition), x)

    (expected, pull), (found, pull_found) = map(value_and_gradient, (weight, packed(weight, 2)))
    np.testing.assert_array_equal(bits(found), bits(expected))
    np.testing.assert_array_equal(bits(pull_found(found)[0]), bits(pull(found)[0]))


def test_what_does_not_pay_stays(monkeypatch):
    rng = np.random.default_rng(5)
    monkeypatch.setattr(library, "arithmetics", lambda: ["avx512_bf16"])
    large = jnp.asarray(rng.normal(size=(1024, 640)), jnp.bfloat16)
    assert cpu.as_compact(large, 1) is not None
    assert cpu.as_compact(large[:100], 1) is None  # small
    assert cpu.as_compact(large.astype(jnp.float32), 1) is None
    assert cpu.as_compact(large.reshape(-1, 32), 1) is None
    spread = large.at[:, ::50].multiply(jnp.bfloat16(1e-8))
    assert cpu.as_compact(spread, 1) is None
    monkeypatch.setattr(library, "arithmetics", lambda: ["avx512", "portable"])
    assert cpu.as_compact(large, 1) is None


@pytest.fixture
def small(monkeypatch):
    """Matrices of gpt-oss-tiny are large enough."""
    monkeypatch.setattr(compact, "LEAST", 0)
    monkeypatch.setattr(experts, "LEAST", 0)
    monkeypatch.setattr(library, "arithmetics", lambda: ["avx512_bf16"])


@pytest.mark.usefixtures("small")
def test_a_loaded_model_computes_the_same(tmp_path):
    plain = gj.load(dtype="bfloat16", experts="released")
    held = gj.load(dtype="bfloat16")
    names = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            held.params, is_leaf=lambda x: isinstance(x, cpu.CompactMatrix)
        )
        if isinstance(leaf, cpu.CompactMatrix)
    }
    layers = range(held.config.num_layers)
    expected = {f"['layers'][{i}]['attention']['{name}']" for i in layers for name in "qkvo"}
    assert names == expected | {"['unembedding']"}
    for layer in held.params["layers"].values():
        assert {type(layer["mlp"][name]) for name in ("gate_up", "down")} == {cpu.CpuExperts}
    prompt = list(range(300, 420))
    np.testing.assert_array_equal(held.logits([prompt])[0], plain.logits([prompt])[0])
    greedy = gj.Sampling(temperature=0)
    one, other = (m.generate(prompt, greedy, 20).tokens for m in (held, plain))
    assert list(one) == list(other)
    back = loading.released(held)
    assert not cpu.compact_matrices(back.params)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), back.params, plain.params)
    assert all(jax.tree.leaves(same))
    assert loading.released(plain) is plain
    checkpoint.save_params(tmp_path / "saved", held.config, held.params)
    _, saved = checkpoint.load_params(tmp_path / "saved")
    same = jax.tree.map(lambda a, b: bool((a == b).all()), saved, plain.params)
    assert all(jax.tree.leaves(same))


@pytest.mark.usefixtures("small")
def test_adapters_on_compact_matrices(tmp_path):
    plain = gj.load(dtype="bfloat16", experts="released")
    held = gj.load(dtype="bfloat16")
    settings = LoraConfig(rank=2, targets=("attention", "experts", "unembedding"))
    tree = lora.init(held.config, settings, jax.random.key(0))
    tree = jax.tree.map(lambda x: jnp.ones_like(x) / 64, tree)
    fingerprint = adapters.fingerprint(plain.config, plain.params)
    assert adapters.fingerprint(held.config, held.params) == fingerprint
    adapters.save(tmp_path, tree, settings, held.config, fingerprint=fingerprint, source=plain.name)
    found, expected = (loading.with_adapters(m, {"ones": tmp_path}) for m in (held, plain))
    assert cpu.compact_matrices(found.params)
    assert isinstance(found.params["layers"][0]["mlp"]["down"], cpu.CpuExperts)
    prompt = list(range(300, 340))
    with_it, without = (found.logits([prompt], name)[0] for name in ("ones", None))
    np.testing.assert_array_equal(with_it, expected.logits([prompt], "ones")[0])
    assert (np.asarray(with_it) != np.asarray(without)).any()


def test_random_weights_have_as_many_exceptions_as_normal_ones():
    values = np.empty((256, 2880), jnp.bfloat16)
    weights.fill(values, "q", np.random.SFC64(0))
    drawn = np.random.default_rng(0).normal(0, weights.DEVIATION, values.shape)
    found, normal = (len(packed(jnp.asarray(x, jnp.bfloat16)).places) for x in (values, drawn))
    assert found == pytest.approx(normal, rel=0.5)
    assert found > 20
