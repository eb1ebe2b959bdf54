"""The command, interrupted in every way, ends with the adapter of the run that nothing interrupted:
the same bytes.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import children
import finetuning
import pytest
import tiny

from gptoss_jax.train.checkpoints import Checkpoints

STEPS = 40
# One layer: every process here compiles or loads its programs anew.
CONFIG = dataclasses.replace(tiny.SMALL, num_layers=1, layer_types=tiny.SMALL.layer_types[:1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, data, and the result of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("finetune")
    finetuning.save(folder / "model", CONFIG)
    lines = [json.dumps(row) + "\n" for row in finetuning.texts(12)]
    (folder / "data.jsonl").write_text("".join(lines))
    options = {
        "data": str(folder / "data.jsonl"),
        "model": str(folder / "model"),
        "targets": ["attention", "experts"],
        "rank": 3,
        "expert_rank": 2,
        "steps": STEPS,
        "batch-size": 2,
        "accumulate": 1,
        "length": 32,
        "save_every": 3,
        "learning_rate": "1e-2",
        "remat": False,
    }
    (folder / "run.yaml").write_text(json.dumps(options))
    done = start(folder, "whole")
    _, said = done.communicate(timeout=300)
    assert done.returncode == 0, said
    assert "trainable parameters" in said
    return folder


# After the row of a step it waits until a signal comes; whoever sends that may be late.
HOLDS = """
import os, signal, sys
from gptoss_jax.cli.main import main
from gptoss_jax.train.metrics import Journal
came, tell = os.pipe()
os.set_blocking(tell, False)
signal.set_wakeup_fd(tell)
write, step = Journal.write, int(sys.argv.pop(1))
def held(self, row):
    write(self, row)
    if row["step"] == step:
        os.read(came, 1)
Journal.write = held
sys.exit(main(sys.argv[1:]))
"""


def start(folder, run, *options, hold=None):
    """The command in a process of its own, on one device; `hold`: a step after which it waits."""
    flags = "--xla_backend_optimization_level=0"  # compiles in half the time
    program = ["-m", "gptoss_jax.cli.main"] if hold is None else ["-c", HOLDS, str(hold)]
    words = ["finetune", "--config", str(folder / "run.yaml"), "--output", str(folder / run)]
    return children.start(
        [sys.executable, *program, *words, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "GPTOSS_COMPILATION_CACHE": str(folder / "xla"), "XLA_FLAGS": flags},
    )


def until(process, path, step: int) -> None:
    """Waits until a step is in metrics.jsonl, or the process has ended."""
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)


def adapter(folder, run) -> bytes:
    return (folder / run / "adapter" / "adapter.safetensors").read_bytes()


def whole_checkpoints(folder, run) -> list[int]:
    """Steps of the checkpoints that are there, each of which is read."""
    from gptoss_jax.train import trainable

    model = finetuning.model(config=CONFIG, params=tiny.params(CONFIG))
    base = trainable.prepare(model, finetuning.SETTINGS)
    checkpoints = Checkpoints(folder / run / "checkpoints", 3)
    steps = checkpoints.steps
    for step in steps:
        assert int(checkpoints.restore(step, base.like)["step"]) == step
        assert checkpoints.position(step)["iterator"]["step"] == step
    checkpoints.close()
    return steps


def test_killed_stopped_and_interrupted_it_continues_to_the_bit(place):
    """SIGKILL, SIGTERM (exit 0, saved) and Ctrl-C (exit 130, saved), one after another."""
    journal = place / "run" / "metrics.jsonl"
    for step, number, code in (
        (5, signal.SIGKILL, -9),
        (13, signal.SIGTERM, 0),
        (22, signal.SIGINT, 130),
    ):
        process = start(place, "run", hold=step)
        until(process, journal, step)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
        steps = whole_checkpoints(place, "run")
        if number != signal.SIGKILL:
            assert f"stopped by {number.name} after step {steps[-1]} of {STEPS}, saved" in said
            assert steps[-1] >= step
        assert not (place / "run" / "adapter").exists()
    process = start(place, "run", "--json")
    out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert json.loads(out)["steps"] == STEPS
    assert adapter(place, "run") == adapter(place, "whole")
    rows = [json.loads(line)["step"] for line in journal.read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_continues_to_the_bit(place):
    """SIGKILL from the start of the process on: while it loads, compiles, trains, saves."""
    generator, run = random.Random(time.time_ns()), "killed"
    kills = 0
    while kills < 20:
        process = start(place, run)
        time.sleep(generator.uniform(1, 6))
        if process.poll() is not None:
            process.communicate()
            assert process.returncode == 0
            assert adapter(place, run) == adapter(place, "whole")
            run = f"killed{kills}"
            continue
        process.kill()
        process.communicate()
        kills += 1
        whole_checkpoints(place, run)
    process = start(place, run)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert adapter(place, run) == adapter(place, "whole")
