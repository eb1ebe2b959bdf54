"""LoRA's arithmetic: additions against merged weights, gradients against autodiff through the
dequantised ones, on one device and on meshes; targets, ranks, refusals.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gptoss_jax import lora, model, sharding
from gptoss_jax.cache import make_cache
from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import LoraConfig
from gptoss_jax.mxfp4 import MxTensor

CONFIG, SMALL = tiny.CONFIG, tiny.SMALL  # shapes; what is computed
ALL = LoraConfig(rank=5, alpha=7.0, targets=("all",), expert_rank=3)
# Axes of W, from those of a and b: the released orientation (outputs first).
PRODUCTS = {
    "q": "NHR,RD->NHD", "k": "KHR,RD->KHD", "v": "KHR,RD->KHD", "o": "DR,RNH->DNH",
    "gate_up": "EFPR,ERD->EFPD", "down": "EDR,ERF->EDF", "embedding": "DR,RV->VD", "unembedding": "VR,RD->VD",
}  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, SMALL.vocab_size, (2, 40)).astype(np.int32)


def trained(config=ALL, seed=1):
    """An adapter whose b is not zero."""
    adapter = lora.init(SMALL, config, jax.random.key(seed))
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x if x.any() else jnp.asarray(0.05 * generator.normal(size=x.shape), jnp.float32),
        adapter,
    )


def merged(params, adapter, scale):
    """W + scale b a, by einsum on dequantised weights: written here, not the library's own."""

    def walk(params, adapter):
        if set(adapter) == {"a", "b"}:
            raise AssertionError
        out = dict(params)
        for key, child in adapter.items():
            if set(child) == {"a", "b"}:
                weight = params[key]
                weight = weight.dequantize(jnp.float32) if isinstance(weight, MxTensor) else weight
                out[key] = weight + scale * jnp.einsum(PRODUCTS[key], child["b"], child["a"])
            else:
                out[key] = walk(params[key], child)
        return out

    return walk(params, adapter)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(TOKENS)


def test_every_axis_of_an_adapter_is_where_its_letters_say():
    shapes = lora.shapes(CONFIG, ALL)
    layer = shapes["layers"][2]
    assert layer["attention"]["q"]["a"].shape == (5, 96)
    assert layer["attention"]["q"]["b"].shape == (15, 14, 5)
    assert layer["attention"]["o"]["a"].shape == (5, 15, 14)
    assert layer["mlp"]["gate_up"]["a"].shape == (12, 3, 96)
    assert layer["mlp"]["gate_up"]["b"].shape == (12, 224, 2, 3)
    assert layer["mlp"]["down"]["a"].shape == (12, 3, 224)
    assert layer["mlp"]["down"]["b"].shape == (12, 96, 3)
    assert shapes["unembedding"]["b"].shape == (331, 5)


def test_a_new_adapter_changes_no_logit_by_a_bit(tokens):
    adapter = lora.init(SMALL, ALL, jax.random.key(0))
    for packed in (True, False):
        params = tiny.params(SMALL, packed)
        plain, _ = model.forward(params, tokens, config=SMALL)
        ours, _ = model.forward(params, tokens, config=SMALL, added=lora.additions(adapter, ALL))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(plain))


@pytest.mark.parametrize(
    "target", ["q", "k", "v", "o", "gate_up", "down", "embedding", "unembedding", "all"]
)
def test_additions_equal_merged_weights(tokens, target):
    config = dataclasses.replace(ALL, targets=(target,))
    adapter, params = trained(config), tiny.params(SMALL)
    ours, _ = model.forward(params, tokens, config=SMALL, added=lora.additions(adapter, config))
    want, _ = model.forward(merged(params, adapter, config.scale), tokens, config=SMALL)
    plain, _ = model.forward(params, tokens, config=SMALL)
    assert float(jnp.abs(want - plain).max()) > 1e-2
    np.testing.assert_allclose(np.asarray(ours), np.asarray(want), atol=2e-5)


def test_decoding_with_an_adapter_equals_the_whole_sequence(tokens):
    adapter, params = lora.additions(trained(), ALL), tiny.params(SMALL)
    want, _ = model.forward(params, tokens, config=SMALL, added=adapter)
    cache = make_cache(SMALL, 2, 64, jnp.float32)
    logits, cache = model.forward(params, tokens[:, :37], cache, config=SMALL, added=adapter)
    for t in range(37, 40):
        logits, cache = model.forward(
            params, tokens[:, t : t + 1], cache, config=SMALL, added=adapter
        )
        np.testing.assert_allclose(np.asarray(logits[:, 0]), np.asarray(want[:, t]), atol=2e-5)


def loss_of(config, tokens):
    weights = jnp.asarray(
        np.random.default_rng(5).normal(size=(*tokens.shape, SMALL.vocab_size)), jnp.float32
    )

    def loss(params, adapter, remat):
        added = lora.additions(adapter, config)
        x, _, _ = model.hidden(params, tokens, config=SMALL, added=added, remat=remat)
        return (weights * model.unembed(params, x, added)).mean() * 100

    return loss


@functools.lru_cache
def through_merged(length):
    """Gradients of an adapter from autodiff through dequantised weights that it was added to."""
    params, ids = tiny.params(SMALL), jnp.asarray(TOKENS[:, :length])

    def loss(adapter):
        whole = merged(params, adapter, ALL.scale)
        x, _, _ = model.hidden(whole, ids, config=SMALL)
        logits = model.unembed(whole, x)
        weights = jnp.asarray(np.random.default_rng(5).normal(size=logits.shape), jnp.float32)
        return (weights * logits).mean() * 100

    return jax.jit(jax.grad(loss), compiler_options=tiny.QUICK)(trained())


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("length", [3, 40])  # few pairs: one by one; many: grouped
def test_gradients_through_packed_weights_are_those_through_dequantised_merged_ones(length, remat):
    """d/da and d/db from d/dW of the merged weight: dL/db = s dW a, dL/da = s b dW."""
    loss = loss_of(ALL, jnp.asarray(TOKENS[:, :length]))
    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=2, compiler_options=tiny.QUICK)
    ours, want = gradient(tiny.params(SMALL), trained(), remat), through_merged(length)
    for (path, g), w in zip(
        jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(want), strict=True
    ):
        scale = float(jnp.abs(w).max())
        assert scale > 0, path
        np.testing.assert_allclose(
            np.asarray(g), np.asarray(w), atol=2e-4 * scale, err_msg=str(path)
        )


MOST = dataclasses.replace(ALL, targets=("attention", "experts"))
EIGHT = np.concatenate([TOKENS] * 4)


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
@functools.partial(jax.value_and_grad, argnums=1)
def squares(params, adapter, tokens):
    added = lora.additions(adapter, MOST)
    logits, _ = model.apply(params, tokens, config=SMALL, added=added)
    return (logits**2).mean()


@functools.lru_cache
def of_one_device():
    """squares and their gradient."""
    found, gradients = squares(tiny.params(SMALL), trained(MOST), jnp.asarray(EIGHT))
    return float(found), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize(
    "sizes",
    [{"expert": 4, "data": 2}, {"fsdp": 2, "expert": 2, "data": 2}, {"expert": 2, "fsdp": 4}],
)
def test_logits_and_gradients_on_a_mesh_are_those_of_one_device(sizes):
    params, (want, gradients) = tiny.params(SMALL), of_one_device()
    mesh = sharding.make_mesh(sizes, SMALL)
    put = jax.device_put(params, sharding.parameter_shardings(model.letters(SMALL), params, mesh))
    spread = jax.device_put(trained(MOST), lora.shardings(SMALL, MOST, mesh))
    with jax.set_mesh(mesh):
        found, ours = squares(put, spread, sharding.put(EIGHT, "BT", mesh))
    np.testing.assert_allclose(float(found), want, rtol=1e-5)
    for g, w in zip(jax.tree.leaves(ours), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(
            np.asarray(g), np.asarray(w), atol=2e-5 * float(jnp.abs(w).max()) + 1e-12
        )


def test_rows_with_other_gains_use_other_parts_of_the_rank(tokens):
    """Two adapters stacked along R, each row with its own: what serving several at once does."""
    config = MOST
    first, second = (trained(config, seed) for seed in (1, 2))
    params = tiny.params(SMALL)

    def both(a, b):
        def one(path, x, y):
            return jnp.concatenate([x, y], axis=_rank_axis(path))

        return jax.tree_util.tree_map_with_path(one, a, b)

    def _rank_axis(path):
        letters = dict(zip("ab", lora.AXES[path[-2].key], strict=True))[path[-1].key]
        return letters.index("R")

    def gains(_, pair):
        half = pair["b"].shape[-1] // 2
        table = np.zeros((2, 2 * half), np.float32)
        table[0, :half] = table[1, half:] = config.scale
        return lora.LowRank(pair["a"], pair["b"], jnp.asarray(table))

    stacked = lora.each_pair(gains, both(first, second))
    ours, _ = model.forward(params, tokens, config=SMALL, added=stacked)
    for row, adapter in enumerate((first, second)):
        want, _ = model.forward(params, tokens, config=SMALL, added=lora.additions(adapter, config))
        np.testing.assert_allclose(np.asarray(ours[row]), np.asarray(want[row]), atol=2e-5)


def test_targets_layers_and_ranks():
    assert LoraConfig(targets=("gate*", "o")).names() == ("o", "gate_up")
    assert {p[1] for p in lora.paths(CONFIG, LoraConfig(layers=(1, 3)))} == {1, 3}
    per_layer = 5 * (96 + 15 * 14) + 2 * 5 * (96 + 3 * 14) + 5 * (15 * 14 + 96)
    assert (
        lora.count(lora.shapes(CONFIG, LoraConfig(rank=5, targets=("attention",)))) == 4 * per_layer
    )
    assert LoraConfig(rank=16, alpha=8, rslora=True).scale == 2
    assert LoraConfig(rank=16, alpha=8).scale == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_proj",)}, "target 'q_proj' matches nothing: use attention, experts, all, or names and patterns of q, k, v, o, gate_up"),
        ({"targets": ()}, "needs a target"),
        ({"layers": (4,)}, "layer 4: the model's are 0 to 3"),
        ({"layers": ()}, "layers are empty"),
        ({"rank": 0}, "rank of 0: expected a positive integer"),
        ({"alpha": -1.0}, "alpha of -1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(GptOssError, match=message):
        lora.paths(CONFIG, LoraConfig(**settings))
