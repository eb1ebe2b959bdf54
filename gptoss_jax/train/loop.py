"""Fine-tuning: one call that trains, evaluates, saves, and goes on where it stopped.

Knows the order of things; what they are is in the files beside it.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptoss_jax import adapters, hosts
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.loading import released
from gptoss_jax.model import Params
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.sharding import replicate
from gptoss_jax.tokenizer import KEPT_FILE, write_kept
from gptoss_jax.train import evaluation, memory, metrics, run_folder, trainable
from gptoss_jax.train.checkpoints import Checkpoints
from gptoss_jax.train.pipeline import Batches, BatchIterator, BatchSettings
from gptoss_jax.train.progress import Progress
from gptoss_jax.train.read import Examples, Source, read
from gptoss_jax.train.samples import Samples, make_samples
from gptoss_jax.train.settings import Settings, compare, identity
from gptoss_jax.train.step import Compiled, make_evaluate, make_step, on
from gptoss_jax.train.stopping import Stopping

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples to learn, and those held out (None without any)."""

    train: Samples
    held_out: Samples | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
      folder: The run's.
      path: The adapter's folder, or of a full fine-tuning the checkpoint's.
      trained: The adapter (or the trained parameters) as arrays.
      step: Updates done.
      steps: Updates that were asked for.
      stopped: Why it ended before `steps`: "SIGTERM", "SIGINT", "patience"; None if it did not.
      rows: Those of metrics.jsonl.
      best: Lowest held-out loss, and the step that had it; None without evaluation.
      programs: Programs of the update that it used, one a length of rows.
    """

    folder: Path
    path: Path
    trained: Params = dataclasses.field(repr=False)
    step: int
    steps: int
    stopped: str | None
    rows: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    best: tuple[float, int] | None
    programs: int

    def plot(self, path: str | Path | None = None) -> Any:
        """Loss, learning rate and expert load as a matplotlib figure, see `metrics.plot`."""
        return metrics.plot(self.rows, path)


def load_data(
    model: Model,
    data: Source | Examples,
    settings: Settings,
    held_out: Source | Examples | None = None,
    show_progress: bool = False,
) -> Data:
    """The samples of a run.

    Args:
      model: For its tokenizer and context.
      data: JSONL file, folder, Hugging Face data set, or dicts.
      settings: Of the run; samples longer than `length` are left out and counted.
      held_out: Evaluation data; None for a share of the rows, if `settings.eval_share` says so.
      show_progress: Draw a bar.

    Raises:
      GptOssError: As `read` and `make_samples`; rows are longer than the model's context; the share
        leaves nothing on one side.
    """
    if settings.length > model.max_context:
        raise GptOssError(
            f"length is {settings.length}: this model's context is {model.max_context} tokens"
        )
    most = settings.data.max_length or settings.length
    rules = dataclasses.replace(settings.data, max_length=min(most, settings.length))

    def opened(source) -> Examples:
        return source if isinstance(source, Examples) else read(source, skip_bad=rules.skip_bad)

    examples, others = opened(data), None
    if held_out is not None:
        others = opened(held_out)
    elif settings.eval_share:
        examples, others = _split(examples, settings)

    def make(examples: Examples) -> Samples:
        return make_samples(examples, model.tokenizer, rules, show_progress=show_progress)

    return Data(make(examples), None if others is None else make(others))


def _split(examples: Examples, settings: Settings) -> tuple[Examples, Examples]:
    """Whole rows held out, so that no turn of a conversation is on both sides."""
    count = len(examples.rows)
    some = max(1, round(settings.eval_share * count))
    if some >= count:
        raise GptOssError(
            f"eval_share {settings.eval_share} of {count} rows leaves none to learn: lower it, or "
            "give evaluation data of its own"
        )
    order = np.random.default_rng([settings.seed, 1]).permutation(count)
    chosen = set(order[:some].tolist())
    sides: tuple[list, list] = [], []
    for number, row in enumerate(examples.rows):
        sides[number in chosen].append(row)
    return Examples(sides[0], examples.bad), Examples(sides[1])


def batches_of(samples: Samples, model: Model, settings: Settings) -> Batches:
    """The training batches: `settings.rows` rows an update. Every process makes all of them."""
    wanted = BatchSettings(
        length=settings.length,
        batch=settings.rows,
        packing=settings.packing,
        seed=settings.seed,
    )
    return Batches(samples, model.tokenizer, wanted)


def finetune(
    model: Model,
    data: Source | Examples | Data,
    settings: Settings | None = None,
    *,
    output: str | Path,
    eval_data: Source | Examples | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> Result:
    """Trains an adapter (or the parameters); the same call continues an interrupted run.

    Args:
      model: What `gj.load` gives, on any mesh; it is not changed.
      data: JSONL file, folder of them, Hugging Face data set, rows as dicts, or `load_data`'s.
      settings: By default LoRA of rank 8 on attention and experts.
      output: The run's folder: result, checkpoints, metrics. With a run of the same model, data and
        settings in it, that run continues, to the bit as if it had not been interrupted; steps,
        epochs and what only watches or saves may be others.
      eval_data: Held-out data.
      restart: Remove the run that is there, begin anew.
      quiet: Show nothing.

    Returns:
      The result; its `path` is what `gj.load(..., adapters={"name": path})` takes.

    Raises:
      GptOssError: The data is bad; the run in `output` was made with something else (it says which
        field); the loss is not finite `bad_steps` times in a row; the disk is full.
      KeyboardInterrupt: Ctrl-C, after a checkpoint has been written.
    """
    settings, folder = settings or Settings(), Path(output).expanduser()
    if settings.lora is None and jax.process_count() > 1:
        raise GptOssError("full fine-tuning runs in one process: start one, or train an adapter")
    if not isinstance(data, Data):
        data = load_data(model, data, settings, eval_data)
    with run_folder.opened(folder, restart, hosts.speaks()):
        return _Run(model, data, settings, folder, quiet or not hosts.speaks()).run()


_made: dict[tuple, Compiled] = {}  # a notebook calls again and again


def _programs(
    model: Model, settings: Settings, base: trainable.Trainable, steps: int
) -> tuple[Compiled, Compiled]:
    """Update and evaluation, those of an earlier call if they are the same; nothing is compiled
    yet.
    """
    config, mesh, dtype = model.config, model.mesh, model.params["embedding"].dtype
    optimizer = settings.optimizer
    lasting = None if optimizer.schedule == "constant" and not optimizer.warmup else steps
    what = settings.lora, settings.frozen, settings.remat, settings.router_loss
    update = (config, mesh, dtype, *what, optimizer, lasting)
    look = (config, mesh, dtype, settings.lora, settings.frozen)
    if update not in _made:
        step = make_step(config, settings, steps, dtype, base.shardings)
        places = {}
        if mesh is not None:
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            places["out_shardings"] = jax.tree.map(lambda x: x.sharding, base.like), everywhere
        _made[update] = Compiled(step, mesh, donate_argnums=0, **places)
    if look not in _made:
        _made[look] = Compiled(make_evaluate(config, settings, dtype), mesh)
    found = _made[update], _made[look]
    while len(_made) > 8:
        del _made[next(iter(_made))]
    return found


class _Run:
    """One run, from its folder's state to its end."""

    def __init__(self, model: Model, data: Data, settings: Settings, folder: Path, quiet: bool):
        model = released(model)
        self.model, self.data, self.settings, self.folder = model, data, settings, folder
        self.quiet, self.mesh = quiet, model.mesh
        self.batches = batches_of(data.train, model, settings)
        self.steps = settings.steps or settings.epochs * self.batches.per_epoch
        self.base = trainable.prepare(model, settings)
        with on(self.mesh):
            self.fingerprint = adapters.fingerprint(model.config, model.params)
        self.identity = self._identity()
        self.best: tuple[float, int] | None = None
        self.waited = 0  # evaluations since the best
        self.held_out = None
        if data.held_out is not None:
            rows = BatchSettings(
                settings.length, settings.batch_size, settings.packing, shuffle=False
            )
            self.held_out = Batches(data.held_out, model.tokenizer, rows)
        self.step, self.evaluate = _programs(model, settings, self.base, self.steps)
        self.shapes: set[tuple[int, ...]] = set()

    def _identity(self) -> dict[str, Any]:
        params = self.model.params
        packed = isinstance(params["layers"][0]["mlp"]["gate_up"], MxTensor)
        held = self.data.held_out
        return {
            "base": self.fingerprint,
            "experts": "mxfp4" if packed else "arrays",
            "dtype": params["embedding"].dtype.name,
            **identity(self.settings),
            "data": self.data.train.digest(),
            "eval_data": held and held.digest(),
        }

    def run(self) -> Result:
        if jax.default_backend() == "cpu":
            memory.keep_freed()
        checkpoints = Checkpoints(self.folder / run_folder.CHECKPOINTS, self.settings.keep)
        try:
            return self._run(checkpoints)
        finally:
            checkpoints.close()

    def _run(self, checkpoints: Checkpoints) -> Result:
        self.checkpoints = checkpoints
        iterator = iter(self.batches)
        state, first = self._begin(iterator)
        journal: list[metrics.Sink] = []
        if hosts.speaks():
            content = {**run_folder.plain(self.settings), "identity": self.identity}
            journal = metrics.open_sinks(self.settings.log, self.folder, first, content)
            run_folder.write_settings(self.folder, self._described())
        try:
            with Stopping() as stopping, Progress(self.steps, first, self.quiet) as progress:
                self.journal, self.progress = journal, progress
                state, done, stopped = self._train(state, first, iterator, stopping)
                if stopped in ("SIGTERM", "SIGINT"):
                    progress.say(
                        f"stopped by {stopped} after step {done} of {self.steps}, saved: the same "
                        "command continues"
                    )
        finally:
            for sink in journal:
                sink.close()
        return self._finish(state, done, stopped)

    def _described(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": self.model.name,
            "steps": self.steps,
            "mesh": self.mesh and dict(self.mesh.shape),
            "trainable": self.base.trained,
            "settings": run_folder.plain(self.settings),
            "identity": self.identity,
            "data": dataclasses.asdict(self.data.train.report),
            "versions": run_folder.versions(),
        }

    def _begin(self, iterator: BatchIterator) -> tuple[Any, int]:
        """State and number of updates done: of the last checkpoint, or of the beginning."""
        steps = self.checkpoints.steps
        if not steps:
            return self.base.begin(), 0
        done = steps[-1]
        position = self.checkpoints.position(done)
        if position.get("version") != VERSION:
            raise GptOssError(
                f"{self.folder}: a run of version {position.get('version')!r}, this program "
                f"continues {VERSION}: finish it with the program that began it, or --restart"
            )
        compare(position["identity"], self.identity, str(self.folder))
        if self.steps < max(done, position["steps"]):
            raise GptOssError(
                f"{self.folder} was made with steps {position['steps']} and has done {done}, now "
                f"it is {self.steps}: steps may grow; give as many, another output, or restart "
                "(--restart)"
            )
        iterator.set_state(position["iterator"])
        best = position["best"]
        self.best, self.waited = best and (best[0], best[1]), position["waited"]
        self.checkpoints.best = best and best[1]
        return self.checkpoints.restore(done, self.base.like), done

    def _train(self, state: Any, first: int, iterator: BatchIterator, stopping: Stopping):
        """Steps, with what is due between them; returns state, updates done, and why it stopped."""
        settings, pending, saved = self.settings, None, first
        if first:
            self.progress.say(f"continuing {self.folder} after step {first} of {self.steps}")
        elif self.held_out is not None:
            self._evaluate(state, 0)
        self._mark, self._compiled = time.perf_counter(), self.step.seconds
        stopped = self._patience()
        done = first
        while done < self.steps and stopped is None:
            epoch = iterator.epoch
            batch = evaluation.put(next(iterator), self.mesh, settings.accumulate)
            self.shapes.add(batch["tokens"].shape)
            state, out = self.step(state, self.base.frozen, batch)
            self._record(pending)
            done += 1
            pending = done, epoch, out
            stopped = hosts.same(stopping.reason) if hosts.place() else stopping.reason
            last = done == self.steps or stopped is not None
            looks = self.held_out is not None and (done % settings.eval_every == 0 or last)
            samples = settings.sample_every and done % settings.sample_every == 0
            saves = done % settings.save_every == 0 or last
            if looks or samples or saves:
                self._record(pending)
                pending = None
            if looks and stopped is None:
                saves = self._evaluate(state, done) or saves
                stopped = self._patience()
                saves = saves or stopped is not None
            if samples and stopped is None:
                self._sample(state, done)
            if saves:
                self._save(state, done, iterator, wait=last or stopped is not None)
                saved = done
            else:
                self.checkpoints.check()
            if looks or samples or saves:
                self._mark = time.perf_counter()
        assert saved == done
        return state, done, stopped

    def _record(self, pending: Any) -> None:
        """Writes the row of an update: the one before the newest, so that the device never waits.

        Raises:
          GptOssError: As many updates in a row were not finite as the settings allow.
        """
        if pending is None:
            return
        step, epoch, out = pending
        found = {k: v.item() for k, v in jax.device_get(out).items()}
        now = time.perf_counter()
        compiled = self.step.seconds - self._compiled
        seconds = max(1e-9, now - self._mark - compiled)
        self._mark, self._compiled = now, self.step.seconds
        row = {
            "step": step,
            "epoch": epoch,
            **found,
            "tokens_per_second": found["tokens"] / seconds,
            "seconds": seconds,
            **({"compile_seconds": compiled} if compiled else {}),
            "time": time.time(),
        }
        for sink in self.journal:
            sink.write(row)
        self.progress.step(row)
        if found["in_a_row"] >= self.settings.bad_steps:
            kept = self.checkpoints.steps
            raise GptOssError(
                f"steps {step - found['in_a_row'] + 1} to {step}: loss {found['loss']}, gradient "
                f"{found['grad_norm']}, not finite {found['in_a_row']} times in a row and skipped: "
                "lower the learning rate or look at the data of these steps"
                + (f"; step {kept[-1]} is kept" if kept else "")
            )

    def _evaluate(self, state: Any, step: int) -> bool:
        """Held-out loss; whether it is the best so far."""
        assert self.held_out is not None
        loss = evaluation.mean_loss(
            self.evaluate, state["trained"], self.base.frozen, self.held_out, self.mesh
        )
        for sink in self.journal:
            sink.write({"step": step, "eval_loss": loss, "time": time.time()})
        self.progress.evaluated(loss)
        if step == 0:  # nothing is trained yet: no checkpoint to keep
            return False
        better = self.best is None or loss < self.best[0]
        if better:
            self.best, self.waited = (loss, step), 0
            self.checkpoints.best = step
        else:
            self.waited += 1
        return better

    def _patience(self) -> str | None:
        patience = self.settings.patience
        return "patience" if patience and self.waited >= patience else None

    def _sample(self, state: Any, step: int) -> None:
        """What the model says now, to the journal and the terminal."""
        settings, model = self.settings, self.model
        ids = evaluation.prompts(
            self.data.held_out or self.data.train,
            settings.sample_count,
            model.max_context - settings.sample_tokens,
        )
        if not ids:
            return
        if settings.lora is None:
            now = trainable.parameters(model, self.base, state["trained"])
            model = dataclasses.replace(model, params=now)
        rows = evaluation.sample(
            model, state["trained"], settings.lora, ids, settings.sample_tokens
        )
        for sink in self.journal:
            sink.write({"step": step, "samples": rows, "time": time.time()})
        for row in rows:
            self.progress.say(f"step {step}: {row['prompt'][-80:]!r} -> {row['text']!r}")

    def _save(self, state: Any, step: int, iterator: BatchIterator, wait: bool) -> None:
        position = {
            "version": VERSION,
            "steps": self.steps,
            "identity": self.identity,
            "iterator": iterator.get_state(),
            "seed": self.settings.seed,  # every random key is folded from it and a position
            "best": self.best and list(self.best),
            "waited": self.waited,
            "settings": run_folder.plain(self.settings),
            "versions": run_folder.versions(),
        }
        self.checkpoints.save(step, state, position, wait)

    def _finish(self, state: Any, done: int, stopped: str | None) -> Result:
        """Writes the result, unless the run was interrupted; says how it went."""
        if stopped == "SIGINT":
            raise KeyboardInterrupt
        trained, settings = state["trained"], self.settings
        best = self.best
        lora = settings.lora
        path = self.folder / (run_folder.MODEL if lora is None else run_folder.ADAPTER)
        if stopped != "SIGTERM":
            if settings.result == "best" and best is not None and best[1] != done:
                del state
                trained = self.checkpoints.restore(best[1], self.base.like)["trained"]
            self._write(path, trained)
        rows = metrics.read(self.folder / run_folder.METRICS)
        programs = len(self.shapes)
        return Result(self.folder, path, trained, done, self.steps, stopped, rows, best, programs)

    def _write(self, path: Path, trained: Params) -> None:
        lora, model = self.settings.lora, self.model
        if lora is None:
            from gptoss_jax import checkpoint

            params = trainable.parameters(model, self.base, trained)
            checkpoint.save_params(path, model.config, params, overwrite=True, source=model.name)
            if model.tokenizer.kept is not None:
                write_kept(path / KEPT_FILE, model.tokenizer.kept)
            return
        if self.mesh is not None:
            with on(self.mesh):
                trained = jax.jit(replicate)(trained)
        tree = jax.device_get(trained)
        if hosts.speaks():
            keywords = {"fingerprint": self.fingerprint, "source": model.name}
            adapters.save(path, tree, lora, model.config, **keywords)
