"""Prompts of a file -> batches -> answers: one compiled shape, answers that no batch changes.

Knows lines, the model's `generate` and what the output says. Refuses to know files, progress and
processes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gptoss_jax.cli.prompts import Line
from gptoss_jax.errors import GptOssError

WINDOW = 8  # batches whose prompts are sorted by length, so that short ones wait for no long one


@dataclasses.dataclass(frozen=True)
class Job:
    """A line ready for the model, or the reason why it is not."""

    line: Line
    ids: list[int]
    sampling: Any
    error: str | None = None


def prepare(line: Line, model: Any, settings: Mapping[str, Any]) -> Job:
    """The line's token ids and sampling settings.

    A line without a seed of its own gets `own_seed`.
    """
    from gptoss_jax.chat.render import render
    from gptoss_jax.chat.reply import with_stops

    sampling, error, ids = line.sampling, None, []
    if sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=own_seed(settings["seed"], line.key))
    try:
        if settings["raw"]:
            ids = model.tokenizer.encode(line.text)
        else:
            sampling = with_stops(sampling, model.tokenizer)
            dated = dataclasses.replace(line.settings, date=settings["date"])
            ids = render(line.messages, model.tokenizer, dated)
        if len(ids) + (line.max_new_tokens or 1) > model.max_context:
            new = f" and {line.max_new_tokens} new ones" if line.max_new_tokens else ""
            raise GptOssError(
                f"{len(ids)} tokens of the prompt{new} do not fit: the context is "
                f"{model.max_context} tokens"
            )
    except GptOssError as problem:
        error = str(problem)
    return Job(line, ids, sampling, error)


def own_seed(seed: int, key: str) -> int:
    """A seed for one line of a run: the first 8 bytes of the SHA-256 of "seed:id"."""
    digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big")


def batches(
    lines: Sequence[Line], size: int, prepare: Callable[[Line], Job]
) -> Iterator[list[Job]]:
    """The lines in batches: sorted by length inside a window of 8 batches, in the order of the file
    inside a batch.
    """
    for start in range(0, len(lines), WINDOW * size):
        window = [prepare(line) for line in lines[start : start + WINDOW * size]]
        window.sort(key=lambda job: len(job.ids))
        for at in range(0, len(window), size):
            yield sorted(window[at : at + size], key=lambda job: job.line.number)


def answer(
    batch: Sequence[Job],
    model: Any,
    size: int,
    stop: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    adapter: str | None = None,
) -> list[dict[str, Any]]:
    """The answers of a batch, as the output holds them.

    Args:
      batch: At most `size` jobs.
      model: A loaded model.
      size: Rows to compute: a smaller batch is filled up with copies of its last job, which end
        when that one does, so that nothing is compiled again.
      stop: Strings that end raw text.
      progress: Called with numbers of new tokens, those of copies too.
      adapter: Name of one of the model's; None for none.
    """
    good = [job for job in batch if job.error is None]
    if not good:
        return [_row(job, None, model) for job in batch]
    filled = [*good, *[good[-1]] * (size - len(good))]
    own: Any = {"adapter": adapter} if adapter else {}
    try:
        found = model.generate(
            [job.ids for job in filled],
            [job.sampling for job in filled],
            [job.line.max_new_tokens for job in filled],
            stop,
            progress,
            **own,
        )
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise GptOssError(
            f"the device's memory does not hold a batch of {size}: use a smaller --batch-size or "
            "--max-new-tokens, or a larger mesh; the run continues where it stopped"
        ) from error
    completions = dict(zip((job.line.key for job in good), found, strict=False))
    return [_row(job, completions.get(job.line.key), model) for job in batch]


def _row(job: Job, completion: Any, model: Any) -> dict[str, Any]:
    from gptoss_jax.chat.reply import read_reply

    line = job.line
    row: dict[str, Any] = {"id": line.id}
    if job.error is not None:
        row |= {"finish_reason": "error", "error": job.error}
    elif not line.messages:
        stopped = isinstance(completion.stop, int)
        row |= {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(job.ids),
            "completion_tokens": len(completion.tokens) + stopped,
        }
    else:
        functions = [tool.name for tool in line.settings.tools]
        stop, ids = completion.stop, completion.tokens
        reply = read_reply(job.ids, ids, stop, model.tokenizer, functions)
        row |= {"final": reply.final, "analysis": reply.analysis}
        row["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in reply.tool_calls
        ]
        row |= {
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "text": model.tokenizer.decode([*ids, *([stop] if isinstance(stop, int) else [])]),
            "repairs": reply.repairs,
        }
    row["seed"] = job.sampling.seed
    return row if line.metadata is None else {**row, "metadata": line.metadata}
