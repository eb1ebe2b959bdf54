"""A file of requests in OpenAI's batch format, answered as the server would, without a server.

Each line of IN.jsonl is {"custom_id": "...", "method": "POST", "url": "/v1/chat/completions" (or
/v1/completions, /v1/responses), "body": {...}}. OUT gets output.jsonl (answers), errors.jsonl
(requests that failed), and at the end summary.json. The same command continues a run that was
interrupted. Malformed lines are refused before anything begins.
"""

import contextlib
import dataclasses
import datetime
import json
import re
import secrets
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptoss_jax import __version__
from gptoss_jax.cli.answers import Answers, fingerprint, replace
from gptoss_jax.cli.batch_progress import Progress
from gptoss_jax.cli.batches import own_seed
from gptoss_jax.cli.loading import TINY, ModelArguments, load_model, note, working
from gptoss_jax.cli.serve import adapter_folders, check_installed
from gptoss_jax.errors import GptOssError

ADOPTED = ("seed", "date", "dtype")  # a continued run has those of its beginning
COMPARED = (("input", "sha256"), ("model", "fingerprint"))
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss batch`."""

    input: tyro.conf.Positional[Path]
    """Requests, one JSON object a line."""
    output: tyro.conf.Positional[Path]
    """Folder for output.jsonl, errors.jsonl and summary.json; made if it is not there."""
    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )
    name: str | None = None
    """Name that requests give as `model`; by default the Hub id or the folder's name."""
    adapter: tuple[str, ...] = ()
    """Adapters as NAME=FOLDER; requests give NAME as `model`."""
    slots: int = 32
    """Completions that are generated at once."""
    seed: int | None = None
    """Requests without a seed of their own get one from this and their custom_id; by default a
    random one, kept when the run is continued.
    """
    date: str | None = None
    """Date that the model is told, YYYY-MM-DD; by default that of the run's beginning."""
    allow_control_tokens: bool = False
    """/v1/completions accepts control tokens as ids."""
    retry_failed: bool = False
    """Ask again what stands in errors.jsonl."""
    overwrite: bool = False
    """Begin again, whatever OUT holds."""
    ray: str | None = None
    """Run on a Ray cluster: HOST:PORT of it, or nothing for that of RAY_ADDRESS, else the one that
    runs here, else one of its own.
    """
    actors: int | None = None
    """Copies of the model on the cluster; by default as many as fit."""
    actor_resources: str | None = None
    """What each of them takes, such as GPU=1 or TPU=4,CPU=8; by default one GPU, or the TPU chips
    of a host, or one CPU.
    """
    json: bool = False
    """Print the summary as JSON."""


def expand(argv: list[str]) -> list[str]:
    """--ray may stand alone."""
    out: list[str] = []
    for number, word in enumerate(argv):
        after = argv[number + 1] if number + 1 < len(argv) else ""
        alone = word == "--ray" and not re.fullmatch(r"auto|local|.*:\d+", after)
        out += ["--ray="] if alone else [word]
    return out


def run(arguments: Arguments) -> int:
    """Answers what is not answered yet; 1 if requests failed."""
    _check(arguments)
    from gptoss_jax.server import batch_lines

    lines, sha256 = batch_lines.read_lines(arguments.input)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated())
        way: _Here | _OnRay = _Here(arguments)
        if arguments.ray is not None:
            way = _OnRay(arguments, stack)
        wanted = _record(arguments, way.fingerprint(), sha256, len(lines))
        folder = _folder(arguments.output)
        output, errors = _open(arguments, folder, [line.custom_id for line in lines], wanted)
        stack.callback(output.close)
        stack.callback(errors.close)
        try:
            summary = _answer(arguments, lines, wanted, output, errors, way)
        except KeyboardInterrupt:
            done = len(output.done) + len(errors.done)
            note(
                f"{done} of {len(lines)} requests are answered; the same command goes on from there"
            )
            raise
    return _print(arguments, summary)


def _check(arguments: Arguments) -> None:
    check_installed()
    if arguments.ray is None and (arguments.actors or arguments.actor_resources):
        raise GptOssError("--actors and --actor-resources need --ray")
    for name in ("slots", "actors"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise GptOssError(f"--{name} is {value}: expected a positive integer")
    from gptoss_jax.server.settings import ServerSettings

    ServerSettings(date=arguments.date)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, also where that is ignored (in the background of a shell)."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise GptOssError(f"{path} is a file: give a folder for the answers")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _name(arguments: Arguments) -> str:
    name = arguments.model.model or TINY
    if arguments.name is None and Path(name).is_dir():
        return Path(name).resolve().name
    return arguments.name or name


def _record(arguments: Arguments, model: str, sha256: str, requests: int) -> dict[str, Any]:
    """What the answers are to be of, for the file beside them."""
    from gptoss_jax import adapters

    found = {
        name: fingerprint(adapters.locate(folder))
        for name, folder in adapter_folders(arguments.adapter).items()
    }
    settings = {
        "name": _name(arguments),
        "adapters": found,
        "max_context": arguments.model.max_context,
        "allow_control_tokens": arguments.allow_control_tokens,
        "seed": arguments.seed,
        "date": arguments.date,
        "dtype": arguments.model.dtype,
    }
    return {
        "input": {"name": str(arguments.input), "sha256": sha256, "requests": requests},
        "model": {"name": arguments.model.model or TINY, "fingerprint": model},
        "settings": settings,
        "gptoss_jax": __version__,
    }


def _open(
    arguments: Arguments, folder: Path, ids: Sequence[str], wanted: dict[str, Any]
) -> tuple[Answers, Answers]:
    common: dict[str, Any] = {"key": "custom_id", "beside": folder / "run.json"}

    def opened(name: str, overwrite: bool) -> Answers:
        return Answers(folder / name, ids, wanted, COMPARED, ADOPTED, overwrite, **common)

    output = opened("output.jsonl", arguments.overwrite)
    try:
        errors = opened("errors.jsonl", arguments.overwrite or arguments.retry_failed)
        both = set(output.done) & set(errors.done)
        if both:
            errors.close()
            raise GptOssError(
                f"{min(both)!r} stands in both {output.path} and {errors.path}: mend one, or use "
                "--overwrite to start again"
            )
    except BaseException:
        output.close()
        raise
    return output, errors


def _answer(
    arguments: Arguments,
    lines: Sequence[Any],
    wanted: dict[str, Any],
    output: Answers,
    errors: Answers,
    way: "_Here | _OnRay",
) -> dict[str, Any]:
    """Answers the lines that have no answer; returns the summary."""
    from gptoss_jax.server import batch_requests

    record = {**wanted, **(output.record or errors.record or {})}
    settings, done, folder = record["settings"], {*output.done, *errors.done}, arguments.output
    left = {line.custom_id: line for line in lines if line.custom_id not in done}
    progress = Progress(len(lines), len(done), hidden=arguments.json)
    if done and left and not arguments.json:
        note(f"{folder}: {len(done)} of {len(lines)} requests are answered already")
    if record["gptoss_jax"] != __version__:
        note(f"begun with gptoss_jax {record['gptoss_jax']}, continued with {__version__}")
    if left:
        (folder / "summary.json").unlink(missing_ok=True)
        seed = secrets.randbits(32) if settings["seed"] is None else settings["seed"]
        settings.update(date=settings["date"] or datetime.date.today().isoformat(), seed=seed)

        def asked() -> Iterator[batch_requests.Asked]:
            for line in list(left.values()):
                body = line.sent(own_seed(seed, line.custom_id) >> 1)  # OpenAI's have 63 bits
                yield batch_requests.Asked(line.custom_id, line.url, body)

        with way.ready(settings), progress:
            while left:
                before = len(left)
                for dtype, rows in way.answers(asked(), settings):
                    settings["dtype"] = dtype
                    output.begin(record)
                    # a shard may come twice after an actor's end
                    new = [row for row in rows if left.pop(row["custom_id"], None)]
                    good = [row for row in new if not batch_requests.failed(row)]
                    bad = [row for row in new if batch_requests.failed(row)]
                    for answers, some in ((output, good), (errors, bad)):
                        if some:
                            answers.append(some)
                    progress.answered([batch_requests.tokens_of(row) for row in new])
                if len(left) == before:
                    raise GptOssError(
                        f"{before} requests stay without an answer: run the command again"
                    )
    output.finish()
    errors.finish()
    return _summary(arguments, record, output, errors, progress)


class _Here:
    """On the devices of this machine."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments

    def fingerprint(self) -> str:
        from gptoss_jax import hub

        options = self.arguments.model
        return fingerprint(
            hub.resolve(
                options.model or TINY, revision=options.revision, offline=options.offline or None
            )
        )

    @contextlib.contextmanager
    def ready(self, settings: dict[str, Any]) -> Iterator[None]:
        """Loads the model."""
        from gptoss_jax.server.batch_requests import Requests, settings_of, start_engine

        arguments = self.arguments
        options = dataclasses.replace(arguments.model, dtype=settings["dtype"])
        model = load_model(options, arguments.json, adapters=adapter_folders(arguments.adapter))
        self.dtype = model.params["embedding"].dtype.name
        model = dataclasses.replace(model, name=_name(arguments))
        with working("compiling"):
            engine = start_engine(model, arguments.slots)
        served = settings_of(settings["date"], arguments.allow_control_tokens)
        # more than slots, so that a free one never waits
        self.requests = Requests(engine, served, 2 * arguments.slots)
        try:
            yield
        finally:
            self.requests.close()
            engine.close(drain=0)

    def answers(self, asked: Iterable[Any], _: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
        with contextlib.closing(_generator(self.requests.answers(asked))) as found:
            for rows in found:
                yield self.dtype, rows


class _OnRay:
    """On a Ray cluster, which is left with the stack."""

    def __init__(self, arguments: Arguments, stack: contextlib.ExitStack):
        from gptoss_jax.server import batch_ray

        self.arguments, self.ray = arguments, batch_ray
        # Ray prints what it notices; stdout is for the summary
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        with working("joining the Ray cluster"):
            stack.enter_context(batch_ray.cluster(arguments.ray or ""))
        # Ray has handlers of its own
        stack.enter_context(_terminated())
        self.resources = batch_ray.resources_of(arguments.actor_resources)
        self.actors = arguments.actors or batch_ray.actors_of(self.resources)

    def fingerprint(self) -> str:
        options = self.arguments.model
        name = options.model or TINY
        self.found = self.ray.fingerprint(
            str(Path(name).resolve()) if Path(name).is_dir() else name,
            options.revision,
            options.offline,
            fingerprint,
            self.resources,
        )
        return self.found

    @contextlib.contextmanager
    def ready(self, settings: dict[str, Any]) -> Iterator[None]:
        if not self.arguments.json:
            each = ", ".join(f"{name}={number:g}" for name, number in self.resources.items())
            note(f"Ray: {self.actors} actors with {each} each")
        yield

    def answers(self, asked: Iterable[Any], settings: dict[str, Any]) -> Iterator[tuple[str, Rows]]:
        arguments, options = self.arguments, self.arguments.model
        name = options.model or TINY
        loading = self.ray.Loading(
            source=str(Path(name).resolve()) if Path(name).is_dir() else name,
            name=_name(arguments),
            mesh=options.mesh,
            dtype=settings["dtype"],
            max_context=options.max_context,
            revision=options.revision,
            offline=options.offline,
            adapters={
                name: str(folder.resolve())
                for name, folder in adapter_folders(arguments.adapter).items()
            },
            slots=arguments.slots,
            date=settings["date"],
            allow_control_tokens=arguments.allow_control_tokens,
            fingerprint=self.found,
        )
        return self.ray.answers([*asked], loading, fingerprint, self.actors, self.resources)


def _generator(given: Any) -> Generator[Any]:
    return given


def _summary(
    arguments: Arguments,
    record: dict[str, Any],
    output: Answers,
    errors: Answers,
    progress: Progress,
) -> dict[str, Any]:
    """What came of the run and of those before it; written beside the answers."""
    now, folder = progress.summary(), arguments.output
    failed = len(errors.done)
    summary = {
        "status": "completed",
        "request_counts": {
            "total": progress.total,
            "completed": len(output.done),
            "failed": failed,
        },
        "output_file": str(folder / output.path.name),
        "error_file": str(folder / errors.path.name) if failed else None,
        "input_file": record["input"]["name"],
        "model": record["model"]["name"],
        "seed": record["settings"]["seed"],
        "date": record["settings"]["date"],
        **{key: now[key] for key in now if key != "prompts"},
    }
    path = output.path.parent / "summary.json"
    if now["answered"] or not path.exists():
        replace(path, [json.dumps(summary, ensure_ascii=False, indent=2).encode() + b"\n"])
    return summary


def _print(arguments: Arguments, summary: dict[str, Any]) -> int:
    """Says what came of it; the exit code."""
    folder, counts = arguments.output, summary["request_counts"]
    if arguments.json:
        print(json.dumps(summary, ensure_ascii=False))
    elif summary["answered"] == 0:
        print(f"{folder}: all {counts['total']} requests are answered already")
    else:
        print(
            f"{folder}: {summary['answered']} of {counts['total']} requests answered now, "
            f"{summary['completion_tokens']:,} tokens in {summary['seconds']:.1f} s, "
            f"{summary['tokens_per_second']:,.0f} tokens/s, seed {summary['seed']}"
        )
    if counts["failed"]:
        print(
            f"gptoss batch: {counts['failed']} of {counts['total']} requests failed: see "
            f"{summary['error_file']}; --retry-failed asks them again",
            file=sys.stderr,
        )
    return 1 if counts["failed"] else 0
