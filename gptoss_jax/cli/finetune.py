"""Fine-tune on conversations: LoRA on the model as it is released, experts still packed in MXFP4,
or all parameters.

Data is JSONL of "messages" (OpenAI's form, with "thinking" for the reasoning), prompt/completion or
text, a folder with train.jsonl, or a Hugging Face data set. Only what the assistant says is learnt.
The same command continues an interrupted run (Ctrl-C and SIGTERM save first), to the bit as if it
had not been interrupted. RUN then holds adapter/ (what --adapter and gj.load(adapters=...) take),
metrics.jsonl, checkpoints/ and settings.json.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gptoss_jax.cli.loading import Effort, ModelArguments, load_model, note, silent
from gptoss_jax.errors import GptOssError


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learnt."""

    data: str | None = None
    """JSONL file, folder with train.jsonl, or the id of a Hugging Face data set."""
    eval_data: str | None = None
    """The same for held-out data, which is only looked at."""
    eval_share: float = 0.0
    """Without --eval-data: share of the rows that is held out."""
    split: str = "train"
    """Part of a folder or data set: train, validation, test, or a name that it has."""
    skip_bad: bool = False
    """Leave out and count rows that are broken, instead of ending at the first."""
    length: int = 2048
    """Tokens of a row; longer samples are left out and counted, never cut."""
    packing: bool = True
    """Several samples a row, none of which sees the others."""
    date: str | None = None
    """Date that the model is told, YYYY-MM-DD; by default a fixed one."""
    effort: Effort = "medium"
    """Reasoning effort of rows that do not say."""
    instructions: str | None = None
    """The developer's instructions, before those of each row."""
    analysis_weight: float = 1.0
    """Loss weight of the reasoning; 0 leaves it unlearnt."""
    commentary_weight: float = 1.0
    """Loss weight of calls to tools."""
    final_weight: float = 1.0
    """Loss weight of answers."""
    multi_turn: Literal["expand", "last"] = "expand"
    """Learn every turn of a conversation, each as a sample of its own, or only the last."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trained."""

    rank: int = 8
    """Of the adapter."""
    alpha: float | None = None
    """Additions are multiplied by alpha / rank; by default twice the rank."""
    targets: str = "attention,experts"
    """What it adds to: attention, experts, all, or names and patterns of q, k, v, o, gate_up, down,
    embedding, unembedding; with commas.
    """
    expert_rank: int | None = None
    """Of the experts, each of which has its own; by default --rank."""
    layers: str | None = None
    """Only these layers: 0,1,5-8; by default all."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    quantization_aware: bool = False
    """Compute experts with base plus addition rounded to MXFP4, for merging into MXFP4."""
    full: bool = False
    """No adapter: train the parameters."""
    freeze: str | None = None
    """With --full: parameters that stay, such as router*,sinks,norm; with commas."""
    unpack: bool = False
    """With --full: make arrays of MXFP4 experts, four times their size."""


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is trained."""

    steps: int | None = None
    """Updates; by default --epochs over the data."""
    epochs: int = 1
    """Times that all data come."""
    batch_size: int = 1
    """Rows that are computed at once, over all devices."""
    accumulate: int = 8
    """Times --batch-size rows come before an update."""
    learning_rate: float | None = None
    """The peak; by default 2e-4, with --full 2e-5."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The rate after the warm-up."""
    warmup: float = 0.03
    """Of the rate from 0: steps, or below 1 a share of all steps."""
    final_share: float = 0.1
    """Of the peak, what is left at the last step."""
    b1: float = 0.9
    """Decay of AdamW's first moment."""
    b2: float = 0.99
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Of matrices."""
    clip: float = 1.0
    """Longest gradient; 0 for no limit."""
    router_loss: float = 0.0
    """Coefficient of the load-balancing loss, such as 1e-3."""
    remat: bool = True
    """Compute layers again in the backward pass instead of keeping them: slower, much smaller."""
    seed: int = 0
    """Of the adapter's first values and the order of the data."""
    bad_steps: int = 10
    """Updates in a row that are not finite, each of which is skipped, that end the run."""


@dataclasses.dataclass(frozen=True)
class Watching:
    """What is seen and kept."""

    eval_every: int = 50
    """Steps between evaluations on held-out data; one comes at the start and at the end too."""
    patience: int = 0
    """Evaluations without a lower loss that end the run; 0 for never."""
    result: Literal["last", "best"] = "last"
    """What becomes the adapter: the last step's, or that of the best evaluation."""
    sample_every: int = 0
    """Steps between answers that are shown and written to metrics.jsonl; 0 for none."""
    sample_count: int = 3
    """How many prompts are answered."""
    sample_tokens: int = 128
    """Most tokens of such an answer."""
    save_every: int = 50
    """Steps between checkpoints."""
    keep: int = 3
    """Latest checkpoints that are kept, the best besides."""
    log: str | None = None
    """Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio; with commas."""
    plot: Path | None = None
    """Picture of loss, learning rate and expert load to make at the end, such as run.png."""
    preview: bool = False
    """Train nothing: show the first samples with what is learnt marked, their lengths, and what
    memory it takes.
    """


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss finetune`."""

    output: Path | None = None
    """Folder of the run, RUN."""
    config: Path | None = None
    """YAML or JSON file with options by their names, such as learning_rate: 1e-4; those of the
    command line come before it.
    """
    restart: bool = False
    """Remove the run that RUN holds, begin anew."""
    json: bool = False
    """Print one JSON object at the end, for programs, and show nothing else."""
    data: Annotated[Data, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Data)
    adapter: Annotated[Adapter, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Adapter)
    training: Annotated[Training, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Training
    )
    watching: Annotated[Watching, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=Watching
    )
    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )


def expand(argv: list[str]) -> list[str]:
    """The command line with the options of --config before its own, which override them."""
    for number, word in enumerate(argv):
        if word == "--config" and number + 1 < len(argv):
            return _words(Path(argv[number + 1])) + argv
        if word.startswith("--config="):
            return _words(Path(word.partition("=")[2])) + argv
    return argv


def _words(path: Path) -> list[str]:
    import difflib

    import yaml

    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())[:200]
        raise GptOssError(f"{path} is no YAML ({first}): give options as name: value") from None
    if not isinstance(content, dict):
        raise GptOssError(f"{path}: expected options as name: value")
    known = set(_names(Arguments)) - {"config"}
    words: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else "gptoss finetune --help lists them"
            raise GptOssError(f"{path}: no option {key!r}: {hint}")
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [flag, text]
    return words


def _names(kind: Any) -> list[str]:
    groups = {"data": Data, "adapter": Adapter, "training": Training, "watching": Watching}
    groups["model"] = ModelArguments
    found = []
    for field in dataclasses.fields(kind):
        if kind is Arguments and field.name in groups:
            found += [f.name for f in dataclasses.fields(groups[field.name])]
        else:
            found.append(field.name)
    return found


def run(arguments: Arguments) -> int:
    """Loads, trains, says how it went."""
    if wrong := _misused(arguments):
        print(f"gptoss finetune: {wrong}", file=sys.stderr)
        return 2
    from gptoss_jax.train import loop, read

    wanted = settings(arguments)
    split = arguments.data.split
    skip = arguments.data.skip_bad
    assert arguments.data.data is not None
    examples = read.read(arguments.data.data, split=split, skip_bad=skip)
    others = arguments.data.eval_data
    held_out = others and read.read(others, split=_eval_split(others, split), skip_bad=skip)
    if arguments.watching.preview:
        return _preview(arguments, wanted, examples, held_out or None)
    started = time.perf_counter()
    model = load_model(arguments.model, quiet=arguments.json, experts="released")
    shown = not arguments.json and not silent()
    data = loop.load_data(
        model, examples, wanted, held_out or None, show_progress=shown and sys.stderr.isatty()
    )
    if shown:
        _announce(model, data, wanted)
    assert arguments.output is not None
    result = loop.finetune(
        model,
        data,
        wanted,
        output=arguments.output,
        restart=arguments.restart,
        quiet=not shown,
    )
    if arguments.watching.plot is not None and not silent():
        result.plot(arguments.watching.plot)
    _summary(arguments, result, time.perf_counter() - started)
    return 0


def _misused(arguments: Arguments) -> str | None:
    """Why the options do not go together."""
    if arguments.data.data is None:
        return "--data is required: gptoss finetune --data FILE --output RUN"
    if arguments.output is None and not arguments.watching.preview:
        return "--output is required: the folder of the run (or --preview, which trains nothing)"
    if arguments.data.eval_data is not None and arguments.data.eval_share:
        return "--eval-data and --eval-share: give one of them"
    if not arguments.adapter.full and (arguments.adapter.freeze or arguments.adapter.unpack):
        return "--freeze and --unpack are for --full: an adapter changes no parameter"
    held_out = arguments.data.eval_data is not None or arguments.data.eval_share
    if not held_out and (arguments.watching.patience or arguments.watching.result == "best"):
        return "--patience and --result best need held-out data: --eval-data or --eval-share"
    return None


def _eval_split(source: str, split: str) -> str:
    """A folder or data set that is given as --eval-data means its validation part."""
    file = Path(source).expanduser().is_file()
    return split if file or split != "train" else "validation"


def settings(arguments: Arguments) -> Any:
    """The options as train.Settings.

    Raises:
      GptOssError: One of them cannot be.
    """
    from gptoss_jax.lora import LoraConfig
    from gptoss_jax.train.samples import PINNED_DATE, SampleSettings
    from gptoss_jax.train.settings import OptimizerSettings, Settings

    adapter, training, watching = arguments.adapter, arguments.training, arguments.watching
    data, lora = arguments.data, None
    if not adapter.full:
        lora = LoraConfig(
            rank=adapter.rank,
            alpha=2.0 * adapter.rank if adapter.alpha is None else adapter.alpha,
            targets=_list(adapter.targets),
            layers=_layers(adapter.layers),
            expert_rank=adapter.expert_rank,
            rslora=adapter.rslora,
            quantization_aware=adapter.quantization_aware,
        )
    rate = training.learning_rate
    return Settings(
        lora=lora,
        frozen=_list(adapter.freeze),
        unpack=adapter.unpack,
        optimizer=OptimizerSettings(
            learning_rate=(2e-5 if adapter.full else 2e-4) if rate is None else rate,
            **_same(training, OptimizerSettings, "learning_rate"),
        ),
        data=SampleSettings(
            date=data.date or PINNED_DATE,
            reasoning_effort=data.effort,
            **_same(data, SampleSettings, "date"),
        ),
        log=_list(watching.log),
        **_same(training, Settings),
        **_same(watching, Settings, "log"),
        **_same(data, Settings, "data"),
    )


def _same(group: Any, kind: Any, *without: str) -> dict[str, Any]:
    """The options of a group that settings have under the same name."""
    names = {field.name for field in dataclasses.fields(kind)} - set(without)
    found = {field.name for field in dataclasses.fields(group)} & names
    return {name: getattr(group, name) for name in found}


def _list(text: str | None) -> tuple[str, ...]:
    return tuple(part for part in (text or "").replace(" ", "").split(",") if part)


def _layers(text: str | None) -> tuple[int, ...] | None:
    """Numbers and ranges: "0,1,5-8"."""
    if text is None:
        return None
    found: list[int] = []
    for part in _list(text):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise GptOssError(f"layers {text!r}: expected numbers and ranges such as 0,1,5-8")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def _announce(model: Any, data: Any, wanted: Any) -> None:
    """What will be trained, on what."""
    from gptoss_jax.train import loop, trainable

    base, report = trainable.prepare(model, wanted), data.train.report
    batches = loop.batches_of(data.train, model, wanted)
    steps = wanted.steps or wanted.epochs * batches.per_epoch
    note(str(base))
    if wanted.lora is not None:
        note(f"LoRA on {', '.join(wanted.lora.names())}, scale {wanted.lora.scale:g}")
    left_out = {"broken": report.bad, "too long": report.too_long}
    text = ", ".join(f"{n:,} {what}" for what, n in left_out.items() if n)
    note(
        f"{report.samples:,} samples, {report.tokens:,} tokens, {report.supervised:,} of them "
        f"learnt{f'; left out: {text}' if text else ''}"
    )
    if data.held_out is not None:
        note(f"{data.held_out.report.samples:,} samples held out")
    note(
        f"{steps:,} steps of {wanted.batch_size} x {wanted.accumulate} rows of "
        f"{' or '.join(f'{n:,}' for n in batches.lengths)} tokens, {batches.fill_share:.0%} filled"
    )


def _preview(arguments: Arguments, wanted: Any, examples: Any, held_out: Any) -> int:
    """Samples as they would be learnt; reads the checkpoint's config and tokenizer only."""
    from gptoss_jax import checkpoint, hub
    from gptoss_jax.cli.loading import TINY
    from gptoss_jax.engine import Model
    from gptoss_jax.tokenizer import load_tokenizer
    from gptoss_jax.train import loop, preview

    options = arguments.model
    name = options.model or TINY
    folder = hub.resolve(name, revision=options.revision, offline=options.offline or None)
    opened = checkpoint.open_checkpoint(folder)
    config = opened.config
    context = options.max_context or config.max_context
    model = Model(config, {}, load_tokenizer(folder), context, name)
    data = loop.load_data(model, examples, wanted, held_out)
    batches = loop.batches_of(data.train, model, wanted)
    preview.show(data.train, model.tokenizer, batches=batches)
    if data.held_out is not None:
        print(f"{data.held_out.report.samples:,} samples held out")
    if wanted.lora is not None:
        from gptoss_jax import lora

        count = lora.count(lora.shapes(config, wanted.lora))
        weights = sum(leaf.nbytes for leaf in opened.arrays())
        kept = wanted.batch_size * wanted.length * config.hidden_size * config.num_layers * 2
        print(
            f"{count:,} trainable parameters; memory: weights {_size(weights)} as stored, adapter, "
            f"gradient and moments {_size(16 * count)}, layers' inputs {_size(kept)}, and one "
            f"layer's work; compiled: gptoss plan {name} --task finetune"
        )
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count > 1e8 else f"{count / 1e6:.1f} MB"


def _summary(arguments: Arguments, result: Any, seconds: float) -> None:
    if silent():
        return
    rows = [row for row in result.rows if row.get("loss") is not None]
    best = result.best
    found = {
        "steps": result.step,
        "stopped": result.stopped,
        "loss": rows[-1]["loss"] if rows else None,
        "first_loss": rows[0]["loss"] if rows else None,
        "best_eval_loss": best and best[0],
        "best_step": best and best[1],
        "skipped": rows[-1]["skipped"] if rows else 0,
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_per_second": _median([row["tokens_per_second"] for row in rows]),
        "seconds": round(seconds, 3),
        "output": str(result.folder),
        "result": str(result.path) if result.path.exists() else None,
    }
    if arguments.json:
        print(json.dumps(found))
        return
    if result.stopped == "SIGTERM":
        return
    if result.stopped == "patience":
        print(f"no lower held-out loss in {arguments.watching.patience} evaluations: ended early")
    if rows:
        text = f"{result.step:,} steps, loss {found['first_loss']:.4f} -> {found['loss']:.4f}"
        text += f", {found['tokens']:,} tokens, {found['tokens_per_second']:,.0f} tokens/s"
        print(text)
    if best:
        print(f"held-out loss {best[0]:.4f} at step {best[1]:,}")
    if found["skipped"]:
        print(f"{found['skipped']:,} updates skipped, which were not finite")
    print(f"{result.path}")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
