"""Reading checkpoints, against the safetensors library, and every refusal's message."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints as rc
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoint import load_params, safetensors_file, save_params
from gptoss_jax.checkpoint.source import open_source
from gptoss_jax.errors import GptOssError
from gptoss_jax.mxfp4 import MxTensor

CASE = rc.CASES[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {layout: rc.write(root / layout, CASE, layout) for layout in rc.LAYOUTS}


def _leaves(params):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def test_three_layouts_load_to_the_same_values(folders):
    loaded = {layout: load_params(folder, dtype=jnp.float32) for layout, folder in folders.items()}
    assert loaded["mxfp4"][0].num_layers == CASE.layers
    packed, original = _leaves(loaded["mxfp4"][1]), _leaves(loaded["original"][1])
    assert packed.keys() == original.keys()
    for name, value in packed.items():
        np.testing.assert_array_equal(value, original[name], err_msg=name)
    tensors = load_file(folders["bf16"] / "model.safetensors")
    params = loaded["bf16"][1]
    for number, layer in params["layers"].items():
        prefix = f"model.layers.{number}."
        expected = tensors[prefix + "mlp.experts.gate_up_proj"].astype(np.float32)
        np.testing.assert_array_equal(
            layer["mlp"]["gate_up"][:, :, 0], np.swapaxes(expected[..., 0::2], 1, 2)
        )
        np.testing.assert_array_equal(
            layer["mlp"]["gate_up"][:, :, 1], np.swapaxes(expected[..., 1::2], 1, 2)
        )
        expected = tensors[prefix + "mlp.experts.down_proj"].astype(np.float32)
        np.testing.assert_array_equal(layer["mlp"]["down"], np.swapaxes(expected, 1, 2))
        q = tensors[prefix + "self_attn.q_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(
            layer["attention"]["q"][1], q[CASE.head_dim : 2 * CASE.head_dim]
        )
        other = loaded["mxfp4"][1]["layers"][number]["mlp"]
        assert isinstance(other["down"], MxTensor)
        assert other["gate_up"].blocks.ndim == 5
        np.testing.assert_array_equal(other["down"].dequantize(jnp.float32), layer["mlp"]["down"])
        np.testing.assert_array_equal(
            other["gate_up"].dequantize(jnp.float32), layer["mlp"]["gate_up"]
        )


def test_dtype_is_asked_for_and_packed_experts_stay_packed(folders):
    _, params = load_params(folders["mxfp4"])
    types = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    assert types == {"bfloat16", "uint8"}
    with pytest.raises(
        GptOssError, match="dtype 'float16': parameters are held in 'bfloat16' or 'float32'"
    ):
        load_params(folders["mxfp4"], dtype=jnp.float16)


@pytest.mark.parametrize("layout", rc.LAYOUTS)
def test_sharded_load_reads_only_its_part(folders, layout, monkeypatch):
    count, size = [0], [0]
    fill = safetensors_file.Tensor._fill

    def counted(self, file, view, at):
        count[0] += len(view)
        fill(self, file, view, at)

    monkeypatch.setattr(safetensors_file.Tensor, "_fill", counted)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = {"D": "model"}

    def sharding(path, letters):
        spec = [rules.get(letter) for letter in letters]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    _config, sharded = load_params(folders[layout], shardings=sharding)
    for tensor in open_source(folders[layout]).tensors.values():
        size[0] += tensor.nbytes
    assert count[0] == size[0]  # each slice once, though two devices hold it
    _, whole = load_params(folders[layout])
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    assert sharded["embedding"].sharding.spec == jax.sharding.PartitionSpec(None, "model")


def test_slices_of_every_axis(tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (4, 3, 5, 2), np.uint8)
    save_file(
        {"other": np.zeros(3, np.int16), "a": array, "b": array.astype(np.float32)},
        tmp_path / "x.safetensors",
    )
    tensors = safetensors_file.read_header(tmp_path / "x.safetensors")
    for _ in range(200):
        spans = [sorted(rng.integers(0, size + 1, 2)) for size in array.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in spans)
        for name in "ab":
            np.testing.assert_array_equal(tensors[name].read(index=index), array[index])
    np.testing.assert_array_equal(tensors["a"].read((2, 15, 2), row=2), array[2:].reshape(2, 15, 2))
    np.testing.assert_array_equal(tensors["b"].read(), array)


def test_written_files_are_read_by_the_library(tmp_path):
    arrays = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "y": np.arange(5).astype(jnp.bfloat16),
    }
    entries = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    pieces = iter([arrays["x"][:1], arrays["x"][1:], arrays["y"]])
    safetensors_file.write(tmp_path / "x.safetensors", entries, pieces)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


# Damaged and mismatched checkpoints: each with its whole message.


@pytest.fixture
def folder(tmp_path):
    return rc.write(tmp_path / "model", CASE, "mxfp4")


def _change(folder, **changes):
    """Rewrites the tensors; a name given as None is removed. Dots are spelled __."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")


def _shard(folder):
    """Splits the file in two with an index; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves):
        file = f"model-{number:05d}-of-00001.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def _refusal(folder, **arguments):
    with pytest.raises(GptOssError) as error:
        load_params(folder, **arguments)
    return str(error.value)


def test_sharded_files_load(folder, folders):
    _shard(folder)
    _, params = load_params(folder)
    jax.tree.map(np.testing.assert_array_equal, params, load_params(folders["mxfp4"])[1])
    (folder / "model.safetensors.index.json").unlink()  # all files of the folder, then
    _, params = load_params(folder)
    jax.tree.map(np.testing.assert_array_equal, params, load_params(folders["mxfp4"])[1])


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.truncate(size - 1000)
    assert _refusal(folder) == (
        f"{file}: truncated: {size - 1000} bytes, its header promises {size}; download it again"
    )
    with open(file, "r+b") as stream:
        stream.truncate(100)
    assert re.fullmatch(
        f"{file}: a header of \\d+ bytes in a file of 100: truncated, or not a safetensors file; "
        "download it again",
        _refusal(folder),
    )
    file.write_bytes(b"")
    assert "a header of 0 bytes in a file of 0: truncated" in _refusal(folder)


def test_damaged_headers(folder):
    file = folder / "model.safetensors"
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert _refusal(folder) == (
        f"{file}: tensor 'a' of type F32 and shape (2,) needs 8 bytes, its offsets hold 4: "
        "damaged header, download it again"
    )
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert _refusal(folder) == (
        f"{file}: tensor 'a' starts at byte {12 + len(text)}, expected {8 + len(text)}: "
        "damaged header, download it again"
    )
    text = b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert f"{file}: tensor 'a' has the type 'F4'; this reader knows BF16, F32" in _refusal(folder)
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert f"{file}: not a safetensors file (" in _refusal(folder)


def test_missing_shard(folder):
    _shard(folder)
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert _refusal(folder) == (
        f"{folder}: shard model-00001-of-00001.safetensors is missing (1 of 2): download it again"
    )


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "config.json"]
)
def test_index_that_points_outside(folder, name):
    index = _shard(folder)
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert _refusal(folder) == (
        f"{folder / 'model.safetensors.index.json'}: tensor 'lm_head.weight' points to {name!r}: "
        "expected the name of a .safetensors file in the same folder"
    )


def test_missing_and_surplus_tensors(folder):
    _change(folder, model__layers__1__self_attn__sinks=None)
    assert _refusal(folder) == (
        f"{folder}: tensor 'model.layers.1.self_attn.sinks' is missing: the checkpoint is "
        "incomplete, "
        "download it again"
    )
    _change(folder, model__norm__weight=None)
    assert _refusal(folder).endswith(
        f"download it again (1 more problems: gptoss inspect {folder})"
    )
    rc.write(folder, CASE, "mxfp4")
    _change(folder, model__layers__0__mlp__gate__weight=np.zeros(3, np.float32))
    assert _refusal(folder) == (
        f"{folder}: tensor 'model.layers.0.mlp.gate.weight' in model.safetensors is none of "
        "gpt-oss's: this is another model"
    )


def test_wrong_shape_and_wrong_type(folder):
    _change(folder, model__norm__weight=np.ones(CASE.hidden + 1, np.float32))
    assert _refusal(folder) == (
        f"{folder}: tensor 'model.norm.weight' in model.safetensors has shape "
        f"({CASE.hidden + 1},), "
        f"config.json asks for ({CASE.hidden},): the two do not belong together"
    )
    _change(folder, model__norm__weight=np.ones(CASE.hidden, np.float16))
    assert _refusal(folder) == (
        f"{folder}: tensor 'model.norm.weight' in model.safetensors has type F16, expected BF16 or "
        "F32"
    )
    _change(folder, model__norm__weight=np.ones(CASE.hidden, np.float32))
    _, params = load_params(folder)
    assert params["norm"].dtype == jnp.bfloat16


def test_config_of_another_model(folder):
    config = rc.hf_config(CASE) | {"num_local_experts": CASE.experts + 1}
    (folder / "config.json").write_text(json.dumps(config))
    message = _refusal(folder)
    assert message.startswith(
        f"{folder}: tensor 'model.layers.0.mlp.router.weight' in model.safetensors has shape "
        f"({CASE.experts}, {CASE.hidden}), config.json asks for ({CASE.experts + 1}, "
        f"{CASE.hidden}): "
        "the two do not belong together ("
    )
    config = rc.hf_config(CASE) | {
        "num_hidden_layers": CASE.layers + 1,
        "layer_types": ["sliding_attention"] * (CASE.layers + 1),
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert f"tensor 'model.layers.{CASE.layers}.input_layernorm.weight' is missing" in _refusal(
        folder
    )


def test_folders_that_hold_no_checkpoint(folder, tmp_path):
    assert _refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert _refusal(empty) == f"{empty}: no config.json: expected a checkpoint's folder"
    (empty / "config.json").write_text((folder / "config.json").read_text())
    assert _refusal(empty) == f"{empty}: no *.safetensors file"
    (empty / "original").mkdir()
    assert _refusal(empty) == (
        f"{empty}: no *.safetensors file; {empty / 'original'} holds OpenAI's layout: give that "
        "folder"
    )
    (empty / "config.json").write_text("{")
    assert f"{empty / 'config.json'}: not JSON (" in _refusal(empty)


def test_a_tensor_in_two_files(folder):
    save_file({"lm_head.weight": np.zeros(2, np.float32)}, folder / "other.safetensors")
    assert _refusal(folder) == (
        f"{folder}: tensor 'lm_head.weight' is in model.safetensors and in other.safetensors: "
        "remove one"
    )


def test_eos_ids_of_generation_config(folder):
    assert load_params(folder)[0].eos_token_ids == (CASE.vocab - 1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1, 2]}')
    assert load_params(folder)[0].eos_token_ids == (3, 1, 2)


@pytest.fixture
def orbax(tmp_path):
    folder = rc.write(tmp_path / "hf", CASE, "mxfp4")
    config, params = load_params(folder)
    save_params(tmp_path / "orbax", config, params)
    return tmp_path / "orbax"


def test_damaged_orbax_folders(orbax):
    embedding = orbax / "params" / "embedding"
    chunk = embedding / "0.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-10])
    assert _refusal(orbax) == (
        f"{orbax}: embedding: params/embedding/0.0 has {len(data) - 10} bytes, expected "
        f"{len(data)}: "
        "convert again"
    )
    chunk.unlink()  # zarr reads a missing chunk as zeros
    assert _refusal(orbax) == (
        f"{orbax}: embedding: params/embedding/0.0 has 0 bytes, expected {len(data)}: convert again"
    )
    (embedding / ".zarray").unlink()
    assert _refusal(orbax) == (f"{orbax}: embedding: params/embedding is missing: convert again")
    (orbax / "params" / "_METADATA").unlink()
    assert _refusal(orbax) == f"{orbax}: params/ is no complete Orbax checkpoint: convert again"


def test_damaged_manifests(orbax):
    file = orbax / "manifest.json"
    manifest = json.loads(file.read_text())

    def refusal(**changes):
        file.write_text(json.dumps(manifest | changes))
        return _refusal(orbax)

    assert refusal(format="x") == f"{file}: not the manifest of a gptoss_jax checkpoint"
    assert refusal(version=2) == (
        f"{file}: format version 2, this program reads 1: upgrade gptoss_jax"
    )
    assert refusal(experts="int4") == f"{file}: no valid 'experts' and 'tensors': convert again"
    tensors = dict(manifest["tensors"])
    entry = tensors.pop("norm")
    assert refusal(tensors=tensors) == (
        f"{orbax}: norm is missing from manifest.json: convert again"
    )
    shape = [CASE.hidden + 32]
    assert refusal(tensors=tensors | {"norm": entry | {"shape": shape}}) == (
        f"{orbax}: norm has shape ({CASE.hidden + 32},) in manifest.json, config.json asks for "
        f"({CASE.hidden},): the two do not belong together"
    )
    assert refusal(tensors=tensors | {"norm": entry | {"dtype": "uint8"}}) == (
        f"{orbax}: norm has type uint8, expected bfloat16 or float32"
    )
    assert refusal(tensors=tensors | {"norm": entry, "bias": entry}) == (
        f"{orbax}: bias is none of gpt-oss's parameters"
    )
    file.write_text("{")
    assert f"{file}: not JSON (" in _refusal(orbax)


def test_progress_names_every_parameter(folder):
    seen = {}
    load_params(folder, progress=seen.__setitem__)
    assert sum(seen.values()) == sum(
        tensor.nbytes for tensor in open_source(folder).tensors.values()
    )
    assert "layers.1.mlp.down.scales" in seen
