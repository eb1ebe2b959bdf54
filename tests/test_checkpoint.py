"""Reading checkpoints: values against whole tensors read by the safetensors library, and every refusal's message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints as rc
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoint import load_params, safetensors_file
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

    def counted(self, descriptor, view, at):
        count[0] += len(view)
        fill(self, descriptor, view, at)

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
