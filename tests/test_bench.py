"""The benchmark: its steps are generation's, its counts are those of real arrays, its random models
are real models, and its report is what programs read.
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, SingleDeviceSharding

import gptoss_jax as gj
from gptoss_jax import bounds, checkpoint, hf_names, sharding
from gptoss_jax.bench import (
    compare,
    growth,
    machine,
    measure,
    report,
    startup,
    steps,
    trace,
    weights,
)
from gptoss_jax.bench.model import open_model
from gptoss_jax.bench.process import use_cores
from gptoss_jax.bench.weights import config_of, random_params
from gptoss_jax.cache import make_cache
from gptoss_jax.cli import main
from gptoss_jax.config import FULL, SLIDING, GptOssConfig
from gptoss_jax.errors import GptOssError

POSITIVE = {"type": "number", "exclusiveMinimum": 0}
STEPS = {
    "type": "object",
    "required": ["prefill", "decode"],
    "additionalProperties": {
        "type": "object",
        "required": ["bytes", "flops"],
        "additionalProperties": POSITIVE,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "system": {"const": "gptoss_jax"},
        "model": {"type": "string"},
        "random_weights": {"type": "boolean"},
        "layers": {"type": "integer"},
        "prompt": {"type": "integer"},
        "new": {"type": "integer"},
        "batch": {"type": "integer"},
        "prefill_tok_s": POSITIVE,
        "decode_tok_s": POSITIVE,
        "prefill_s": POSITIVE,
        "decode_step_s": POSITIVE,
        "first_token_s": POSITIVE,
        "load_s": POSITIVE,
        "compile_s": {"type": "object", "required": ["prefill", "decode"]},
        "memory": {"type": "object", "required": ["resident", "device"]},
        "work": STEPS,
        "machine": {
            "type": "object",
            "required": ["read_bytes_s", "copy_bytes_s", "bfloat16_flops"],
            "additionalProperties": POSITIVE,
        },
        "share": {
            "type": "object",
            "required": ["decode_bandwidth", "prefill_matrix"],
            "additionalProperties": POSITIVE,
        },
        "device": {"type": "object", "required": ["kind", "processor", "cores"]},
        "versions": {"type": "object", "required": ["python", "jax", "flax", "gptoss_jax"]},
        "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"},
        "command": {"type": "string", "pattern": "^gptoss bench "},
    },
}
SCHEMA["required"] = list(SCHEMA["properties"])
SHORT = ("--random-weights", "--layers", "2", "--prompt", "20", "--new", "4", "--repeats", "2")


def small(**changes):
    """Two layers behind the engine."""
    config = tiny.SMALL
    model = gj.Model(config, tiny.params(config), tiny.tokenizer(), config.max_context)
    return dataclasses.replace(model, **changes)


# ---- the report


def test_the_last_line_holds_the_report():
    command = [
        sys.executable,
        "-c",
        "import sys; from gptoss_jax.cli.main import main; sys.exit(main())",
    ]
    done = subprocess.run(
        [*command, "bench", *SHORT, "--batch", "2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    found = json.loads(line)
    jsonschema.validate(found, SCHEMA)
    assert any("tokens/s" in row for row in table)
    assert (found["layers"], found["batch"], found["random_weights"]) == (2, 2, True)
    assert found["decode_tok_s"] == pytest.approx(2 / found["decode_step_s"])
    assert found["prefill_tok_s"] == pytest.approx(2 * 20 / found["prefill_s"])
    assert found["first_token_s"] > found["prefill_s"] * 0.5
    bandwidth = max(found["machine"]["read_bytes_s"], found["machine"]["copy_bytes_s"])
    moved = found["work"]["decode"]["bytes"] / found["decode_step_s"]
    assert found["share"]["decode_bandwidth"] == pytest.approx(moved / bandwidth)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--startup", "--profile", "x"], 2, "--startup and --profile: one at a time"),
        (["--layers", "2"], 1, "2 layers of a real model: it needs all its layers"),
        (["--layers", "9", "--random-weights"], 1, "9 layers: gpt-oss-tiny has 1 to 4"),
        (["--new", "1", "--no-machine"], 1, "new is 1: expected 2 or more"),
        (["--batch", "0"], 1, "batch is 0: expected 1 or more"),
        (["--model", "gpt-oss-7b", "--random-weights"], 1, "no preset 'gpt-oss-7b'"),
        (["--prompt", "9000", "--no-machine"], 1, "9032 tokens of prompt and output: the context is 8192"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, code, message, capsys):
    assert main.main(["bench", *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_cores_that_are_not_there_are_refused():
    with pytest.raises(GptOssError, match="may use 1 to"):
        use_cores(100_000)


# ---- the steps


@pytest.mark.parametrize("mesh", [None, {"data": 2, "expert": 4}])
def test_the_steps_are_those_of_generation(mesh):
    model = small()
    if mesh is not None:
        made = sharding.make_mesh(mesh, model.config)
        where = sharding.parameter_shardings(gj.model.letters(model.config), model.params, made)
        model = small(mesh=made, params=jax.device_put(model.params, where))
    tokens_BT = steps.prompts(model, 2, 40)
    wanted = model.generate(
        tokens_BT.tolist(), gj.Sampling(temperature=0, ignore_eos=True), max_new_tokens=6
    )
    state = steps.prefill(model, tokens_BT, steps.capacity_for(model, 46))
    state, first = steps.decode(model, state, steps.greedy(model, 2), 1)
    state, rest = steps.decode(model, state, steps.greedy(model, 2), 5)
    found = np.concatenate([first.tokens_Bn[:, :1], rest.tokens_Bn[:, :5]], axis=1)
    assert found.tolist() == [list(one.tokens) for one in wanted]


def test_a_state_that_was_not_read_is_like_one_that_was():
    model = small()
    read = steps.prefill(model, steps.prompts(model, 1, 40), 512)
    made = steps.state_at(model, 1, 40, 512)
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (read, made)]
    assert kinds[0] == kinds[1]
    assert made.cache.length_B.tolist() == read.cache.length_B.tolist() == [40]


def test_times_are_of_steps_and_the_first_run_is_apart(monkeypatch):
    made = []
    clock = iter(range(1000))
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(steps, "prefill", lambda *_: made.append("prefill"))

    class Out:
        tokens_Bn = 0

    def decode(model, state, settings, count):
        made.append(count)
        return None, Out()

    monkeypatch.setattr(steps, "decode", decode)
    found = measure.measure(small(), prompt=8, new=131, batch=1, repeats=3)
    assert made == ["prefill", 1, 64, 64, 2] * 4
    assert found.prefill == [1, 1, 1]
    assert found.first_token == [2, 2, 2]
    assert found.step == [1 / 130] * 3
    assert found.compile_prefill == found.compile_decode == 0


# ---- counts


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_a_decode_step_are_those_of_the_arrays_it_reads(packed, batch):
    config = tiny.CONFIG
    model = gj.Model(config, tiny.params(packed=packed), tiny.tokenizer(), config.max_context)
    prompt, new = 30, 8
    context = prompt + 1 + new // 2
    experts = rest = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        keys = {getattr(key, "key", None) for key in path}
        if keys & {"gate_up", "gate_up_bias", "down", "down_bias"}:
            experts += leaf.nbytes
        elif "embedding" not in keys:
            rest += leaf.nbytes
    cache = make_cache(config, batch, context, jnp.float32)
    held = sum(x.nbytes for x in (*cache.keys, *cache.values))
    E, X = config.num_experts, config.experts_per_token
    distinct = E * (1 - (1 - X / E) ** batch)
    wanted = rest + experts / E * distinct + batch * config.hidden_size * 4 + held
    found = report.least(model, prompt, new, batch)["decode"].bytes
    assert found == pytest.approx(wanted, rel=1e-12 if batch == 1 else 0.02)


def test_operations_of_a_prompt_are_counted_pair_by_pair():
    config, model, prompt = tiny.CONFIG, tiny.model(), 30
    wanted = 2 * math.prod(model.params["unembedding"].shape)
    for kind, layer in zip(config.layer_types, model.params["layers"].values(), strict=True):
        attention, mlp = layer["attention"], layer["mlp"]
        matrices = [attention[name] for name in "qkvo"] + [mlp["router"]]
        wanted += 2 * prompt * sum(math.prod(x.shape) for x in matrices)
        one = [math.prod(mlp[name].shape[1:]) for name in ("gate_up", "down")]
        wanted += 2 * prompt * config.experts_per_token * sum(one)
        for query in range(prompt):
            first = max(0, query + 1 - config.sliding_window) if kind == SLIDING else 0
            wanted += 4 * (query + 1 - first) * config.num_heads * config.head_dim
    # a window counts as full for every query: no more than a hundredth
    assert report.least(model, prompt, 8, 1)["prefill"].flops == pytest.approx(wanted, rel=0.01)


def test_shares_are_work_by_time_by_limit():
    work = {"decode": bounds.Work(30e9, 1e12), "prefill": bounds.Work(2e9, 50e12)}
    limits = {"read_bytes_s": 40e9, "copy_bytes_s": 60e9, "bfloat16_flops": 100e12}
    found = report.shares(work, {"decode": 2.0, "prefill": 4.0}, limits)
    assert found["decode_bandwidth"] == 0.25
    assert found["decode_matrix"] == 0.005
    assert found["prefill_matrix"] == 0.125
    assert found["prefill_bandwidth"] == pytest.approx(2 / 4 / 60)


def test_rates_are_bytes_and_operations_by_medians(monkeypatch):
    times = iter([4.0, 0.5, 0.25, 4.0, 0.5, 0.25, 2.0, 1.0])
    monkeypatch.setattr(machine, "seconds", lambda call, repeats: (call(), next(times))[1])
    assert machine.read_rate([1 << 14, 1 << 15]) == 4 * (1 << 15)
    assert machine.copy_rate([4000, 8000]) == 64_000
    assert machine.matrix_rate([(2, 3, 4), (5, 6, 7)]) == 2 * 5 * 6 * 7


# ---- random models


@pytest.mark.parametrize("packed", [True, False])
def test_random_parameters_are_a_checkpoint_of_the_config(packed, tmp_path):
    made = random_params(tiny.CONFIG, packed=packed, dtype="float32")
    real = tiny.params(packed=packed)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (made, real)]
    assert shapes[0] == shapes[1]
    checkpoint.save_params(tmp_path / "made", tiny.CONFIG, made)  # refuses what is not complete
    config, loaded = checkpoint.load_params(tmp_path / "made", dtype="float32")
    assert config == tiny.CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, made)


def test_random_values_are_where_trained_ones_are():
    params = random_params(tiny.CONFIG)
    layer = params["layers"][0]
    assert params["embedding"].dtype == jnp.bfloat16
    assert (np.asarray(layer["attention"]["norm"], np.float32) == 1).all()
    for values in (params["unembedding"], layer["attention"]["q"], layer["mlp"]["gate_up_bias"]):
        plain = np.asarray(values, np.float32)
        assert (np.abs(plain) < 2**-3).all()
        assert plain.std() == pytest.approx(0.02, rel=0.2)
        assert abs((plain < 0).mean() - 0.5) < 0.05
    assert set(np.unique(layer["mlp"]["down"].scales)) == {118, 119, 120, 121}
    assert len(np.unique(layer["mlp"]["down"].blocks)) == 256
    again, other = random_params(tiny.CONFIG), random_params(tiny.CONFIG, seed=1)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (np.asarray(other["embedding"]) != np.asarray(params["embedding"])).mean() > 0.9


def test_random_parameters_are_the_same_on_a_mesh():
    mesh = sharding.make_mesh({"tensor": 1, "expert": 4, "data": 2}, tiny.CONFIG)
    spread = random_params(tiny.CONFIG, shardings=sharding.for_loading(mesh))
    jax.tree.map(np.testing.assert_array_equal, spread, random_params(tiny.CONFIG))
    blocks = spread["layers"][0]["mlp"]["down"].blocks
    assert blocks.addressable_shards[0].data.shape[0] == tiny.CONFIG.num_experts // 4


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e '.[plan]'"
)
@pytest.mark.parametrize(
    ("name", "topology", "sizes"),
    [
        ("gpt-oss-20b", "v6e:1x1", None),
        ("gpt-oss-120b", "v6e:2x2", {"expert": 2, "tensor": 2}),
        ("gpt-oss-120b", "v6e:2x2", {"fsdp": 4}),
    ],
)
def test_tpus_draw_their_parts_in_place(name, topology, sizes):
    """Compiled for TPUs that are not there, as load would lay the arrays out."""
    from gptoss_jax.plan import hardware, programs

    devices = programs.devices(hardware.parse(topology))
    config, _ = config_of(name, 1)
    mesh = sharding.make_mesh(sizes, config, devices) if sizes else None
    orders = 0
    for leaf in hf_names.leaves(config, "mxfp4"):
        where: Any = SingleDeviceSharding(devices[0])
        if mesh is not None:
            where = NamedSharding(mesh, sharding.parameter_spec(leaf.path, leaf.letters))
        least = math.prod(where.shard_shape(leaf.shape)) * (1 if leaf.packed else 2)
        laid_out = sharding.laid_out(leaf.letters, where)
        orders += laid_out is not where
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        kind = np.dtype(np.uint8) if leaf.packed else np.dtype(jnp.bfloat16)
        traced = weights._program(laid_out).trace(leaf.shape, kind, leaf.path[-1], seed)
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 1 << 16, leaf
        assert least <= memory.output_size_in_bytes < 1.2 * least + 10_000, leaf  # padding
    assert orders == 2  # the scales of gate_up and down


def test_a_model_of_fewer_layers_keeps_their_kinds():
    config, folder = config_of("gpt-oss-20b", 3)
    assert folder is None
    assert config.layer_types == (SLIDING, FULL, SLIDING)
    assert dataclasses.replace(config, num_layers=24, layer_types=()) == GptOssConfig.preset(
        "gpt-oss-20b"
    )
    model = open_model("gpt-oss-tiny", random_weights=True, layers=1, dtype="float32")
    assert list(model.params["layers"]) == [0]
    assert model.params["embedding"].dtype == jnp.float32


def test_a_model_that_does_not_fit_is_not_begun(monkeypatch):
    monkeypatch.setattr(weights, "free_memory", lambda: int(13.5e9))
    with pytest.raises(GptOssError, match=r"13\.8 GB of parameters: 13\.5 GB of memory are free"):
        weights.random_model("gpt-oss-20b")


# ---- other systems


def _line(prefill, decode):
    line = {"prefill_tok_s": prefill, "decode_tok_s": decode, "load_s": 1.0}
    return json.dumps({**line, "memory": {"resident": 2**30}, "versions": {"jax": "0"}})


def test_systems_take_turns_and_ratios_are_of_medians(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compare, "missing", lambda peer: None)
    ran = []
    lines = {
        "gptoss_jax.cli.main": iter([(100, 40), (300, 20), (200, 30)]),
        "gptoss_jax.bench.peer_transformers": iter([(50, 10), (40, 5), (60, 2)]),
    }

    def child(command):
        ran.append(command[2])
        if command[2] == "gptoss_jax.bench.peer_llamacpp":
            raise GptOssError("gptoss_jax.bench.peer_llamacpp failed: no room")
        return "" if "gguf" in command[2] else _line(*next(lines[command[2]]))

    monkeypatch.setattr(compare, "_child", child)
    words = ["--compare", "transformers", "llama.cpp", "--layers", "2", "--json"]
    assert main.main(["bench", *words, "--model", "gpt-oss-20b"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, theirs = "gptoss_jax.cli.main", "gptoss_jax.bench.peer_transformers"
    writes, llama = "gptoss_jax.bench.gguf_file", "gptoss_jax.bench.peer_llamacpp"
    assert ran == [writes, ours, theirs, llama, ours, theirs, ours, theirs]
    assert found["ratios"] == {"transformers": {"prefill_tok_s": 4.0, "decode_tok_s": 6.0}}
    assert found["systems"]["gptoss_jax"]["decode_tok_s"] == 30
    assert found["failed"] == {"llama.cpp": "gptoss_jax.bench.peer_llamacpp failed: no room"}


def test_a_peer_that_is_not_installed_is_named_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("llama_cpp", "gguf") else real(name),
    )
    monkeypatch.setattr(
        compare, "PEERS", {**compare.PEERS, "transformers": (("json",), "pip install json")}
    )
    monkeypatch.setattr(compare, "_child", lambda command: _line(100, 10))
    words = ["--compare", "llama.cpp", "transformers", "--layers", "1", "--json", "--rounds", "1"]
    assert main.main(["bench", *words, "--model", "gpt-oss-20b"]) == 0
    out = capsys.readouterr().out
    assert (
        "llama.cpp is not installed (llama_cpp, gguf missing): CMAKE_ARGS=-DGGML_NATIVE=ON" in out
    )
    found = json.loads(out.splitlines()[-1])
    assert set(found["systems"]) == {"gptoss_jax", "transformers"}
    assert list(found["missing"]) == ["llama.cpp"]


def test_a_gguf_holds_the_same_sizes(tmp_path):
    gguf = pytest.importorskip("gguf")
    from gptoss_jax.bench.gguf_file import write

    write(tmp_path / "tiny.gguf", tiny.CONFIG)
    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    held = bounds.weights(tiny.CONFIG, {})
    packed = [one for one in tensors.values() if one.tensor_type.name == "MXFP4"]
    biases = sum(
        one.n_bytes for name, one in tensors.items() if "_exps.bias" in name
    )  # float32 there, bfloat16 here
    assert sum(one.n_bytes for one in packed) + biases // 2 == held.experts
    for one in packed:
        scales = np.asarray(one.data).reshape(-1, 17)[:, 0]
        assert set(np.unique(scales)) <= {118, 119, 120, 121}
    assert tensors["token_embd.weight"].n_bytes == held.embedding
    assert tensors["blk.3.attn_q.weight"].shape.tolist() == [96, 15 * 14]


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["transformers", "llama.cpp"])
def test_programs_of_other_systems_run(peer, tmp_path):
    if compare.missing(peer):
        pytest.skip(compare.missing(peer))  # optional, and llama.cpp is compiled for minutes
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG.to_hf()))
    words = ["--config", tmp_path / "config.json", "--prompt", "20", "--new", "3", "--batch", "2"]
    words += ["--threads", "1"]
    if peer == "llama.cpp":
        from gptoss_jax.bench.gguf_file import write

        write(tmp_path / "tiny.gguf", tiny.CONFIG)
        words += ["--file", tmp_path / "tiny.gguf"]
    program = f"gptoss_jax.bench.peer_{peer.replace('.', '')}"
    done = subprocess.run(
        [sys.executable, "-m", program, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["system"], found["layers"], found["batch"]) == (peer, 4, 2)
    assert found["prefill_tok_s"] > 0
    assert found["decode_tok_s"] > 0


# ---- growth, start, trace


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "CALLS", 2)
    config = dataclasses.replace(tiny.CONFIG, num_layers=1, layer_types=(SLIDING,))
    model = small(config=config, params=tiny.params(config))
    sliding, full = (growth._only(model, kind).config for kind in ("sliding", "full"))
    assert set(sliding.layer_types) == {SLIDING}
    assert set(full.layer_types) == {FULL}
    found = growth.growth(model, contexts=[64, 512], batches=[1], lengths=[16], context=64)
    assert set(found["decode_step_s"]) == set(found["prefill_s"]) == {"released", "sliding", "full"}
    assert all(seconds > 0 for kind in found["decode_step_s"].values() for seconds in kind)
    monkeypatch.setattr(growth, "free_memory", lambda: 1000)
    said = []
    assert growth._decode(model, 1, 64, said.append) is None
    assert "left out" in said[0]
    found["decode_step_s"]["full"][1] = None
    growth.plot(found, tmp_path / "growth.png", "tiny")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main.main(["bench", "--plot", "growth.png"]) == 1
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


def test_starting_up_is_cold_once_and_warm_by_medians(monkeypatch):
    folders, totals = [], iter([9.0, 3.0, 1.0, 2.0])

    def child(options, folder):
        folders.append(folder)
        return dict.fromkeys(startup.PARTS, next(totals))

    monkeypatch.setattr(startup, "_child", child)
    found = startup.startup([], repeats=3)
    assert (found["cold"]["total"], found["warm"]["total"]) == (9.0, 2.0)
    assert len(set(folders)) == 1


@pytest.mark.slow
def test_the_parts_of_starting_up_add_up():
    options = ["--model", "gpt-oss-tiny", "--random-weights", "--layers", "1", "--prompt", "8"]
    found = startup.startup(options, repeats=1)
    for one in (found["cold"], found["warm"]):
        assert set(one) == set(startup.PARTS)
        parts = one["start"] + one["import"] + one["load"] + one["first_token"]
        assert parts == pytest.approx(one["total"], abs=0.05)
        assert 0 < one["compile"] < one["first_token"]
    assert found["cache_bytes"] > 10_000
    assert found["warm"]["compile"] < found["cold"]["compile"]


def test_a_start_that_fails_says_why():
    with pytest.raises(GptOssError, match=r"process that was timed failed: .*no preset 'nothing'"):
        startup.startup(["--model", "nothing", "--random-weights", "--prompt", "8"], repeats=1)


def test_a_trace_is_written(tmp_path):
    files = trace.trace(small(), tmp_path / "trace", prompt=8, new=2, batch=1)
    (plane,) = [file for file in files if file.name.endswith(".xplane.pb")]
    assert b"prefill" in plane.read_bytes()
