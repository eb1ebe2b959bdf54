"""Adapters on disk and in requests: forms there and back, what is refused, several at once."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from gptoss_jax import adapters, loading, lora, model, sharding, steps
from gptoss_jax.adapters import peft
from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import LoraConfig
from gptoss_jax.sampling import Sampling

CONFIG = tiny.CONFIG
SQUARE = dataclasses.replace(CONFIG, intermediate_size=CONFIG.hidden_size)
SMALL = tiny.SMALL
BOTH = LoraConfig(rank=4, alpha=6.0)
GREEDY = Sampling(temperature=0)


def drawn(lora_config, config=CONFIG, seed=0):
    """An adapter whose every value is another."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.05 * generator.normal(size=leaf.shape)).astype(np.float32),
        lora.shapes(config, lora_config),
    )


def exported(folder, tree, lora_config, config=CONFIG):
    peft.export(folder, adapters.Adapter(tree, lora_config), config)
    return load_file(folder / peft.TENSORS), json.loads((folder / peft.CONFIG).read_text())


def rewrite(folder, tensors=None, **settings):
    if tensors is not None:
        save_file(tensors, folder / peft.TENSORS)
    raw = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(raw | settings))


def products(tree, scale):
    """scale b a of every weight."""
    return {
        path: scale * np.einsum(lora.PRODUCTS[path[-1]], pair["b"], pair["a"])
        for path, pair in lora.pairs_of(tree)
    }


def assert_same_products(one, other):
    left, right = (products(a.tree, a.lora.scale) for a in (one, other))
    assert left.keys() == right.keys()
    for path, product in left.items():
        np.testing.assert_allclose(product, right[path], rtol=1e-5, atol=1e-7, err_msg=str(path))


@pytest.mark.parametrize(
    "config",
    [
        BOTH,
        LoraConfig(rank=3, targets=("all",), expert_rank=2, rslora=True, layers=(1, 3)),
        LoraConfig(rank=2, targets=("experts",), quantization_aware=True),
    ],
)
def test_our_form_there_and_back(tmp_path, config):
    tree = drawn(config)
    adapters.save(tmp_path / "run" / "adapter", tree, config, CONFIG, fingerprint="f", source="s")
    adapters.save(tmp_path / "run" / "adapter", tree, config, CONFIG, fingerprint="f", source="s")
    found = adapters.load(tmp_path / "run", CONFIG)  # of a run the folder in it
    assert (found.lora, found.source, found.fingerprint) == (config, "s", "f")
    assert jax.tree.structure(found.tree) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(found.tree), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["adapter"]


@pytest.mark.parametrize("config", [CONFIG, SQUARE])
def test_peft_layout_by_its_own_formula(tmp_path, config):
    """delta[e, i, o] = scale sum_r B.reshape(o, r, E) A.reshape(E, r, i), as ParamWrapper says."""
    settings = dataclasses.replace(BOTH, expert_rank=3)
    tree = drawn(settings, config)
    tensors, raw = exported(tmp_path / "peft", tree, settings, config)
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (4, 6, False)
    assert raw["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert raw["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    E, layer = config.num_experts, "base_model.model.model.layers.2."
    deltas = products(tree, settings.scale)
    for inner, name, width in ((".base_layer", "gate_up", -1), ("", "down", config.hidden_size)):
        a = tensors[f"{layer}mlp.experts{inner}.lora_A.weight"]
        b = tensors[f"{layer}mlp.experts{inner}.lora_B.weight"]
        found = 1.5 * np.einsum(
            "ore,eri->eio", b.reshape(len(b), 4, E), a.reshape(E, 4, a.shape[1])
        )
        want = deltas["layers", 2, "mlp", name]
        want = want.reshape(E, width if name == "down" else len(b), -1)
        np.testing.assert_allclose(found, want.transpose(0, 2, 1), atol=1e-6)
    found = (
        1.5
        * tensors[f"{layer}self_attn.o_proj.lora_B.weight"]
        @ tensors[f"{layer}self_attn.o_proj.lora_A.weight"]
    )
    want = deltas["layers", 2, "attention", "o"].reshape(config.hidden_size, -1)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (LoraConfig(rank=4, alpha=6.0, expert_rank=2), SQUARE),
        (LoraConfig(rank=4, alpha=6.0, rslora=True, targets=("all",)), CONFIG),
        (LoraConfig(rank=2, alpha=6.0, expert_rank=5, layers=(0, 2)), CONFIG),
        (LoraConfig(rank=4, targets=("down",)), SQUARE),
        (LoraConfig(rank=4, targets=("gate_up", "q"), layers=(3,)), CONFIG),
    ],
)
def test_peft_there_and_back(tmp_path, settings, config):
    given = adapters.Adapter(drawn(settings, config), settings, "owner/base", "abc")
    peft.export(tmp_path / "peft", given, config)
    found = adapters.load(tmp_path / "peft", config)
    assert_same_products(found, given)
    assert (found.source, found.fingerprint) == ("owner/base", "abc")
    again = peft.export(tmp_path / "again", found, config)
    assert_same_products(adapters.load(again, config), given)


def test_ranks_and_alphas_of_single_modules(tmp_path):
    settings = LoraConfig(rank=4, alpha=6.0, targets=("attention",))
    given = adapters.Adapter(drawn(settings), settings)
    tensors, _ = exported(tmp_path / "p", given.tree, settings)
    for key in [key for key in tensors if "k_proj" in key]:
        tensors[key] = tensors[key][:2].copy() if "lora_A" in key else tensors[key][:, :2].copy()
    rewrite(tmp_path / "p", tensors, rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 5.0})
    found = adapters.load(tmp_path / "p", CONFIG)
    for path, product in products(found.tree, found.lora.scale).items():
        pair = given.tree["layers"][path[1]]["attention"][path[-1]]
        a, b, scale = pair["a"], pair["b"], 1.5
        if path[-1] == "k":
            a, b, scale = a[:2], b[..., :2], 2.5
        want = scale * np.einsum(lora.PRODUCTS[path[-1]], b, a)
        np.testing.assert_allclose(product, want, rtol=1e-5, atol=1e-7)


def test_keys_of_others(tmp_path):
    given = adapters.Adapter(drawn(BOTH), BOTH)
    tensors, _ = exported(tmp_path / "p", given.tree, BOTH)
    unsloth, E = {}, CONFIG.num_experts
    for key, value in tensors.items():
        stem, _, end = key.partition(".mlp.experts")
        if not end:
            unsloth[key.replace(".weight", ".default.weight")] = value
            continue
        name, part = "gate_up" if "base_layer" in end else "down", end[-8]
        for e in range(E):
            one = (
                value.reshape(E, 4, -1)[e]
                if part == "A"
                else value.reshape(len(value), 4, E)[:, :, e]
            )
            unsloth[f"{stem}.mlp.experts.{name}_projs.{e}.lora_{part}.weight"] = np.array(one)
    rewrite(tmp_path / "p", unsloth, target_parameters=None)
    assert_same_products(adapters.load(tmp_path / "p", CONFIG), given)
    unsloth.pop("base_model.model.model.layers.1.mlp.experts.down_projs.7.lora_B.weight")
    rewrite(tmp_path / "p", unsloth)
    with pytest.raises(GptOssError, match=r"lora_B of .*1.mlp.experts.down_proj of experts \[7\]"):
        adapters.load(tmp_path / "p", CONFIG)


def test_what_peft_wrote_transposed_is_refused(tmp_path):
    settings = LoraConfig(rank=4, targets=("down",))
    exported(tmp_path / "down", drawn(settings, SQUARE), settings, SQUARE)
    adapters.load(tmp_path / "down", SQUARE)
    rewrite(tmp_path / "down", peft_version="0.19.0")
    with pytest.raises(GptOssError, match=r"written by peft 0.19.0, which exchanged inputs"):
        adapters.load(tmp_path / "down", SQUARE)
    # gate_up_proj is never square: it tells that this one is right
    exported(tmp_path / "both", drawn(BOTH, SQUARE), BOTH, SQUARE)
    rewrite(tmp_path / "both", peft_version="0.19.0")
    adapters.load(tmp_path / "both", SQUARE)
    tensors, _ = exported(tmp_path / "swapped", drawn(BOTH, SQUARE), BOTH, SQUARE)
    swapped = {
        key: np.ascontiguousarray(tensors[_other(key)].T) if "experts" in key else value
        for key, value in tensors.items()
    }
    rewrite(tmp_path / "swapped", swapped, peft_version="0.19.0")
    with pytest.raises(GptOssError, match=r"written by peft 0\.19\.0"):
        adapters.load(tmp_path / "swapped", SQUARE)
    rewrite(tmp_path / "swapped", peft_version="0.21.2")
    with pytest.raises(GptOssError, match="do not fit this model"):
        adapters.load(tmp_path / "swapped", SQUARE)
    attention = LoraConfig(rank=4, targets=("attention",))
    exported(tmp_path / "attention", drawn(attention), attention)
    rewrite(tmp_path / "attention", peft_version="0.19.0")
    adapters.load(tmp_path / "attention", CONFIG)


def _other(key):
    return key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "type 'LOHA': only LoRA"),
        ({"use_dora": True}, "use_dora is set: DoRA is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"r": 8}, r"has rank 4, adapter_config.json says 8"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tmp_path, settings, message):
    exported(tmp_path / "p", drawn(BOTH), BOTH)
    rewrite(tmp_path / "p", **settings)
    with pytest.raises(GptOssError, match=message):
        adapters.load(tmp_path / "p", CONFIG)


def test_keys_that_are_none_are_refused(tmp_path):
    tensors, _ = exported(tmp_path / "p", drawn(BOTH), BOTH)
    stem = "base_model.model.model.layers.0."
    for key, message in (
        (f"{stem}mlp.router.lora_A.weight", "mlp.router.lora_A.weight' is no LoRA of a weight"),
        (f"{stem}self_attn.q_proj.weight", "q_proj.weight' is no LoRA"),
        (stem.replace(".0.", ".30.") + "self_attn.q_proj.lora_A.weight", "is of layer 30, this model's are 0 to 3"),
    ):  # fmt: skip
        rewrite(tmp_path / "p", {**tensors, key: np.zeros((4, 96), np.float32)})
        with pytest.raises(GptOssError, match=message):
            adapters.load(tmp_path / "p", CONFIG)
    tensors.pop(f"{stem}self_attn.q_proj.lora_B.weight")
    rewrite(tmp_path / "p", tensors)
    with pytest.raises(GptOssError, match=r"lora_B of .*q_proj is missing"):
        adapters.load(tmp_path / "p", CONFIG)
    only = LoraConfig(rank=4, targets=("down",))
    exported(tmp_path / "only", drawn(only), only)
    rewrite(tmp_path / "only", target_parameters=None)
    with pytest.raises(GptOssError, match="no target_parameters that say"):
        adapters.load(tmp_path / "only", CONFIG)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    adapters.save(tmp_path / "a", drawn(BOTH), BOTH, CONFIG, fingerprint="1f", source="o/gpt-oss")
    with pytest.raises(
        GptOssError, match=r"on another base \(o/gpt-oss\), of fingerprint 1f; .* is 2e"
    ):
        adapters.load(tmp_path / "a", CONFIG, fingerprint="2e")
    smaller = dataclasses.replace(CONFIG, num_layers=2, layer_types=CONFIG.layer_types[:2])
    with pytest.raises(
        GptOssError, match="for o/gpt-oss, whose num_layers is 4; this model's is 2"
    ):
        adapters.load(tmp_path / "a", smaller)
    wider = dataclasses.replace(CONFIG, hidden_size=128)
    exported(tmp_path / "p", drawn(BOTH), BOTH)
    with pytest.raises(GptOssError, match="do not fit this model"):
        adapters.load(tmp_path / "p", wider)
    with pytest.raises(GptOssError, match="no such folder"):
        adapters.load(tmp_path / "none", CONFIG)
    with pytest.raises(GptOssError, match=r"no adapter.json and no adapter_config.json"):
        adapters.load(tmp_path, CONFIG)
    (tmp_path / "a" / "adapter.safetensors").unlink()
    with pytest.raises(GptOssError, match=r"adapter\.safetensors: no such file"):
        adapters.load(tmp_path / "a", CONFIG)


def test_fingerprints():
    params = tiny.params()
    mine = adapters.fingerprint(CONFIG, params)
    plain = jax.tree.map(
        lambda x: x.dequantize(jnp.float32) if hasattr(x, "dequantize") else x,
        params,
        is_leaf=lambda x: hasattr(x, "dequantize"),
    )
    assert adapters.fingerprint(CONFIG, plain) == mine
    assert adapters.fingerprint(CONFIG, jax.tree.map(_to_bfloat16, params)) == mine
    assert adapters.fingerprint(CONFIG, tiny.params(seed=5)) != mine
    mesh = sharding.make_mesh({"expert": 2, "fsdp": 4}, CONFIG)
    put = jax.device_put(params, sharding.parameter_shardings(model.letters(CONFIG), params, mesh))
    with jax.set_mesh(mesh):
        assert adapters.fingerprint(CONFIG, put) == mine


def _to_bfloat16(x):
    return x if x.dtype == jnp.uint8 else x.astype(jnp.bfloat16)


THREE = {
    "one": LoraConfig(rank=4, alpha=8.0),
    "two": LoraConfig(rank=2, alpha=9.0, targets=("q", "down", "unembedding", "embedding")),
    "three": LoraConfig(rank=3, alpha=6.0, targets=("experts",), layers=(1,)),
}
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
CHOSEN = ["one", None, "three", "two"]


def small(**changes):
    return tiny.model(config=SMALL, params=tiny.params(SMALL), **changes)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(THREE.items()):
        tree = jax.tree.map(lambda x: 3 * x, drawn(config, SMALL, seed=number))
        adapters.save(folder / name, tree, config, SMALL)
    return loading.with_adapters(small(), {name: folder / name for name in THREE}), folder


def test_every_row_has_its_own_adapter(served):
    ours, folder = served
    mixed = ours.logits(PROMPTS, adapter=CHOSEN)
    plain = small().logits(PROMPTS)
    for row, name in enumerate(CHOSEN):
        tokens = jnp.asarray([PROMPTS[row]], jnp.int32)
        added = None
        if name:
            adapter = adapters.load(folder / name, SMALL)
            added = lora.additions(adapter.tree, adapter.lora)
        want, _ = model.forward(tiny.params(SMALL), tokens, config=SMALL, added=added)
        np.testing.assert_allclose(mixed[row], want[0], atol=2e-5)
        assert (float(jnp.abs(mixed[row] - plain[row]).max()) > 1e-2) == (name is not None)


def test_a_batch_of_adapters_generates_what_each_does_alone_without_recompiling(served):
    ours, _ = served
    sampling = dataclasses.replace(GREEDY, ignore_eos=True)

    def run(names):
        return ours.generate(PROMPTS, sampling, 12, adapter=names)

    mixed = run(CHOSEN)
    before = steps.prefill._cache_size(), steps.decode._cache_size(), steps.start._cache_size()
    for name in (None, *THREE):
        alone = run(name)
        for row, chosen in enumerate(CHOSEN):
            if chosen == name:
                assert alone[row].tokens == mixed[row].tokens
    assert len({tuple(c.tokens) for c in (run(n)[0] for n in (None, *THREE))}) > 1
    after = steps.prefill._cache_size(), steps.decode._cache_size(), steps.start._cache_size()
    assert after == before
    several = ours.generate(PROMPTS[3], dataclasses.replace(sampling, n=4), 12, adapter="two")
    assert [c.tokens for c in several] == [mixed[3].tokens] * 4
    assert steps.decode._cache_size() == before[1]


def test_on_a_mesh(served):
    ours, folder = served
    mesh = sharding.make_mesh({"expert": 2, "data": 2, "tensor": 1, "fsdp": 2}, SMALL)
    params = tiny.params(SMALL)
    put = jax.device_put(params, sharding.parameter_shardings(model.letters(SMALL), params, mesh))
    spread = loading.with_adapters(
        tiny.model(config=SMALL, params=put, mesh=mesh), {name: folder / name for name in THREE}
    )
    for one, other in zip(
        spread.logits(PROMPTS, adapter=CHOSEN), ours.logits(PROMPTS, adapter=CHOSEN), strict=True
    ):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-5)


def test_unknown_names_are_refused_with_those_there_are(served):
    ours, _ = served
    with pytest.raises(GptOssError, match="no adapter 'four': loaded are one, two, three; load"):
        ours.generate("a", adapter="four")
    with pytest.raises(GptOssError, match="2 adapters for 4 prompts"):
        ours.logits(PROMPTS, adapter=["one", "two"])
    with pytest.raises(GptOssError, match="no adapter 'one': none is loaded"):
        tiny.model().stream("a", adapter="one")
