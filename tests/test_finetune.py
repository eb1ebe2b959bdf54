"""Whole runs in one process: what changes, what is written, continuing to the bit, refusals."""

import dataclasses
import functools
import json
import logging
import resource
import sys

import finetuning
import jax
import numpy as np
import pytest
import tiny

import gptoss_jax as gj
from gptoss_jax import adapters, checkpoint, lora, sharding
from gptoss_jax.errors import GptOssError
from gptoss_jax.loading import with_adapters
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import letters
from gptoss_jax.train import Settings, finetune, loop, metrics
from gptoss_jax.train.samples import Samples
from gptoss_jax.train.settings import OptimizerSettings


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Programs that compile quickly, for all tests here."""
    compiled = loop.Compiled
    loop.Compiled = functools.partial(compiled, compiler_options=tiny.QUICK)
    yield
    loop.Compiled = compiled


def train(folder, steps=6, mesh=None, rows=None, restart=False, eval_data=None, **changes):
    settings = finetuning.settings(steps=steps, **changes)
    model = finetuning.model() if mesh is None else spread(mesh)
    keywords = {"restart": restart, "eval_data": eval_data, "quiet": True}
    return finetune(model, rows or finetuning.texts(), settings, output=folder, **keywords)


def spread(sizes):
    mesh = sharding.make_mesh(sizes, finetuning.CONFIG)
    params = tiny.params(finetuning.CONFIG)
    where = sharding.parameter_shardings(letters(finetuning.CONFIG), params, mesh)
    return finetuning.model(params=jax.device_put(params, where), mesh=mesh)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing interrupts, with held-out data."""
    held_out = finetuning.texts(5, seed=1)
    return train(tmp_path_factory.mktemp("runs") / "whole", eval_data=held_out)


def test_every_length_of_rows_is_compiled_once(tmp_path, caplog):
    """Two buckets, several epochs: XLA is asked for two programs of the update."""
    rows = [{"text": "abcdefgh"[:n]} for n in (5, 6, 7, 8)] + finetuning.texts(4)
    loop._made.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        result = train(tmp_path / "run", steps=8, rows=rows, packing=False)
    asked = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    updates = [line for line in asked if "jit(step)" in line]
    assert len(updates) == 2, asked
    assert result.programs == 2
    assert len({row["tokens"] for row in result.rows}) > 1


def test_every_trained_array_changes_and_the_base_does_not(tmp_path):
    params = tiny.params(finetuning.CONFIG)
    before = jax.tree.map(lambda x: np.array(x), params)
    result = train(tmp_path / "run", steps=3, remat=True)
    start = lora.init(finetuning.CONFIG, finetuning.LORA, jax.random.key(0))
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(result.trained)[0], jax.tree.leaves(start), strict=True
    ):
        assert (np.asarray(x) != np.asarray(y)).mean() > 0.02, path
        assert x.dtype == np.float32
    finetuning.assert_same_bits(params, before)
    assert result.programs == 1
    assert [row["step"] for row in result.rows] == [1, 2, 3]
    assert result.rows[-1]["loss"] < result.rows[0]["loss"]


def test_the_folder_holds_what_it_should(whole):
    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    looks = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in looks] == [0, 2, 4, 6]
    assert {
        "grad_norm",
        "learning_rate",
        "tokens",
        "supervised",
        "tokens_per_second",
        "seconds",
        "epoch",
        "load_max",
        "load_min",
        "dead_experts",
        "load_entropy",
        "skipped",
    } <= set(steps[0])
    assert whole.best == min((row["eval_loss"], row["step"]) for row in looks[1:])
    settings = json.loads((whole.folder / "settings.json").read_text())
    assert settings["settings"]["lora"]["rank"] == 3
    assert settings["versions"]["jax"] == jax.__version__
    found = adapters.load(whole.folder, finetuning.CONFIG, fingerprint=settings["identity"]["base"])
    assert found.lora == finetuning.LORA
    finetuning.assert_same_bits(found.tree, jax.device_get(whole.trained))
    whole.plot(whole.folder.parent / "run.png")
    assert (whole.folder.parent / "run.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_loss_is_the_mean_over_tokens(whole):
    """Against the log probabilities that the model itself gives, sample by sample."""
    model, rows = finetuning.model(), finetuning.texts(5, seed=1)
    encode = model.tokenizer.encode
    ids = [[*encode(row["text"]), model.tokenizer.special["<|endoftext|>"]] for row in rows]
    total = count = 0.0
    for row, logits in zip(ids, model.logits(ids), strict=True):
        logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
        total -= logprobs[np.arange(len(row) - 1), row[1:]].sum()
        count += len(row) - 1
    first = next(row for row in whole.rows if "eval_loss" in row)
    assert first["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_run_continues_to_the_bit_twice_in_a_row(whole, tmp_path):
    """Stopped after 1 and 4 steps of 6: the parameters, moments and metrics of no interruption."""
    held_out = finetuning.texts(5, seed=1)
    for steps in (1, 4, 6):
        result = train(tmp_path / "run", steps, eval_data=held_out)
    finetuning.assert_same_bits(result.trained, whole.trained)
    states = []
    for folder in (whole.folder, tmp_path / "run"):
        checkpoints = loop.Checkpoints(folder / "checkpoints", 3)
        base = loop.trainable.prepare(finetuning.model(), finetuning.SETTINGS)
        states.append(checkpoints.restore(6, base.like))
        assert checkpoints.position(6)["iterator"]["step"] == 6
        checkpoints.close()
    finetuning.assert_same_bits(*states)
    kept = {"step", "epoch", "loss", "grad_norm", "tokens", "supervised", "load_max"}
    rows = [[{k: row[k] for k in kept} for row in r.rows if "loss" in row] for r in (whole, result)]
    assert rows[0] == rows[1]


def test_a_run_goes_on_on_another_mesh(whole, tmp_path):
    """Equal to rounding, and the result is that of the mesh it ends on."""
    train(tmp_path / "run", steps=2)
    result = train(tmp_path / "run", steps=6, mesh={"fsdp": 2, "expert": 2, "data": 2})
    assert finetuning.largest_difference(result.trained, whole.trained) < 2e-3
    losses = [[row["loss"] for row in r.rows if "loss" in row] for r in (result, whole)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    found = adapters.load(result.path, finetuning.CONFIG)
    assert finetuning.largest_difference(found.tree, whole.trained) < 2e-3


def test_metrics_after_the_checkpoint_are_not_there_twice(tmp_path):
    """Six rows were written, the checkpoint has four steps: rows 5 and 6 are written again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": i, "loss": float(i)}) + "\n" for i in range(1, 7))
        + '{"step": 7, "lo'
    )
    journal = metrics.Journal(path, 4)
    journal.write({"step": 5, "loss": float("nan")})
    journal.close()
    assert [row["step"] for row in metrics.read(path)] == [1, 2, 3, 4, 5]
    assert metrics.read(path)[-1]["loss"] is None


def test_another_run_in_the_folder_is_refused_by_its_field(whole, tmp_path, monkeypatch):
    held_out = finetuning.texts(5, seed=1)

    def again(**changes):
        return train(whole.folder, **{"eval_data": held_out, **changes})

    cases = [
        ({"learning_rate": 5e-3}, "made with learning_rate 0.01, now it is 0.005: continue with"),
        ({"lora": dataclasses.replace(finetuning.LORA, rank=4)}, "made with rank 3, now it is 4"),
        ({"seed": 1}, "made with seed 0, now it is 1"),
        ({"rows": finetuning.texts(12, seed=7)}, "made with data '"),
        ({"eval_data": finetuning.texts(4, seed=8)}, "made with eval_data '"),
        ({"accumulate": 2}, "made with batch_size times accumulate 2, now it is 4"),
        ({"steps": 5}, "made with steps 6 and has done 6, now it is 5: steps may grow"),
        ({"length": 48}, "made with length 32, now it is 48"),
    ]
    for changes, message in cases:
        with pytest.raises(GptOssError, match=message):
            again(**changes)
    other = jax.tree.map(lambda x: x, tiny.params(finetuning.CONFIG))
    other["layers"][0]["attention"]["norm"] = other["layers"][0]["attention"]["norm"] * 1.5
    with pytest.raises(GptOssError, match="made with base"):
        finetune(
            finetuning.model(params=other),
            finetuning.texts(),
            finetuning.SETTINGS,
            output=whole.folder,
            eval_data=held_out,
            quiet=True,
        )
    same = again(batch_size=1, accumulate=2, save_every=3, keep=1)  # what only computes or saves
    finetuning.assert_same_bits(same.trained, whole.trained)


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "letters.txt").write_text("dear Ann")
    with pytest.raises(GptOssError, match=r"holds letters.txt and no settings.json: it is no run"):
        train(tmp_path, restart=True)
    assert (tmp_path / "letters.txt").exists()


def test_a_full_disk_is_said_and_the_checkpoint_before_is_whole(whole, tmp_path):
    """Files may not grow beyond 20 kB: what a full disk does to a checkpoint."""
    train(tmp_path / "run", steps=2)
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most[1]))
    try:
        with pytest.raises(
            GptOssError,
            match=r"could not be written \(the disk is full\); the checkpoint of step 2 is whole",
        ):
            train(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    result = train(tmp_path / "run")
    finetuning.assert_same_bits(result.trained, whole.trained)


def test_restart_begins_anew(whole, tmp_path):
    train(tmp_path / "run", steps=2, seed=5)
    result = train(tmp_path / "run", restart=True)
    finetuning.assert_same_bits(result.trained, whole.trained)
    assert [row["step"] for row in result.rows] == [1, 2, 3, 4, 5, 6]


def test_two_commands_do_not_share_a_folder(tmp_path):
    from gptoss_jax.train import run_folder

    with run_folder.opened(tmp_path / "run", False, True):
        with pytest.raises(GptOssError, match="another command is training there"):
            train(tmp_path / "run")


def nan_data(good: int):
    """Samples of which those after the first `good` have no finite loss."""
    data = loop.load_data(finetuning.model(), finetuning.texts(), finetuning.SETTINGS)
    samples = [
        dataclasses.replace(s, weights=s.weights * np.float32(1 if i < good else np.nan))
        for i, s in enumerate(data.train.samples)
    ]
    return loop.Data(Samples(samples, data.train.report), None)


def test_losses_that_stay_infinite_end_the_run_and_say_where(tmp_path):
    with pytest.raises(
        GptOssError,
        match=r"steps 1 to 3: loss nan, gradient nan, not finite 3 times in a row and skipped: lower",
    ):
        finetune(
            finetuning.model(),
            nan_data(0),
            finetuning.settings(bad_steps=3),
            output=tmp_path / "run",
            quiet=True,
        )
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["in_a_row"] for row in rows] == [1, 2, 3]


def test_the_best_is_kept_and_patience_ends_the_run(tmp_path):
    """Random letters are learnt by heart, which ruins the held-out loss: the best stays."""
    held_out = finetuning.texts(5, seed=1)
    result = train(
        tmp_path / "run",
        steps=200,
        eval_data=held_out,
        patience=3,
        result="best",
        keep=1,
        save_every=50,
    )
    assert result.stopped == "patience"
    assert result.best is not None
    best, step = result.best
    looks = {row["step"]: row["eval_loss"] for row in result.rows if "eval_loss" in row}
    assert best == min(loss for at, loss in looks.items() if at)
    assert result.step == step + 6 < 200
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({step, result.step})
    checkpoints = loop.Checkpoints(tmp_path / "run" / "checkpoints", 1)
    base = loop.trainable.prepare(finetuning.model(), finetuning.SETTINGS)
    finetuning.assert_same_bits(checkpoints.restore(step, base.like)["trained"], result.trained)
    checkpoints.close()


def test_held_out_rows_are_whole_and_of_the_seed():
    settings = finetuning.settings(eval_share=0.25)
    data = loop.load_data(finetuning.model(), finetuning.texts(12), settings)
    assert data.held_out is not None
    sides = [{s.where for s in side.samples} for side in (data.train, data.held_out)]
    assert (len(sides[0]), len(sides[1])) == (9, 3)
    assert not sides[0] & sides[1]
    again = loop.load_data(finetuning.model(), finetuning.texts(12), settings)
    assert again.held_out is not None
    assert again.held_out.digest() == data.held_out.digest()


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(GptOssError, match="length is 1024: this model's context is 512 tokens"):
        loop.load_data(finetuning.model(), finetuning.texts(), Settings(length=1024))


def test_full_fine_tuning_needs_arrays_and_leaves_what_is_frozen(tmp_path):
    settings = finetuning.settings(
        lora=None, frozen=("router*", "sinks", "norm"), steps=2, learning_rate=1e-3
    )
    with pytest.raises(
        GptOssError,
        match=r"experts packed in MXFP4, which only an adapter can be trained on: unpack them \(",
    ):
        finetune(
            finetuning.model(), finetuning.texts(), settings, output=tmp_path / "no", quiet=True
        )
    settings = dataclasses.replace(settings, unpack=True)
    result = finetune(
        finetuning.model(), finetuning.texts(), settings, output=tmp_path / "run", quiet=True
    )
    config, params = checkpoint.load_params(result.path, dtype=np.float32)
    assert config == finetuning.CONFIG
    before = tiny.params(finetuning.CONFIG)
    for keys, now in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(key.key for key in keys)
        was = before
        for key in path:
            was = was[key]
        was = was.dequantize(np.float32) if path[-1] in ("gate_up", "down") else was
        stays = path[-1].startswith(("router", "sinks", "norm"))
        assert np.array_equal(now, was) == stays, path


def test_metrics_go_where_they_are_asked_to(tmp_path, monkeypatch):
    sinks = metrics.open_sinks(("tensorboard",), tmp_path, 0, {})
    for sink in sinks:
        sink.write({"step": 1, "loss": 2.5, "samples": [{"prompt": "a", "text": "b"}]})
        sink.close()
    assert any((tmp_path / "tensorboard").iterdir())
    assert metrics.read(tmp_path / "metrics.jsonl")[0]["loss"] == 2.5
    real = metrics.importlib.import_module

    def missing(name):
        if name in ("wandb", "trackio"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(metrics.importlib, "import_module", missing)
    for name in ("wandb", "trackio"):
        with pytest.raises(
            GptOssError,
            match=f"metrics to {name} need {name}, which is not installed: pip install {name}",
        ):
            metrics.open_sinks((name,), tmp_path, 0, {})
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1


class FakeRun:
    """wandb's and trackio's functions."""

    def __init__(self):
        self.started, self.rows, self.ended = {}, [], False

    def init(self, **keywords):
        self.started = keywords

    def log(self, numbers, step):
        self.rows.append((step, numbers))

    def finish(self):
        self.ended = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_numbers_by_step(tmp_path, monkeypatch, name):
    fake = FakeRun()
    monkeypatch.setitem(sys.modules, name, fake)
    journal, sink = metrics.open_sinks((name,), tmp_path, 0, {"rank": 3})
    journal.close()
    sink.write({"step": 4, "loss": 2.5, "samples": []})
    sink.close()
    assert fake.started["config"] == {"rank": 3}
    assert fake.rows == [(4, {"loss": 2.5})]
    assert fake.ended


def overfit(tmp_path, count: int, steps: int):
    """gpt-oss-tiny learns `count` answers by heart, and then gives them, stop token included."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": f"The sum is {91 - 7 * i}."},
            ]
        }
        for i in range(count)
    ]
    settings = Settings(
        lora=LoraConfig(rank=16, alpha=32.0),
        optimizer=OptimizerSettings(learning_rate=1e-2, schedule="linear", warmup=3),
        steps=steps,
        batch_size=-(-count // 2),
        accumulate=1,
        length=192,
        remat=False,
        save_every=steps,
        sample_every=steps,
        sample_tokens=32,
    )
    model = gj.load(mesh={})
    data = loop.load_data(model, rows, settings)
    result = finetune(model, data, settings, output=tmp_path / "run", quiet=True)
    assert next(row["loss"] for row in result.rows[::-1] if "loss" in row) < 0.05
    taught = with_adapters(model, {"mine": result.path})
    starts = [int(np.flatnonzero(s.weights)[0]) for s in data.train.samples]
    prompts = [s.tokens[:n].tolist() for s, n in zip(data.train.samples, starts, strict=True)]
    wanted = [s.tokens[n:].tolist() for s, n in zip(data.train.samples, starts, strict=True)]
    greedy = gj.Sampling(temperature=0)
    answers = taught.generate(prompts, greedy, 32, adapter="mine")
    assert [[*answer.tokens, answer.stop] for answer in answers] == wanted
    plain = taught.generate(prompts, greedy, 32)
    assert [[*answer.tokens, answer.stop] for answer in plain] != wanted
    shown = next(row["samples"] for row in result.rows if "samples" in row)
    decode = model.tokenizer.decode
    for seen, prompt, want in zip(shown, prompts, wanted, strict=False):
        assert seen == {"prompt": decode(prompt), "text": decode(want)}


def test_two_samples_are_learnt_by_heart(tmp_path):
    overfit(tmp_path, 2, 25)


@pytest.mark.slow
def test_eight_samples_are_learnt_by_heart(tmp_path):
    overfit(tmp_path, 8, 100)
