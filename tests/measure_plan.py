"""README's table of what fits: `python tests/measure_plan.py` (15 minutes on two cores; needs libtpu,
and jax's CUDA plugin for the H100's row).

Every row is `gptoss plan MODEL --topology T --context C --tried 1`: the best mesh, compiled.
"""

import json
import os
import subprocess
import sys

ROWS = [
    (model, topology, context)
    for model, topologies in (
        ("gpt-oss-20b", ("v6e:1x1", "v5e:2x2")),
        ("gpt-oss-120b", ("v6e:2x2", "v5e:4x4", "v5p:2x2x1", "h100:1")),
    )
    for topology in topologies
    for context in (8192, 131072)
]
HEAD = """| model, devices | context | mesh | weights | KV cache | temporaries: decode, prefill | peak of memory, GB | read a step: least, XLA's count, GB | decode tokens/s at most | compiled in |
|---|---|---|---|---|---|---|---|---|---|"""


def row(model: str, topology: str, context: int) -> str:
    command = [
        "plan",
        model,
        "--topology",
        topology,
        "--context",
        str(context),
        "--tried",
        "1",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_jax.cli.main", *command],
        capture_output=True, text=True, env=os.environ | {"GPTOSS_COMPILATION_CACHE": "off"},
    )  # fmt: skip
    if not done.stdout:
        return f"| {model}, {topology} | {context:,} | {done.stderr.strip()} |"
    found = json.loads(done.stdout)
    mesh = ",".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    memory, programs = found["memory"], found["programs"]
    if not programs:
        return f"| {model}, {topology} | {context:,} | {mesh} | {found['verdict']}; {found['compiler']} |"
    decode, prefill = programs["decode"], programs["prefill"]
    gb = 1e9
    counted = decode["bytes_accessed"]
    cells = [
        f"{model}, {topology}",
        f"{context:,}",
        mesh if found["fits"] else f"{mesh}: does not fit",
        f"{memory['weights'] / gb:.2f}",
        f"{memory['cache'] / gb:.2f}",
        f"{decode['temporaries'] / gb:.3f}, {prefill['temporaries'] / gb:.2f}",
        f"{memory['peak'] / gb:.1f} of {found['device']['memory'] / gb:.1f}",
        f"{found['least']['decode']['bytes'] / gb:.2f}, {'?' if counted is None else f'{counted / gb:.2f}'}",
        f"{found['decode_tokens_per_second']:,.0f}",
        f"{decode['seconds'] + prefill['seconds']:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


print(HEAD, flush=True)
for arguments in ROWS:
    print(row(*arguments), flush=True)
