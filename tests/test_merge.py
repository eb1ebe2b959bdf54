"""Adapters merged into checkpoints: what is added, what stays byte for byte, what rounding leaves;
training against the rounding; the command.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from gptoss_jax.convert import export, merge
from test_adapters import drawn, products

from gptoss_jax import adapters, lora, model, mxfp4, sharding
from gptoss_jax.checkpoint import load_params, stored_tree
from gptoss_jax.checkpoint.safetensors_file import read_header
from gptoss_jax.cli.main import main
from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import LoraConfig
from gptoss_jax.mxfp4 import MxTensor

CONFIG = tiny.CONFIG
ALL = LoraConfig(rank=4, alpha=6.0, targets=("all",), expert_rank=3)
ATTENTION = LoraConfig(rank=4, alpha=6.0, targets=("attention",))
ROUNDED = LoraConfig(rank=4, alpha=16.0, targets=("experts",), quantization_aware=True)
GENERATION = {"eos_token_id": [330], "temperature": 0.7, "pad_token_id": 329}


def is_mx(x):
    return isinstance(x, MxTensor)


def dense(params):
    """Experts as float32 arrays."""
    return jax.tree.map(
        lambda x: x.dequantize(jnp.float32) if is_mx(x) else x, params, is_leaf=is_mx
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """packed, plain: the same model in float32, experts MXFP4 or not; and adapters."""
    place = tmp_path_factory.mktemp("merge")
    for name, params in (("packed", tiny.params()), ("plain", dense(tiny.params()))):
        (place / name).mkdir()
        export.write(place / name, CONFIG, stored_tree(params))
        (place / name / "generation_config.json").write_text(json.dumps(GENERATION))
        (place / name / "chat_template.jinja").write_text("template")
    base = adapters.fingerprint(CONFIG, tiny.params())
    for name, config in (("all", ALL), ("attention", ATTENTION), ("rounded", ROUNDED)):
        adapters.save(
            place / name,
            drawn(config),
            config,
            CONFIG,
            fingerprint=base,
            source=str(place / "packed"),
        )
    return place


def tokens():
    return tiny.tokens(2, 24)


def logits(params, added=None):
    return np.asarray(model.forward(params, tokens(), config=CONFIG, added=added)[0])


def test_merged_logits_are_those_of_the_additions(place, tmp_path):
    assert merge(place / "plain", tmp_path / "out", place / "all") is None
    config, params = load_params(tmp_path / "out", dtype="float32")
    assert config == CONFIG
    want = logits(tiny.params(), lora.additions(drawn(ALL), ALL))
    assert np.abs(want - logits(tiny.params())).max() > 1e-2
    np.testing.assert_allclose(logits(params), want, atol=2e-5)


def test_bfloat16_is_the_rounded_sum_and_companions_stay(place, tmp_path):
    merge(place / "packed", tmp_path / "out", place / "all")
    _, params = load_params(tmp_path / "out", dtype="float32")
    before = dense(tiny.params())
    for path, change in products(drawn(ALL), ALL.scale).items():
        found, base = params, before
        for key in path:
            found, base = found[key], base[key]
        want = np.asarray(base) + change
        if path[-1] in lora.EXPERTS:  # the rest was float32 and stays so
            assert found.dtype == jnp.float32
            rounded = want.astype(ml_dtypes.bfloat16).astype(np.float32)
            same = np.asarray(found) == rounded
            assert same.mean() > 0.999  # float32 sums in another order, at ties
        np.testing.assert_allclose(found, want, rtol=2**-8, atol=1e-6)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in raw
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "template"
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert header["model.layers.0.mlp.experts.gate_up_proj"].dtype == "BF16"


def test_experts_that_the_adapter_leaves_alone_stay_byte_for_byte(place, tmp_path):
    kept = merge(place / "packed", tmp_path / "out", place / "attention", dtype="mxfp4")
    assert kept is None
    before, after = (
        read_header(folder / "model.safetensors") for folder in (place / "packed", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    changed = set()
    for name, tensor in before.items():
        if not np.array_equal(tensor.read(), after[name].read()):
            changed.add(name.split(".", 3)[-1])
    assert changed == {f"self_attn.{letter}_proj.weight" for letter in "qkvo"}
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization_config"]["quant_method"] == "mxfp4"


def test_rounding_experts_is_asked_for_and_reported(place, tmp_path):
    with pytest.raises(GptOssError, match=r"changes experts, and rounding .* --requantize"):
        merge(place / "packed", tmp_path / "out", place / "all", dtype="mxfp4")
    with pytest.raises(GptOssError, match="the base holds experts in bfloat16, and rounding"):
        merge(place / "plain", tmp_path / "out", place / "attention", dtype="mxfp4")
    assert not list(tmp_path.iterdir())
    kept = merge(place / "packed", tmp_path / "out", place / "all", dtype="mxfp4", requantize=True)
    _, params = load_params(tmp_path / "out", dtype="float32")
    sums = np.zeros(4)
    for path, change in products(drawn(ALL), ALL.scale).items():
        if path[-1] not in lora.EXPERTS:
            continue
        base = np.asarray(dense(tiny.params())["layers"][path[1]]["mlp"][path[-1]])
        found = np.asarray(params["layers"][path[1]]["mlp"][path[-1]].dequantize(jnp.float32))
        packed = mxfp4.pack(base + change)
        want = mxfp4.unpack(packed.blocks, packed.scales)
        assert (found == want).mean() > 0.9999
        wanted = base + change
        sums += [
            ((found - base) * change).sum(), (change**2).sum(), ((found - wanted) ** 2).sum(), (wanted**2).sum(),
        ]  # fmt: skip
    np.testing.assert_allclose(kept.change, sums[0] / sums[1], rtol=1e-3)
    np.testing.assert_allclose(kept.error, np.sqrt(sums[2] / sums[3]), rtol=1e-3)
    np.testing.assert_allclose(kept.size, np.sqrt(sums[1] / sums[3]), rtol=1e-3)
    assert len(kept.weights) == 8
    assert 0.2 < kept.change < 1.2


@pytest.mark.parametrize("config", [ATTENTION, ALL], ids=["attention", "all"])
def test_weights_that_mxfp4_cannot_hold_are_refused_by_name(tmp_path, config):
    """Whether the adapter changes them or not."""
    params = dense(tiny.params())
    mlp = params["layers"][1]["mlp"]
    damaged = {**mlp, "down": mlp["down"].at[3, 2, 1].set(jnp.nan)}
    layers = {**params["layers"], 1: {**params["layers"][1], "mlp": damaged}}
    (tmp_path / "base").mkdir()
    export.write(tmp_path / "base", CONFIG, stored_tree({**params, "layers": layers}))
    adapters.save(tmp_path / "adapter", drawn(config), config, CONFIG)
    with pytest.raises(GptOssError, match=r"^layers\.1\.mlp\.down, expert 3.*: NaN or infinity"):
        merge(
            tmp_path / "base",
            tmp_path / "out",
            tmp_path / "adapter",
            dtype="mxfp4",
            requantize=True,
        )
    assert not (tmp_path / "out").exists()


def test_a_small_change_does_not_survive_rounding(place, tmp_path):
    """The reason for --requantize: 0.1 % of it is left, and the report says so."""
    small = dataclasses.replace(ROUNDED, alpha=0.2, quantization_aware=False)
    adapters.save(tmp_path / "small", drawn(small), small, CONFIG)
    kept = merge(
        place / "packed", tmp_path / "o", tmp_path / "small", dtype="mxfp4", requantize=True
    )
    assert kept.size < 0.02
    assert abs(kept.change) < 0.05
    np.testing.assert_allclose(kept.error, kept.size, rtol=0.05)


def test_what_was_trained_rounded_computes_the_same_merged(place, tmp_path):
    tree = drawn(ROUNDED)
    trained = logits(tiny.params(), lora.additions(tree, ROUNDED))
    merge(place / "packed", tmp_path / "out", place / "rounded", dtype="mxfp4", requantize=True)
    _, params = load_params(tmp_path / "out", dtype="float32")
    assert is_mx(params["layers"][0]["mlp"]["down"])
    plain = dataclasses.replace(ROUNDED, quantization_aware=False)
    unrounded = logits(tiny.params(), lora.additions(tree, plain))
    assert np.abs(trained - unrounded).max() > 1e-2
    np.testing.assert_allclose(logits(params), trained, atol=2e-5)


@pytest.mark.parametrize("length", [3, 40])
def test_gradients_pass_the_rounding_and_are_taken_at_the_rounded_weights(length):
    ids, base, tree = tiny.tokens(2, length), dense(tiny.params()), drawn(ROUNDED)
    packs = {
        path: mxfp4.pack(np.asarray(base["layers"][path[1]]["mlp"][path[-1]]) + change)
        for path, change in products(tree, ROUNDED.scale).items()
    }
    weights = jnp.asarray(
        np.random.default_rng(5).normal(size=(2, length, CONFIG.vocab_size)), jnp.float32
    )

    def ours(tree):
        added = lora.additions(tree, ROUNDED)
        return (weights * model.apply(tiny.params(), ids, config=CONFIG, added=added)[0]).mean()

    def theirs(tree):
        layers = {}
        for i, layer in base["layers"].items():
            mlp = dict(layer["mlp"])
            for name in lora.EXPERTS:
                pair = tree["layers"][i]["mlp"][name]
                change = ROUNDED.scale * jnp.einsum(lora.PRODUCTS[name], pair["b"], pair["a"])
                pack = packs["layers", i, "mlp", name]
                value = jnp.asarray(mxfp4.unpack(pack.blocks, pack.scales))
                mlp[name] = value + change - jax.lax.stop_gradient(change)
            layers[i] = {**layer, "mlp": mlp}
        return (weights * model.apply({**base, "layers": layers}, ids, config=CONFIG)[0]).mean()

    (value, found), (want_value, want) = (
        jax.jit(jax.value_and_grad(f))(tree) for f in (ours, theirs)
    )
    np.testing.assert_allclose(float(value), float(want_value), rtol=1e-4, atol=1e-6)
    for g, w in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(w).max())
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), atol=1e-3 * scale)


def test_rounded_experts_on_a_mesh():
    ids = tiny.tokens(8, 12)
    added = lora.additions(drawn(ROUNDED), ROUNDED)
    want, _ = model.forward(tiny.params(), ids, config=CONFIG, added=added)
    mesh = sharding.make_mesh({"expert": 2, "data": 2, "fsdp": 2}, CONFIG)
    letters = model.letters(CONFIG)
    put = jax.device_put(tiny.params(), sharding.parameter_shardings(letters, tiny.params(), mesh))
    with jax.set_mesh(mesh):
        ids = sharding.put(np.asarray(ids), "BT", mesh)
        found, _ = model.forward(put, ids, config=CONFIG, added=added)
    np.testing.assert_allclose(np.asarray(found), np.asarray(want), atol=2e-5)


def test_an_adapter_of_another_base_is_not_merged(place, tmp_path):
    adapters.save(tmp_path / "a", drawn(ATTENTION), ATTENTION, CONFIG, fingerprint="00ff")
    with pytest.raises(GptOssError, match="trained on another base, of fingerprint 00ff"):
        merge(place / "plain", tmp_path / "out", tmp_path / "a")


def test_the_command(place, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(place / "all")
    assert main(["export", str(run), "--to", "peft", str(tmp_path / "peft"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to"] == "peft"
    assert main(["export", str(tmp_path / "peft"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "experts in bfloat16" in capsys.readouterr().out
    command = ["export", str(run), str(tmp_path / "mx"), "--to", "hf", "--dtype", "mxfp4"]
    assert main(command) == 1
    assert "--requantize" in capsys.readouterr().err
    assert main([*command, "--requantize"]) == 0
    assert "of the adapter's change survived" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "mx"), "--to", "hf"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "x"), "--to", "peft"]) == 1
    assert "expected an adapter" in capsys.readouterr().err
