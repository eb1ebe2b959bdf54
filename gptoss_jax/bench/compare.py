"""This package beside others on the same CPU, sizes and threads: each in a process of its own, one
after another, round by round, so that a machine's moods meet all of them.

Knows how to start them; what they print is in peer.py.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.bench.process import cores, last_line
from gptoss_jax.bench.weights import config_of
from gptoss_jax.errors import GptOssError
from gptoss_jax.places import cache_home

OURS = "gptoss_jax"
PEERS = {
    "transformers": (("torch", "transformers"), "pip install torch transformers"),
    "llama.cpp": (
        ("llama_cpp", "gguf"),
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf",
    ),
}
FIGURES = ("prefill_tok_s", "decode_tok_s")


def missing(peer: str) -> str | None:
    """How to install a peer, None if it is there."""
    modules, command = PEERS[peer]
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{peer} is not installed ({', '.join(absent)} missing): {command}" if absent else None


def compare(
    peers: Sequence[str],
    source: str,
    *,
    layers: int | None,
    prompt: int,
    new: int,
    batch: int,
    rounds: int,
    threads: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Runs all that are installed and puts their medians side by side.

    Args:
      peers: Of PEERS.
      source: gpt-oss-20b, gpt-oss-120b, or a checkpoint's folder of which only the sizes are used.
      layers: Only so many of its layers; by default all.
      prompt: Tokens of a prompt.
      new: Tokens generated for each.
      batch: Rows.
      rounds: How often each runs.
      threads: Cores that each may use; by default all.
      say: Told what is being done.

    Returns:
      `systems`: name -> medians over the rounds, the rounds themselves, peak memory and versions;
      `ratios`: peer -> ours by theirs; `missing`: peer -> how to install it; `failed`: peer -> why.

    Raises:
      GptOssError: This package's own process failed.
    """
    config, _ = config_of(source, layers)
    absent = {name: text for name in peers if (text := missing(name))}
    threads = threads or cores()
    settings = settings_file(source, layers)
    sizes = {"prompt": prompt, "new": new, "batch": batch, "threads": threads}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    module = [sys.executable, "-m"]
    peer = ["--config", str(settings)]
    depth = ["--layers", str(config.num_layers)]
    random = ["--model", source, "--random-weights", "--no-machine", "--json"]
    commands = {
        OURS: [*module, "gptoss_jax.cli.main", "bench", *random, *depth, *flags],
        "transformers": [*module, "gptoss_jax.bench.peer_transformers", *flags, *peer],
    }
    if "llama.cpp" in peers and "llama.cpp" not in absent:
        file = llama_file(source, layers, say)
        commands["llama.cpp"] = [*module, "gptoss_jax.bench.peer_llamacpp", *flags, *peer]
        commands["llama.cpp"] += ["--file", str(file)]
    running = [OURS, *(name for name in peers if name not in absent)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in running:
            if name in failed:
                continue
            say(f"round {number + 1} of {rounds}: {name}")
            try:
                found[name].append(json.loads(_child(commands[name])))
            except GptOssError as error:
                if name == OURS:
                    raise
                failed[name] = str(error)
    systems = {name: _summary(lines) for name, lines in found.items() if name not in failed}
    ratios = {
        name: {figure: systems[OURS][figure] / systems[name][figure] for figure in FIGURES}
        for name in systems
        if name != OURS
    }
    return {
        "layers": config.num_layers,
        **sizes,
        "rounds": rounds,
        "systems": systems,
        "ratios": ratios,
        "missing": absent,
        "failed": failed,
    }


def _summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        **{figure: statistics.median(line[figure] for line in lines) for figure in FIGURES},
        "rounds": [{figure: line[figure] for figure in FIGURES} for line in lines],
        "load_s": statistics.median(line["load_s"] for line in lines),
        "resident": max(line["memory"]["resident"] for line in lines),
        "versions": lines[-1]["versions"],
    }


def _child(command: Sequence[str]) -> str:
    """The last line that a process on the CPU prints."""
    return last_line(command, " ".join(command[2:4]), environment={"JAX_PLATFORMS": "cpu"})


def llama_file(source: str, layers: int | None, say: Callable[[str], None]) -> Path:
    """A GGUF of random weights of these sizes in the cache folder, written if it is not there;
    arguments as `compare` takes them.

    Raises:
      GptOssError: It cannot be written.
    """
    config, _ = config_of(source, layers)
    file = settings_file(source, layers).with_suffix(".gguf")
    if not file.exists():
        say(f"writing {file}, once")
        module = [sys.executable, "-m", "gptoss_jax.bench.gguf_file", str(file)]
        _child([*module, "--model", source, "--layers", str(config.num_layers)])
    return file


def settings_file(source: str, layers: int | None) -> Path:
    """A config.json of these sizes for another system's program, in the cache folder."""
    config, _ = config_of(source, layers)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{Path(source).name}-{config.num_layers}layers.json"
    file.write_text(json.dumps(config.to_hf()))
    return file


def cache_folder() -> Path:
    """Where files for other systems are kept: beside the compiled programs."""
    return cache_home() / "bench"
