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
from gptoss_jax.kernels.gpu import attention, blocks


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
        assert set(kept["facts"]["ms after"]) == {"experts, rows 1", "experts, rows 5"}
        assert tuning.find("cpu", library.Tuning()) == library.Tuning(**found["tuned"])
    finally:
        library.tune(library.Tuning())


@pytest.mark.parametrize(
    ("number", "changed"),
    [
        (0, {"outputs": 64, "depth": 32}),
        (1, {"attention_slots": 32, "attention_programs": 16, "attention_rows": 64}),
        (2, {"dense_depth": 64, "dense_programs": 8, "dense_outputs": 16}),
    ],
    ids=["experts", "attention", "dense"],
)
def test_a_gpus_candidates_are_of_its_tuning_and_run(number, changed):
    kernels = tune._gpu(tiny.SMALL, (1, 5), interpret=True, context=200)[number]
    fields = {field.name for field in dataclasses.fields(kernels.start)}
    assert set(changed) <= set(kernels.candidates) <= fields
    other = dataclasses.replace(kernels.start, **changed)
    results = [
        [jax.tree.leaves(call()) for call in kernels.calls(v)] for v in (kernels.start, other)
    ]
    assert len(results[0]) == len(kernels.names)
    for first, second in zip(*results, strict=True):
        for one, two in zip(first, second, strict=True):
            one, two = np.asarray(one, np.float32), np.asarray(two, np.float32)
            assert np.abs(one).max() > 0
            np.testing.assert_allclose(one, two, rtol=0.02, atol=1e-2 * np.abs(one).max())


def test_attention_and_products_take_the_values_of_the_card(monkeypatch):
    """As the kernels choose where nobody hands them any."""
    values = blocks.Tuning(attention_slots=32, attention_programs=64, attention_warps=2)
    monkeypatch.setattr(attention, "at_hand", lambda: values)
    cut = attention.cut(1, 1, 4096, 8, 8, 64, np.float16)
    assert (cut.slots, cut.splits, cut.warps) == (32, 8, 2)
    assert attention.cut(1, 1, 4096, 8, 8, 64, np.float16, chosen=blocks.Tuning()).splits == 32


def test_a_device_without_such_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(GptOssError, match="only the kernels of CPUs and GPUs"):
        tune.tune(tiny.SMALL)
