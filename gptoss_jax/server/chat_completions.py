"""/v1/chat/completions: conversation events in the shape of Chat Completions.

Knows the shape only. What is streamed and what is not are the same: the whole answer is the sum of
the deltas that a stream has. One difference: a call that was cut at max tokens is no call in a
whole answer, and cannot be taken back in a stream, whose finish_reason `length` says so.
"""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request

from gptoss_jax.completions import TokenLogprob
from gptoss_jax.server.chat_body import ChatBody
from gptoss_jax.server.conversation import (
    CallDelta,
    CallEnd,
    CallStart,
    Event,
    Finished,
    PreambleDelta,
    ReasoningDelta,
    Running,
    TextDelta,
    Turn,
    Usage,
)
from gptoss_jax.server.errors import DOCUMENTED
from gptoss_jax.server.json_response import JSONResponse, event
from gptoss_jax.server.parameters import StrictRoute
from gptoss_jax.server.service import Service
from gptoss_jax.server.shapes import ChatCompletion
from gptoss_jax.server.stream import unless_gone
from gptoss_jax.tokenizer import Tokenizer


def router(service: Service) -> APIRouter:
    """The route."""
    out = APIRouter(route_class=StrictRoute, tags=["chat"])
    answers: dict[int | str, dict[str, Any]] = {
        **DOCUMENTED,
        200: {"model": ChatCompletion, "content": {"text/event-stream": {}}},
    }

    @out.post("/v1/chat/completions", responses=answers)
    async def create(request: Request, body: ChatBody) -> Any:
        """Answers a conversation, at once or (stream: true) as it is written."""
        return await unless_gone(request, _answer(service, request, body))

    return out


async def _answer(service: Service, request: Request, body: ChatBody) -> Any:
    adapter = service.adapter(body.model, request)
    turn = body.turn(service.settings, service.engine.tokenizer.vocab_size, adapter)
    running = await service.begin(turn, request)
    shape = _Shape(service, body, turn)
    if body.stream:
        chunks = _stream(service, request, running, shape, body)
        return service.stream(request, chunks, close=running.close)
    try:
        return JSONResponse(await _whole(service, request, running, shape))
    finally:
        running.close()


class _Shape:
    """What all chunks of one answer have in common."""

    def __init__(self, service: Service, body: ChatBody, turn: Turn):
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = turn.adapter or service.engine.name
        self.n, self.logprobs = turn.sampling.n, turn.sampling.logprobs
        self.tokenizer = service.engine.tokenizer
        self.choices = [
            _Deltas(self.tokenizer, body.shows_reasoning, body.legacy) for _ in range(self.n)
        ]

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }


class _Deltas:
    """The deltas of one choice: (delta, logprobs of its content).

    Items of one field (several thoughts; a preamble and an answer) have a line break between them.
    """

    def __init__(self, tokenizer: Tokenizer, shows_reasoning: bool, legacy: bool):
        self.tokenizer, self.shows_reasoning, self.legacy = tokenizer, shows_reasoning, legacy
        self.items: dict[str, int] = {}  # field -> the item that wrote it last

    def of(self, given: Event) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """What an event adds; None if nothing."""
        if isinstance(given, ReasoningDelta):
            if not self.shows_reasoning:
                return None
            text = self._joined("reasoning", given)
            return {"reasoning": text, "reasoning_content": text}, []
        if isinstance(given, TextDelta | PreambleDelta):
            text = self._joined("content", given)
            return {"content": text}, [logprob_dict(x, self.tokenizer) for x in given.logprobs]
        if isinstance(given, CallStart):
            function = {"name": given.name, "arguments": ""}
            if self.legacy:
                return {"function_call": function}, []
            call = {"index": given.index, "id": given.id, "type": "function", "function": function}
            return {"tool_calls": [call]}, []
        if isinstance(given, CallDelta):
            function = {"arguments": given.text}
            if self.legacy:
                return {"function_call": function}, []
            return {"tool_calls": [{"index": given.index, "function": function}]}, []
        return None

    def reason(self, finished: Finished) -> str:
        called = finished.reason == "tool_calls"
        return "function_call" if called and self.legacy else finished.reason

    def _joined(self, field: str, given: Any) -> str:
        before = self.items.get(field, given.item)
        self.items[field] = given.item
        return given.text if before == given.item else "\n" + given.text


async def _stream(
    service: Service, request: Request, running: Running, shape: _Shape, body: ChatBody
) -> AsyncIterator[bytes]:
    """The chunks as server-sent events, then [DONE]."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = shape.head("chat.completion.chunk")

    def chunk(number: int, delta: dict[str, Any], logprobs: Any = None, reason: Any = None):
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    usages: list[Usage] = []
    try:
        for number in range(shape.n):
            yield chunk(number, {"role": "assistant", "content": ""})
        async for number, given in running:
            deltas = shape.choices[number]
            if isinstance(given, Finished):
                usages.append(given.usage)
                service.account(request, given.reason, given.usage.cached)
                yield chunk(number, {}, reason=deltas.reason(given))
            elif (made := deltas.of(given)) is not None:
                delta, logprobs = made
                yield chunk(number, delta, _logprobs(logprobs, shape, "content" in delta))
        if with_usage:
            yield event({**head, "choices": [], "usage": usage_dict(usages)})
        yield event("[DONE]")
    finally:
        running.close()


async def _whole(
    service: Service, request: Request, running: Running, shape: _Shape
) -> dict[str, Any]:
    """The answer when it is complete."""
    texts: list[dict[str, list[str]]] = [{} for _ in range(shape.n)]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in range(shape.n)]
    calls: list[list[CallEnd]] = [[] for _ in range(shape.n)]
    finished: dict[int, Finished] = {}
    async for number, given in running:
        if isinstance(given, Finished):
            finished[number] = given
            service.account(request, given.reason, given.usage.cached)
        elif isinstance(given, CallEnd) and given.complete:
            calls[number].append(given)
        elif isinstance(given, ReasoningDelta | TextDelta | PreambleDelta):
            made = shape.choices[number].of(given)
            for field, text in made[0].items() if made else ():
                texts[number].setdefault(field, []).append(text)
            logprobs[number] += made[1] if made else []
    choices = []
    for number in range(shape.n):
        fields = {field: "".join(parts) for field, parts in texts[number].items()}
        deltas = shape.choices[number]
        message = {
            "role": "assistant",
            "content": fields.get("content", None if calls[number] else ""),
            "refusal": None,
            **{key: text for key, text in fields.items() if key != "content"},
            **_calls(calls[number], deltas.legacy),
        }
        choices.append(
            {
                "index": number,
                "message": message,
                "logprobs": _logprobs(logprobs[number], shape, True),
                "finish_reason": deltas.reason(finished[number]),
            }
        )
    usage = usage_dict([finished[number].usage for number in range(shape.n)])
    return {**shape.head("chat.completion"), "choices": choices, "usage": usage}


def _calls(calls: Sequence[CallEnd], legacy: bool) -> dict[str, Any]:
    if not calls:
        return {}
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    if legacy:
        return {"function_call": functions[0]}
    both = zip(calls, functions, strict=True)
    return {"tool_calls": [{"id": c.id, "type": "function", "function": f} for c, f in both]}


def _logprobs(given: list[dict[str, Any]], shape: _Shape, content: bool) -> dict[str, Any] | None:
    return {"content": given, "refusal": None} if shape.logprobs and content else None


def logprob_dict(given: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token's log probability in OpenAI's shape; the tokens' bytes add up to the text's."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.decode_bytes([token])
        # JSON has no minus infinity: OpenAI writes -9999.0
        value = max(float(logprob), -9999.0)
        return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

    top = [one(token, logprob) for token, logprob in given.top]
    return {**one(given.token, given.logprob), "top_logprobs": top}


def usage_dict(usages: Sequence[Usage]) -> dict[str, Any]:
    """The usage of one request's completions: they share a prompt."""
    prompt = max(usage.prompt for usage in usages)
    completion = sum(usage.completion for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": max(usage.cached for usage in usages)},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning for u in usages)},
    }
