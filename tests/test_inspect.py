"""`gptoss inspect`: what it says of sound and damaged checkpoints, without reading their data."""

import json

import numpy as np
import pytest
import random_checkpoints as rc
from gptoss_jax.convert import convert
from safetensors.numpy import load_file, save_file

from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.cli.inspect import describe
from gptoss_jax.cli.main import main

CASE = rc.CASES[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    found = {layout: rc.write(root / layout, CASE, layout) for layout in rc.LAYOUTS}
    found["orbax"] = convert(found["mxfp4"], root / "orbax", origin="openai/x", revision="c" * 40)
    return found


@pytest.mark.parametrize("layout", [*rc.LAYOUTS, "orbax"])
def test_every_layout_is_described_without_reading_data(folders, layout, monkeypatch, capsys):
    def read(*arguments):
        raise AssertionError("data was read")

    monkeypatch.setattr(safetensors_file.Tensor, "read", read)
    assert main(["inspect", str(folders[layout]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    source = {"bf16": "bf16", "original": "original"}.get(layout, "mxfp4")
    tensors = load_file(folders[source] / "model.safetensors")
    assert found["total_bytes"] == sum(array.nbytes for array in tensors.values())
    bf16 = load_file(folders["bf16"] / "model.safetensors")
    assert found["parameters"] == sum(array.size for array in bf16.values())
    if layout == "orbax":
        assert (found["source"], found["revision"]) == ("openai/x", "c" * 40)
    else:
        assert {tensor["tensor"] for tensor in found["tensors"]} == tensors.keys()


def test_the_table_for_people(folders, capsys):
    assert main(["inspect", str(folders["orbax"])]) == 0
    out = capsys.readouterr().out
    assert f"{folders['orbax']}: orbax, mxfp4 experts  from openai/x at {'c' * 12}" in out
    blocks = CASE.layers * CASE.experts * CASE.hidden * CASE.intermediate // 2
    row = next(line for line in out.splitlines() if "mlp.down.blocks" in line).split()
    shape = f"{CASE.experts}x{CASE.hidden}x{CASE.intermediate // 32}x16"
    tensor = "model.layers.*.mlp.experts.down_proj_blocks"
    assert row == ["layers.*.mlp.down.blocks", "EDUY", shape, "uint8", f"{blocks:,}", tensor]
    assert main(["inspect", str(folders["orbax"]), "--all"]) == 0
    assert "layers.1.mlp.down.blocks" in capsys.readouterr().out


def test_missing_and_surplus_are_listed(tmp_path, capsys):
    folder = rc.write(tmp_path / "model", CASE, "original")
    tensors = load_file(folder / "model.safetensors")
    del tensors["block.1.attn.sinks"]
    tensors["block.0.attn.q_norm"] = np.zeros(3, np.float32)
    tensors["norm.scale"] = np.zeros(7, np.float16)
    save_file(tensors, folder / "model.safetensors")
    assert main(["inspect", str(folder)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem")]
    assert problems == [
        "problem: tensor 'block.1.attn.sinks' is missing: the checkpoint is incomplete, download "
        "it again",
        "problem: tensor 'norm.scale' in model.safetensors has shape (7,), config.json asks for "
        f"({CASE.hidden},): "
        "the two do not belong together",
        "problem: tensor 'norm.scale' in model.safetensors has type F16, expected BF16 or F32",
        "problem: tensor 'block.0.attn.q_norm' in model.safetensors is none of gpt-oss's: this is "
        "another model",
    ]


def test_verify_reads_the_data(folders, tmp_path):
    assert describe(folders["orbax"], verify=True)["problems"] == []
    target = convert(folders["mxfp4"], tmp_path / "orbax")
    file = target / "params" / "norm" / "0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    assert describe(target)["problems"] == []
    (problem,) = describe(target, verify=True)["problems"]
    assert problem.startswith(f"{target}: norm has the checksum ")
    folder = rc.write(tmp_path / "hf", CASE, "mxfp4")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj_scales"
    tensors[name] = np.full_like(tensors[name], 255)
    save_file(tensors, folder / "model.safetensors")
    (problem,) = describe(folder, verify=True)["problems"]
    assert problem.startswith(f"{name}: scale 255 (NaN in MXFP4) at (0, 0, 0")


def test_what_is_no_checkpoint(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"gptoss inspect: {tmp_path}: no config.json: expected a checkpoint's folder\n"
    )


def test_convert_from_the_command_line(folders, tmp_path, capsys):
    assert (
        main(["convert", str(folders["original"]), str(tmp_path / "out"), "--to", "hf", "--json"])
        == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert made["target"] == str(tmp_path / "out")
    assert made["bytes"] == describe(tmp_path / "out")["total_bytes"]
    assert main(["convert", str(folders["original"]), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        f"gptoss convert: {tmp_path / 'out'} exists: give another place, or --overwrite\n"
    )
