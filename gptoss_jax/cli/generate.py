"""Answer a prompt, or many. One: the reasoning dimmed, then the answer. Many: --input FILE --output
FILE, one JSON object a line. With --raw, continue the text as it stands.

Lines of --input: {"prompt": "..."} or {"messages": [...]} (OpenAI's), if wanted with id,
reasoning_effort, instructions, tools, response_format, max_new_tokens, temperature, top_p, seed and
the other sampling settings, and metadata (anything; passed on). Lines of --output: id, final,
analysis, tool_calls, finish_reason, prompt_tokens, completion_tokens, text (as the model wrote it),
repairs, seed. Answers are written batch by batch; the same command continues an interrupted run,
with another --mesh or --batch-size too. A finished file is in the order of the input.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptoss_jax.cli.loading import (
    ADAPTER,
    Effort,
    ModelArguments,
    SamplingArguments,
    load_model,
    working,
)
from gptoss_jax.errors import GptOssError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss generate`."""

    prompt: tyro.conf.Positional[str | None] = None
    """The question; - reads it from standard input."""
    input: Path | None = None
    """Many prompts: a file with one JSON object a line."""
    output: Path | None = None
    """With --input: the file of the answers. What they are of stands in OUTPUT.run.json."""
    batch_size: int = 16
    """With --input: prompts answered at once. A batch lasts as long as its longest answer."""
    overwrite: bool = False
    """With --input: forget the answers that --output holds."""
    model: Annotated[ModelArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ModelArguments
    )
    sampling: Annotated[SamplingArguments, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingArguments
    )
    adapter: Path | None = None
    """Answer with an adapter: the folder of a run of gptoss finetune, or of an adapter, ours or
    peft's.
    """
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


def run(arguments: Arguments) -> int:
    """Loads, generates, prints."""
    if wrong := _misused(arguments):
        print(f"gptoss generate: {wrong}", file=sys.stderr)
        return 2
    if arguments.stop and not arguments.raw:
        raise GptOssError("--stop ends plain text: use it with --raw, or leave it out")
    if arguments.input is not None:
        from gptoss_jax.cli import batch_generate

        schema = _schema(arguments.response_format)
        return batch_generate.run(arguments, arguments.sampling.sampling(), schema)
    assert arguments.prompt is not None
    prompt = _stdin() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise GptOssError("the prompt is empty: give at least one token")
    sampling = arguments.sampling.sampling()
    response_format = _schema(arguments.response_format)
    model = load_model(arguments.model, quiet=arguments.json, adapter=arguments.adapter)
    started = time.perf_counter()
    if arguments.raw:
        result = _raw(arguments, model, prompt, sampling)
    else:
        result = _chat(arguments, model, prompt, sampling, response_format)
    result["seconds"] = round(time.perf_counter() - started, 3)
    result["model"] = model.name
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _stdin() -> str:
    """What process 0 is given, if there are several."""
    from gptoss_jax import hosts

    return hosts.from_first(sys.stdin.read)


def _misused(arguments: Arguments) -> str | None:
    """Why the options do not go together."""
    many = arguments.input is not None
    if many == (arguments.prompt is not None):
        both = "either a prompt or --input, not both" if many else "a prompt is required"
        return f'{both}: gptoss generate "..." or gptoss generate --input FILE --output FILE'
    if many and arguments.output is None:
        return "--input needs --output: the file that the answers are written to"
    if many and arguments.hide_reasoning:
        return "--hide-reasoning is for one prompt: with --input leave it out"
    if not many and (arguments.output is not None or arguments.overwrite):
        return "--output and --overwrite need --input: a file of prompts"
    if arguments.batch_size < 1:
        return f"--batch-size is {arguments.batch_size}: expected a positive integer"
    return None


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
    adapter = ADAPTER if arguments.adapter else None
    pieces = model.stream(prompt, sampling, limit, arguments.stop, adapter=adapter)
    text, tokens = "", 0
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

    chat = Chat(
        model,
        reasoning_effort=arguments.effort,
        response_format=response_format,
        date=arguments.date,
        instructions=arguments.instructions,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        adapter=ADAPTER if arguments.adapter else None,
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
