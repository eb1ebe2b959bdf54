"""The search finds what is fastest, holds what is not faster, and passes over what cannot run; both
kinds of kernels run under it.
"""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import tiny

from gptoss_jax.bench import tune
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu, tuning
from gptoss_jax.kernels.cpu import library


@dataclasses.dataclass(frozen=True)
class Values:
    width: int = 2
    depth: int = 2


def test_the_search_takes_what_is_faster_and_nothing_else(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def calls(values):
        def run(rows):
            if values.width == 8:
                raise ValueError("too much shared memory")
            # width 4 is twice as fast; depth 4 gains one percent, which is noise
            clock[0] += rows / values.width * (0.99 if values.depth == 4 else 1)

        return [lambda: run(1), lambda: run(3)]

    kernels = tune.Kernels("cpu", Values(), {"width": (1, 4, 8), "depth": (1, 4)}, calls)
    said = []
    chosen, before, after = tune.search(kernels, 3, said.append)
    assert chosen == Values(4, 2)
    assert said == ["width 8: passed over, too much shared memory", "width: 4", "depth: 2"]
    np.testing.assert_allclose(before, [0.5, 1.5])
    np.testing.assert_allclose(after, [0.25, 0.75])


def test_values_that_do_not_run_at_the_start_are_an_error():
    def calls(values):
        raise ValueError("a mistake in the kernel")

    with pytest.raises(ValueError, match="a mistake"):
        tune.search(tune.Kernels("cpu", Values(), {"width": (1,)}, calls), 1, print)


@pytest.mark.skipif(cpu.why_not() is not None, reason="no compiler")
def test_tuned_values_are_kept_for_this_kind_of_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "folder", lambda: tmp_path)
    monkeypatch.setattr(tune, "CPU_CANDIDATES", {"columns": (16, 64)})
    try:
        found = tune.tune(tiny.SMALL, repeats=1, rows=(1, 5), say=lambda text: None)
        kept = json.loads((tmp_path / tuning.file_name(tuning.kind("cpu"))).read_text())
        assert kept["cpu"] == found["tuned"]
        assert set(kept["facts"]["ms after"]) == {"1", "5"}
        assert tuning.find("cpu", library.Tuning()) == library.Tuning(**found["tuned"])
    finally:
        library.tune(library.Tuning())


def test_a_gpus_candidates_are_of_its_tuning_and_run():
    kernels = tune._gpu(tiny.SMALL, (1, 5), interpret=True)
    fields = {field.name for field in dataclasses.fields(kernels.start)}
    assert set(kernels.candidates) <= fields
    other = dataclasses.replace(kernels.start, outputs=32, depth=32)
    results = [[np.asarray(call()) for call in kernels.calls(v)] for v in (kernels.start, other)]
    for first, second in zip(*results, strict=True):
        assert np.abs(first).max() > 0
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_a_device_without_such_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(GptOssError, match="only the kernels of CPUs and GPUs"):
        tune.tune(tiny.SMALL)
