"""Conversion: bytes that come back, what interruptions leave, pruning, Orbax reading it."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints as rc
from gptoss_jax.convert import convert, export
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from gptoss_jax import checkpoint, tokenizer
from gptoss_jax.checkpoint import safetensors_file, store, stored
from gptoss_jax.errors import GptOssError

CASE = rc.CASES[0]


def _silent(text):
    raise AssertionError(f"unexpected notice: {text}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("convert")
    found = {layout: rc.write(root / layout, CASE, layout) for layout in rc.LAYOUTS}
    found["orbax"] = convert(
        found["mxfp4"], root / "orbax", origin="a/b", revision="c0", notice=_silent
    )
    return found


def _tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _same_bytes(folder, expected):
    found = _tensors(folder)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("layout", ["mxfp4", "bf16"])
def test_hf_to_orbax_to_hf_gives_every_byte_back(folders, tmp_path, layout):
    convert(folders[layout], tmp_path / "orbax", notice=_silent)
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf", notice=_silent)
    _same_bytes(tmp_path / "hf", load_file(folders[layout] / "model.safetensors"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    released = json.loads((folders[layout] / "config.json").read_text())
    assert config.get("quantization_config") == released.get("quantization_config")
    for key in (
        "hidden_size",
        "num_local_experts",
        "num_experts_per_tok",
        "layer_types",
        "eos_token_id",
    ):
        assert config[key] == released[key]
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [released["eos_token_id"]]


def test_original_becomes_hf_and_mxfp4_becomes_bfloat16(folders, tmp_path):
    convert(folders["original"], tmp_path / "packed", to="hf", notice=_silent)
    _same_bytes(tmp_path / "packed", dict(rc.hf_tensors(CASE, "mxfp4")))
    convert(folders["orbax"], tmp_path / "plain", to="hf", dtype="bfloat16", notice=_silent)
    _same_bytes(tmp_path / "plain", dict(rc.hf_tensors(CASE, "bf16")))
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_bfloat16_is_packed_with_a_notice(folders, tmp_path):
    """The values are MXFP4's, so that packing must find them again exactly."""
    said = []
    convert(folders["bf16"], tmp_path / "hf", to="hf", dtype="mxfp4", notice=said.append)
    assert said == [
        "the source holds bfloat16 experts: they are packed to MXFP4, which rounds them"
    ]
    _, expected = checkpoint.load_params(folders["bf16"], dtype=jnp.float32)
    _, found = checkpoint.load_params(tmp_path / "hf", dtype=jnp.float32)
    for number in range(CASE.layers):
        for name in ("gate_up", "down"):
            packed = found["layers"][number]["mlp"][name]
            assert packed.blocks.dtype == jnp.uint8
            value = expected["layers"][number]["mlp"][name]
            np.testing.assert_array_equal(packed.dequantize(jnp.float32), value)


def test_experts_that_mxfp4_cannot_hold_are_refused_by_name(folders, tmp_path):
    source = shutil.copytree(folders["bf16"], tmp_path / "bf16")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.down_proj"][2, 5, 7] = np.inf
    save_file(tensors, file)
    with pytest.raises(GptOssError) as error:
        convert(source, tmp_path / "hf", to="hf", dtype="mxfp4", notice=str)
    assert str(error.value) == (
        "layers.1.mlp.down, expert 2: NaN or infinity, and MXFP4 has neither: correct the "
        "weights, or keep bfloat16"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_shards_and_index_are_what_the_library_reads(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 40_000)
    convert(folders["orbax"], tmp_path / "hf", to="hf", notice=_silent)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    expected = load_file(folders["mxfp4"] / "model.safetensors")
    _same_bytes(tmp_path / "hf", expected)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    for name, file in index["weight_map"].items():
        assert name in safetensors_file.read_header(tmp_path / "hf" / file)
    _, params = checkpoint.load_params(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, params, checkpoint.load_params(folders["mxfp4"])[1])


def test_manifest_says_where_from_and_what(folders):
    manifest = json.loads((folders["orbax"] / "manifest.json").read_text())
    assert (manifest["source"], manifest["revision"], manifest["experts"]) == ("a/b", "c0", "mxfp4")
    tensors = load_file(folders["mxfp4"] / "model.safetensors")
    assert manifest["total_bytes"] == sum(array.nbytes for array in tensors.values())
    entry = manifest["tensors"]["layers.1.mlp.down.blocks"]
    data = tensors["model.layers.1.mlp.experts.down_proj_blocks"].tobytes()
    assert entry["crc32"] == f"{zlib.crc32(data):08x}"
    assert entry["bytes"] == len(data)
    assert entry["dtype"] == "uint8"


def test_orbax_itself_restores_it_sharded(folders):
    """It is a real Orbax checkpoint: Orbax's own loader gives the same arrays on any mesh, cast."""
    config, expected = checkpoint.load_params(folders["orbax"], dtype=jnp.float32)
    del config
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    def abstract(array):
        sharding = split if array.shape[0] % 8 == 0 else spec
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    target = jax.tree.map(abstract, expected)
    found = ocp.load(folders["orbax"] / "params", target)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found["layers"][0]["attention"]["norm"].sharding == split


def test_sharded_load_reads_only_the_chunks_of_its_experts(tmp_path, monkeypatch):
    """Experts over eight devices: the bytes that one slice asks for lie in chunks of their own."""
    blocks = ("layers", 0, "mlp", "gate_up", "blocks")
    assert store.chunk_shape(blocks, (32, 2880, 2, 90, 16), 1) == (1, 2880, 2, 90, 16)
    assert store.chunk_shape(("layers", 0, "mlp", "down", "scales"), (32, 2880, 90), 1)[0] == 4
    assert store.chunk_shape(("layers", 0, "mlp", "gate_up"), (32, 2880, 2, 2880), 2)[0] == 1
    assert store.chunk_shape(("embedding",), (201088, 2880), 2) == (1571, 2880)
    assert store.chunk_shape(("unembedding",), (4099, 2880), 2) == (1736, 2880)
    case = rc.CASES[5]
    folder = convert(rc.write(tmp_path / "hf", case, "mxfp4"), tmp_path / "orbax", notice=_silent)
    opened = checkpoint.open_checkpoint(folder)
    leaf = next(leaf for leaf in opened.leaves if leaf.name == "layers.1.mlp.down.blocks")
    chunks = sorted((folder / "params" / leaf.name).glob("[0-9]*"))
    assert len(chunks) == 8
    whole = opened.read(leaf)
    for file in chunks[1:]:
        file.unlink()
    part = opened.read(leaf, (slice(0, case.experts // 8), *[slice(None)] * 3))
    np.testing.assert_array_equal(part, whole[: case.experts // 8])


@pytest.mark.parametrize("kind", ["float32", "sharded"])
def test_orbax_loads_to_the_same_as_its_source(folders, kind):
    if kind == "float32":
        arguments = {"dtype": jnp.float32}
    else:
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((3,), ("x",), devices=jax.devices()[:3], axis_types=auto)
        rules = {"N": "x", "F": "x"}

        def shardings(path, letters):
            spec = jax.sharding.PartitionSpec(*[rules.get(letter) for letter in letters])
            return jax.sharding.NamedSharding(mesh, spec)

        arguments = {"shardings": shardings}
    config, found = checkpoint.load_params(folders["orbax"], **arguments)
    other, expected = checkpoint.load_params(folders["mxfp4"], **arguments)
    assert config == other
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_small_and_uneven_chunks(folders, tmp_path, monkeypatch):
    """Chunks that split rows, pieces of several chunks, and last chunks that are not full."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 1_300)
    monkeypatch.setattr(stored, "PIECE_BYTES", 5_000)
    for layout in ("mxfp4", "bf16"):
        folder = convert(folders[layout], tmp_path / layout, notice=_silent)
        counts = [
            len(list(place.glob("[0-9]*")))
            for place in (folder / "params").iterdir()
            if place.is_dir()
        ]
        assert max(counts) > 20
        expected = checkpoint.load_params(folders[layout])[1]
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(folder)[1], expected)
        found = ocp.load(folder / "params", jax.tree.map(jnp.zeros_like, expected))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        convert(folder, tmp_path / f"{layout}-hf", to="hf", notice=_silent)
        _same_bytes(tmp_path / f"{layout}-hf", load_file(folders[layout] / "model.safetensors"))


def test_saved_trees_load_again(folders, tmp_path):
    config, params = checkpoint.load_params(folders["bf16"], dtype=jnp.float32)
    checkpoint.save_params(tmp_path / "saved", config, params, source="a test")
    again, found = checkpoint.load_params(tmp_path / "saved", dtype=jnp.float32)
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(GptOssError) as error:
        checkpoint.save_params(tmp_path / "saved", config, params)
    assert str(error.value) == f"{tmp_path / 'saved'} exists: give another place, or --overwrite"
    params["layers"][0]["mlp"].pop("router")
    with pytest.raises(GptOssError, match=r"parameter layers\.0\.mlp\.router is missing"):
        checkpoint.save_params(tmp_path / "other", config, params)
    assert not (tmp_path / "other").exists()


def test_existing_targets(folders, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(GptOssError) as error:
        convert(folders["mxfp4"], target, overwrite=True)
    assert str(error.value) == f"{target} exists and is no checkpoint: it is not overwritten"
    (target / "thesis.tex").unlink()
    convert(folders["mxfp4"], target)  # an empty folder is no loss
    with pytest.raises(GptOssError, match="exists: give another place, or --overwrite"):
        convert(folders["bf16"], target)
    convert(folders["bf16"], target, overwrite=True)
    assert json.loads((target / "manifest.json").read_text())["experts"] == "bfloat16"
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


def test_an_interruption_leaves_nothing_and_can_be_repeated(folders, tmp_path):
    done = []

    def interrupt(name, nbytes):
        done.append(name)
        if len(done) == 5:
            raise KeyboardInterrupt

    for to in ("orbax", "hf"):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            convert(folders["mxfp4"], tmp_path / to, to=to, progress=interrupt)
        assert len(done) == 5
        assert list(tmp_path.iterdir()) == []
    convert(folders["mxfp4"], tmp_path / "orbax")
    checkpoint.load_params(tmp_path / "orbax")


def test_a_killed_conversion_does_not_load_and_can_be_repeated(folders, tmp_path):
    code = (
        "import sys, time\n"
        "from gptoss_jax.convert import convert\n"
        "def progress(name, nbytes):\n"
        "    if name.startswith('layers.1'):\n"
        "        print('now', flush=True)\n"
        "        time.sleep(60)\n"
        "convert(sys.argv[1], sys.argv[2], progress=progress)\n"
    )
    target = tmp_path / "target"
    arguments = [sys.executable, "-c", code, str(folders["mxfp4"]), str(target)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert [file.name for file in tmp_path.iterdir()] == ["target.partial"]
    with pytest.raises(GptOssError, match=r"no config\.json"):
        checkpoint.load_params(tmp_path / "target.partial")
    convert(folders["mxfp4"], target)
    assert [file.name for file in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_full_disk(folders, tmp_path, to):
    """A limit on the size of files makes the kernel refuse writes, as a full disk does."""
    code = (
        "import resource, signal, sys\n"
        "from gptoss_jax.convert import convert\n"
        "from gptoss_jax.errors import GptOssError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))\n"
        "try:\n"
        "    convert(sys.argv[1], sys.argv[2], to=sys.argv[3])\n"
        "except GptOssError as error:\n"
        "    print(error)\n"
    )
    target = tmp_path / "target"
    arguments = [sys.executable, "-c", code, str(folders["mxfp4"]), str(target), to]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == (
        f"{target}: the disk is full, nothing was kept: free space or write elsewhere\n"
    )
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_disk_too_small_is_refused_before_any_work(folders, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    with pytest.raises(GptOssError) as error:
        convert(folders["mxfp4"], tmp_path / "target")
    assert str(error.value) == (
        f"{tmp_path / 'target'}: 0.0 GB are needed, the disk has 0.0 GB free: "
        "free some or write elsewhere"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_space_left(folders, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_file, "_write_all", full)
    with pytest.raises(GptOssError, match="the disk is full, nothing was kept"):
        convert(folders["mxfp4"], tmp_path / "target", to="hf")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_on_the_way(folders, tmp_path):
    damaged = shutil.copytree(folders["orbax"], tmp_path / "damaged")
    file = damaged / "params" / "layers.0.mlp.gate_up.blocks" / "0.0.0.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    entry = json.loads((damaged / "manifest.json").read_text())["tensors"][
        "layers.0.mlp.gate_up.blocks"
    ]
    with pytest.raises(GptOssError) as error:
        convert(damaged, tmp_path / "hf", to="hf")
    message = str(error.value)
    assert message.startswith(f"{damaged}: layers.0.mlp.gate_up.blocks has the checksum ")
    assert message.endswith(
        f", manifest.json says {entry['crc32']}: the data is damaged, convert again"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["damaged"]


def test_scale_255_is_refused(tmp_path):
    folder = rc.write(tmp_path / "hf", CASE, "mxfp4")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name].copy()
    tensors[name][2, 5, 1] = 255
    save_file(tensors, folder / "model.safetensors")
    message = (
        f"{name}: scale 255 (NaN in MXFP4) at (2, 5, 1): the checkpoint is damaged, "
        "download it again"
    )
    for attempt in (checkpoint.load_params, lambda path: convert(path, tmp_path / "orbax")):
        with pytest.raises(GptOssError) as error:
            attempt(folder)
        assert str(error.value) == message
    assert not (tmp_path / "orbax").exists()


def test_choices_are_checked(folders, tmp_path):
    with pytest.raises(GptOssError, match="cannot convert to 'gguf': choose 'orbax' or 'hf'"):
        convert(folders["mxfp4"], tmp_path / "x", to="gguf")
    with pytest.raises(
        GptOssError, match="cannot hold experts in 'int8': choose 'mxfp4' or 'bfloat16'"
    ):
        convert(folders["mxfp4"], tmp_path / "x", dtype="int8")


@pytest.fixture(scope="module")
def full_vocabulary(tmp_path_factory):
    """A thin model with the real vocabulary."""
    case = rc.Case("pruned", seed=11, layers=1, hidden=32, intermediate=32, vocab=201088)
    folder = rc.write(tmp_path_factory.mktemp("full") / "hf", case, "mxfp4")
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": 200002, "pad_token_id": 199999}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_pruned_vocabulary(full_vocabulary, tmp_path):
    text = "Hello world, 12 plus 30 is 42."
    words = tokenizer.load_tokenizer().encode(text)
    (tmp_path / "keep.txt").write_text("".join(f"{token}\n" for token in words))
    target = tmp_path / "pruned"
    convert(full_vocabulary, target, keep_tokens=tmp_path / "keep.txt", notice=_silent)
    pruned = tokenizer.load_tokenizer(target)
    config, params = checkpoint.load_params(target)
    rows = tokenizer.read_kept(target / "kept_tokens.txt")
    assert config.vocab_size == len(rows) == pruned.vocab_size < 1000
    assert set(words) < set(rows)
    tensors = load_file(full_vocabulary / "model.safetensors")
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"][rows])
    np.testing.assert_array_equal(params["unembedding"], tensors["lm_head.weight"][rows])
    assert [rows[row] for row in (*config.eos_token_ids, config.pad_token_id)] == [200002, 199999]
    assert pruned.decode(pruned.encode(text)) == text
    # and on to Hugging Face's layout, without the tokenizer.json of the whole vocabulary
    convert(target, tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == len(rows)
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "kept_tokens.txt",
        "model.safetensors",
    ]
    # pruned again, from the pruned one
    (tmp_path / "less.txt").write_text(f"{words[0]}\n")
    convert(tmp_path / "hf", tmp_path / "less", keep_tokens=tmp_path / "less.txt")
    fewer = tokenizer.read_kept(tmp_path / "less" / "kept_tokens.txt")
    assert set(fewer) < set(rows)
    _, params = checkpoint.load_params(tmp_path / "less")
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"][fewer])
    other = max(tokenizer.load_tokenizer().encode(" elephant"))
    (tmp_path / "more.txt").write_text(f"{other}\n")
    with pytest.raises(
        GptOssError, match=r"is to be kept, but the source's vocabulary of \d+ does not"
    ):
        convert(tmp_path / "hf", tmp_path / "more", keep_tokens=tmp_path / "more.txt")


def test_companions_go_along(full_vocabulary, tmp_path):
    convert(full_vocabulary, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


@pytest.mark.slow
def test_full_size_in_bounded_memory(tmp_path):
    """13.8 GB: peak memory under 3 GiB, and at most 2.5 times the time of copying the files."""
    tests = os.path.dirname(__file__)
    subprocess.run([sys.executable, f"{tests}/make_synthetic.py", tmp_path / "hf"], check=True)
    started = time.perf_counter()
    shutil.copytree(tmp_path / "hf", tmp_path / "copy")
    copying = time.perf_counter() - started
    shutil.rmtree(tmp_path / "copy")
    code = (
        "import resource, sys\n"
        "from gptoss_jax.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    started = time.perf_counter()
    arguments = [sys.executable, "-c", code, tmp_path / "hf", tmp_path / "orbax"]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    converting = time.perf_counter() - started
    peak = int(done.stdout) / 2**20
    print(f"copy {copying:.1f} s, convert {converting:.1f} s, peak {peak:.2f} GiB")
    assert peak < 3
    assert converting <= 2.5 * copying
