"""Answer one prompt: the reasoning dimmed, then the answer. With --raw, continue the text as it
stands.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptoss_jax.cli.loading import Effort, ModelArguments, SamplingArguments, load_model, working
from gptoss_jax.errors import GptOssError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss generate`."""

    prompt: tyro.conf.Positional[str]
    """The question; - reads it from standard input."""
    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )
    sampling: Annotated[SamplingArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingArguments
    )
    effort: Effort = "medium"
    """Reasoning effort."""
    max_new_tokens: int | None = None
    """Most tokens to generate; by default the rest of the context (with --raw 64)."""
    instructions: str | None = None
    """The developer's instructions."""
    response_format: Path | None = None
    """File with a JSON schema that the answer is asked to follow."""
    date: str | None = None
    """Date that the model is told, YYYY-MM-DD; by default today."""
    stop: tuple[str, ...] = ()
    """With --raw: strings that end the text."""
    raw: bool = False
    """No conversation: continue the prompt as plain text."""
    hide_reasoning: bool = False
    """Print the answer only."""
    json: bool = False
    """Print one JSON object, for programs."""


def run(arguments: Arguments) -> None:
    """Loads, generates, prints."""
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise GptOssError("the prompt is empty: give at least one token")
    sampling = arguments.sampling.sampling()
    response_format = _schema(arguments.response_format)
    model = load_model(arguments.model, quiet=arguments.json)
    started = time.perf_counter()
    if arguments.raw:
        result = _raw(arguments, model, prompt, sampling)
    else:
        result = _chat(arguments, model, prompt, sampling, response_format)
    result["seconds"] = round(time.perf_counter() - started, 3)
    result["model"] = model.name
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))


def _schema(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise GptOssError(
            f"{path} is not JSON (line {error.lineno}): give a file with a JSON schema"
        ) from None


def _raw(arguments: Arguments, model, prompt: str, sampling) -> dict[str, Any]:
    limit = arguments.max_new_tokens or 64
    pieces, text, tokens = model.stream(prompt, sampling, limit, arguments.stop), "", 0
    if not arguments.json:
        print(prompt, end="", flush=True)
    reason = None
    for piece in pieces:
        text, tokens, reason = text + piece.text, tokens + len(piece.tokens), piece.finish_reason
        if not arguments.json:
            print(piece.text, end="", flush=True)
    if not arguments.json:
        print()
    return {"text": text, "finish_reason": reason, "completion_tokens": tokens}


def _chat(arguments: Arguments, model, prompt: str, sampling, response_format) -> dict[str, Any]:
    from gptoss_jax.chat import Chat
    from gptoss_jax.cli.printing import Printer

    if arguments.stop:
        raise GptOssError("--stop ends plain text: use it with --raw, or leave it out")
    chat = Chat(
        model,
        reasoning_effort=arguments.effort,
        response_format=response_format,
        date=arguments.date,
        instructions=arguments.instructions,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
    )
    events = chat.stream(prompt)
    if arguments.json:
        *_, reply = events
    else:
        with working("reading the prompt (the first run compiles)"):
            first = next(events)
        reply = Printer(hide_reasoning=arguments.hide_reasoning).show(first, events)
    return {
        "final": reply.final,
        "analysis": reply.analysis,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "repairs": reply.repairs,
    }
