"""`gptoss generate --input prompts.jsonl --output answers.jsonl`: many prompts in batches, on any
mesh, continued where it stopped.

All processes of a run go through the same batches; process 0 alone touches the output and speaks.
An answer depends on its line and the run's seed: not on its batch, nor on where a run was
interrupted.
"""

import dataclasses
import datetime
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gptoss_jax import __version__
from gptoss_jax.cli.answers import Answers, fingerprint
from gptoss_jax.cli.batch_progress import Progress
from gptoss_jax.cli.batches import answer, batches, prepare
from gptoss_jax.cli.loading import ADAPTER, TINY, load_model, note
from gptoss_jax.cli.prompts import SAMPLING, Defaults, Line, check_limit, read_prompts
from gptoss_jax.errors import GptOssError

if TYPE_CHECKING:
    from gptoss_jax.cli.generate import Arguments

ADOPTED = ("seed", "date", "dtype")  # a continued run has those of its beginning
COMPARED = (("input", "sha256"), ("model", "fingerprint"))


def run(arguments: "Arguments", sampling: Any, response_format: Any) -> int:
    """Answers what is not answered yet; 1 if prompts failed.

    Args:
      arguments: Of `gptoss generate`.
      sampling: Their gptoss_jax.Sampling.
      response_format: The JSON schema, read; None for none.

    Raises:
      GptOssError: The input is malformed, or the output is another run's; before a model is loaded.
    """
    assert arguments.input is not None
    lines, sha256 = read_prompts(arguments.input, _defaults(arguments, sampling, response_format))
    wanted = _record(arguments, sampling, response_format, len(lines), sha256)
    opened: list[Answers] = []  # by process 0

    def begun() -> dict[str, Any]:
        opened.append(_open(arguments, lines, wanted))
        return {"done": opened[0].done, "record": opened[0].record, "sha256": sha256}

    try:
        found = from_first(begun)
        if found["sha256"] != sha256:
            raise GptOssError(f"{arguments.input} is not the file that process 0 has: copy it")
        return _answer_all(
            arguments, lines, {**wanted, **(found["record"] or {})}, found["done"], opened
        )
    except KeyboardInterrupt:
        if opened and opened[0].done:
            note(
                f"{len(opened[0].done)} of {len(lines)} prompts are answered; "
                "the same command goes on from there"
            )
        raise
    finally:
        for answers in opened:
            answers.close()


def _defaults(arguments: "Arguments", sampling: Any, response_format: Any) -> Defaults:
    from gptoss_jax.chat.messages import ChatSettings, response_format_from

    settings = ChatSettings(
        reasoning_effort=arguments.effort,
        date=arguments.date,
        instructions=arguments.instructions,
        response_format=response_format_from(response_format),
    )
    limit = check_limit(arguments.max_new_tokens)
    limit = 64 if limit is None and arguments.raw else limit
    return Defaults(arguments.raw, settings, dataclasses.replace(sampling, seed=None), limit)


def _record(arguments, sampling, response_format, prompts: int, sha256: str) -> dict[str, Any]:
    """What the answers are to be of, for the file beside them."""
    adapter = None
    if arguments.adapter:
        from gptoss_jax import adapters

        adapter = fingerprint(adapters.locate(arguments.adapter))
    settings = {
        "raw": arguments.raw,
        "effort": arguments.effort,
        "instructions": arguments.instructions,
        "response_format": response_format,
        "max_new_tokens": arguments.max_new_tokens,
        "max_context": arguments.model.max_context,
        "stop": list(arguments.stop),
        "adapter": adapter,
        **{name: getattr(sampling, name) for name in SAMPLING},
        "date": arguments.date,
        "dtype": arguments.model.dtype,
    }
    return {
        "input": {"name": str(arguments.input), "sha256": sha256, "prompts": prompts},
        "model": {"name": arguments.model.model or TINY},
        "settings": settings,
        "gptoss_jax": __version__,
    }


def _open(arguments, lines: Sequence[Line], wanted: dict[str, Any]) -> Answers:
    from gptoss_jax import hub

    if arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise GptOssError(f"--input and --output are both {arguments.input}: give another --output")
    options = arguments.model
    folder = hub.resolve(
        options.model or TINY, revision=options.revision, offline=options.offline or None
    )
    wanted["model"]["fingerprint"] = fingerprint(folder)
    keys = [line.key for line in lines]
    return Answers(arguments.output, keys, wanted, COMPARED, ADOPTED, arguments.overwrite)


def _answer_all(arguments, lines, record, done, opened: Sequence[Answers]) -> int:
    """Answers the lines that are not done; opened holds the output in process 0."""
    todo = [line for line in lines if line.key not in set(done)]
    settings, model = record["settings"], None
    progress = Progress(len(lines), len(done), hidden=arguments.json or not opened)
    if done and todo and not progress.hidden:
        note(f"{arguments.output}: {len(done)} of {len(lines)} prompts are answered already")
    if record["gptoss_jax"] != __version__ and opened:
        note(f"begun with gptoss_jax {record['gptoss_jax']}, continued with {__version__}")
    if todo:
        options = dataclasses.replace(arguments.model, dtype=settings["dtype"])
        model = load_model(options, quiet=arguments.json, adapter=arguments.adapter)
        adapter = ADAPTER if arguments.adapter else None

        def chosen() -> dict[str, Any]:
            dtype = model.params["embedding"].dtype.name
            date = settings["date"] or datetime.date.today().isoformat()
            seed = secrets.randbits(32) if settings["seed"] is None else settings["seed"]
            settings.update(date=date, seed=seed, dtype=dtype)
            for answers in opened:
                answers.begin(record)
            return settings

        settings = from_first(chosen)
        size = min(arguments.batch_size, 1 << (len(todo) - 1).bit_length())
        with progress:
            for batch in batches(todo, size, lambda line: prepare(line, model, settings)):
                rows = answer(batch, model, size, settings["stop"], progress.tokens, adapter)
                for answers in opened:
                    answers.append(rows)
                progress.answered(rows)
    for answers in opened:
        answers.finish()
        summary = progress.summary()
        summary |= {"output": str(arguments.output), "failed": answers.failed}
        summary |= {"model": record["model"]["name"], "seed": settings["seed"]}
        summary["mesh"] = dict(model.mesh.shape) if model is not None and model.mesh else None
        _print(summary, arguments.json)
        if answers.failed:
            print(
                f"gptoss generate: {answers.failed} of {len(lines)} prompts failed: "
                f"their lines in {arguments.output} have an error",
                file=sys.stderr,
            )
            return 1
    return 0


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, as JSON holds it, in every process; a GptOssError there is
    raised in all, so that none waits.
    """
    import jax

    if jax.process_count() == 1:
        return make()
    from gptoss_jax import hosts

    found = None
    if jax.process_index() == 0:
        try:
            found = {"made": make()}
        except GptOssError as error:
            found = {"error": str(error)}
    found = hosts.same(found)
    if "error" in found:
        raise GptOssError(found["error"])
    return found["made"]


def _print(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    if summary["answered"] == 0:
        print(f"{summary['output']}: all {summary['prompts']} prompts are answered already")
        return
    print(
        f"{summary['output']}: {summary['answered']} of {summary['prompts']} prompts answered now, "
        f"{summary['completion_tokens']:,} tokens in {summary['seconds']:.1f} s, "
        f"{summary['tokens_per_second']:,.0f} tokens/s (compilation included), "
        f"seed {summary['seed']}"
    )
