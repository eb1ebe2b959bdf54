"""The recipe of gpt-oss-tiny: rounding against the codec, branches against whole conversations,
files against the codec."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gptoss_jax import checkpoint, mxfp4
from gptoss_jax import model as network
from gptoss_jax.tokenizer import load_tokenizer, write_kept
from gptoss_jax.train import tiny, tiny_data

pytestmark = pytest.mark.usefixtures("relaxed")


@pytest.fixture
def relaxed():
    """optax mixes dtypes and ranks as it likes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    write_kept(made / "kept_tokens.txt", tiny_data.vocabulary(count=300, common=300))
    return made


def test_rounding_is_mxfp4_and_as_good_as_the_codecs_search():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 256)) * np.exp(rng.normal(size=(64, 1)) * 3)).astype(np.float32)
    x[0] = 0
    x[1, 3] = 1e3
    rounded = np.asarray(tiny.fake_mxfp4(jnp.asarray(x)))
    packed = mxfp4.pack(rounded)
    np.testing.assert_array_equal(mxfp4.unpack(packed.blocks, packed.scales), rounded)
    best = mxfp4.pack(x)
    error = ((rounded - x) ** 2).sum()
    assert error <= 1.02 * ((mxfp4.unpack(best.blocks, best.scales) - x) ** 2).sum()
    assert error > 0


def test_rounding_passes_the_gradient():
    x = jnp.linspace(-3.0, 3.0, 64)
    weight = jnp.arange(64.0)
    gradient = jax.grad(lambda x: (tiny.fake_mxfp4(x) * weight).sum())(x)
    np.testing.assert_array_equal(gradient, weight)


def test_branches_are_whole_conversations(folder):
    """The loss over shared prefixes is that of every conversation alone, from the network without a
    cache."""
    tokenizer = load_tokenizer(folder)
    config = tiny.tiny_config(list(tokenizer.kept))
    params = tiny.init(config, 1)
    batch = next(tiny_data.batches(tokenizer, seed=3))[0]
    group, half = tiny_data.BRANCHES, tiny_data.BRANCHES // 2
    chosen = slice(half, group + half)  # the end of one group and the beginning of the next
    small = {
        "prefix": np.repeat(batch["prefix"], group, axis=0)[chosen],
        "prefix_mask": np.repeat(batch["prefix_mask"], group, axis=0)[chosen],
        "rows": batch["rows"][chosen],
    }
    length = small["rows"].shape[1] - 1
    low, high = chosen.start * length, chosen.stop * length
    inside = (batch["learnt"] >= low) & (batch["learnt"] < high) & (batch["weight"] > 0)
    small["learnt"], small["weight"] = batch["learnt"][inside] - low, batch["weight"][inside]
    forward = jax.jit(
        lambda tokens, mask: network.apply(params, tokens, config=config, mask=mask)[0]
    )
    tokens = np.concatenate([small["prefix"], small["rows"]], axis=1)
    mask = np.concatenate([small["prefix_mask"], np.ones_like(small["rows"], bool)], axis=1)
    logits = np.asarray(forward(tokens, mask), np.float64)[:, small["prefix"].shape[1] : -1]
    flat = logits.reshape(-1, logits.shape[-1])[small["learnt"]]
    targets = small["rows"][:, 1:].reshape(-1)[small["learnt"]]
    peak = flat.max(-1)
    wanted = (
        np.log(np.exp(flat - peak[:, None]).sum(-1)) + peak - flat[np.arange(len(targets)), targets]
    ).sum()
    alone, loads = jax.jit(lambda b: tiny.batch_loss(params, b, config))(small)
    assert len(targets) > 200
    np.testing.assert_allclose(alone, wanted, rtol=1e-4)
    np.testing.assert_allclose(loads.sum(-1), 1.0, rtol=1e-5)
    # the same conversations as two groups: prefixes are computed once and repeated
    halves = {
        **small,
        "prefix": small["prefix"][::half],
        "prefix_mask": small["prefix_mask"][::half],
    }
    together, _ = jax.jit(lambda b: tiny.batch_loss(params, b, config))(halves)
    np.testing.assert_allclose(together, wanted, rtol=1e-4)


def test_export_is_the_rounded_model(folder):
    tokenizer = load_tokenizer(folder)
    config = tiny.tiny_config(list(tokenizer.kept))
    params = tiny.init(config, 2)
    tiny.export(params, config, folder)
    read, loaded = checkpoint.load_params(folder, dtype=jnp.float32)
    assert read == config
    for layer in (0, 3):
        for name in ("gate_up", "down"):
            wanted = tiny.fake_mxfp4(params["layers"][layer]["mlp"][name])
            np.testing.assert_array_equal(
                loaded["layers"][layer]["mlp"][name].dequantize(jnp.float32), wanted
            )
    np.testing.assert_allclose(loaded["unembedding"], params["unembedding"], rtol=2**-8)
    raw = safetensors.numpy.load_file(folder / "model.safetensors")
    assert raw["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (8, 192, 4, 16)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == list(
        config.eos_token_ids
    )


@pytest.mark.slow
def test_it_learns(folder, tmp_path):
    (tmp_path / "kept_tokens.txt").write_bytes((folder / "kept_tokens.txt").read_bytes())
    rows = []
    tiny.train(tiny.Recipe(steps=60, warmup=20), tmp_path, rows.append)
    assert rows[-1]["loss"] < 3.5 < 6.0 < rows[0]["loss"]
