"""/v1/completions: text or tokens continued as they stand, without roles or channels.

Control tokens in a text are spelled out; as ids they are refused unless the owner allows them.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from gptoss_jax.batching import requests as batching
from gptoss_jax.completions import Piece, TokenLogprob
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.conversation import EngineFailed, TimedOut
from gptoss_jax.server.errors import DOCUMENTED, bad
from gptoss_jax.server.json_response import JSONResponse, event
from gptoss_jax.server.parameters import SamplingBody, StreamOptions, StrictRoute
from gptoss_jax.server.service import Service
from gptoss_jax.server.shapes import TextCompletion
from gptoss_jax.server.stream import unless_gone
from gptoss_jax.tokenizer import Tokenizer

Id = Annotated[int, Field(ge=0)]
DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(SamplingBody):
    """A text, token ids, or a list of either, to be continued.

    Accepted without effect on the answer, as OpenAI defines it: user.
    """

    model: str | None = None
    prompt: str | list[str] | list[Id] | list[list[Id]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    best_of: Literal[1] | None = None


def router(service: Service) -> APIRouter:
    """The route."""
    out = APIRouter(route_class=StrictRoute, tags=["completions"])
    answers: dict[int | str, dict[str, Any]] = {
        **DOCUMENTED,
        200: {"model": TextCompletion, "content": {"text/event-stream": {}}},
    }

    @out.post("/v1/completions", responses=answers)
    async def create(request: Request, body: CompletionBody) -> Any:
        """Continues a prompt as it stands."""
        return await unless_gone(request, _answer(service, request, body))

    return out


async def _answer(service: Service, request: Request, body: CompletionBody) -> Any:
    adapter = service.adapter(body.model, request)
    prompts = await asyncio.to_thread(_prompts, service, body)
    settings, tokenizer = service.settings, service.engine.tokenizer
    if body.echo and body.logprobs is not None:
        raise bad("echo and logprobs do not go together: prompts have no logprobs here", "echo")
    if body.logprobs is not None and body.logprobs > settings.max_top_logprobs:
        raise bad(f"logprobs is {body.logprobs}: at most {settings.max_top_logprobs}", "logprobs")
    sampling = body.sampling(
        settings,
        tokenizer.vocab_size,
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
    )
    shared = {"stop": body.stops(settings), "adapter": adapter, "priority": body.priority or 0}
    shared["max_new_tokens"] = body.max_tokens or DEFAULT_TOKENS
    if len(prompts) * sampling.n > max(settings.max_n, settings.max_prompts):
        raise bad(
            f"{len(prompts)} prompts of {sampling.n} completions each: at most "
            f"{max(settings.max_n, settings.max_prompts)} in all",
            "n",
        )
    made = [batching.Request(prompt, sampling, **shared) for prompt in prompts]
    texts = _Texts(service, request, made)
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": adapter or service.engine.name,
        "system_fingerprint": None,
    }
    echoed = [tokenizer.decode(prompt) if body.echo else "" for prompt in prompts]
    if body.stream:
        chunks = _stream(texts, head, echoed, body, tokenizer)
        return service.stream(request, chunks, close=texts.close)
    try:
        return JSONResponse(await _whole(texts, head, echoed, body, tokenizer))
    finally:
        texts.close()


def _prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    """The prompts as ids of the vocabulary."""
    given: Any = body.prompt
    tokenizer = service.engine.tokenizer
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 0 < len(given) <= service.settings.max_prompts:
        raise bad(
            f"{len(given)} prompts: give 1 to {service.settings.max_prompts}",
            "prompt",
        )
    special = frozenset(tokenizer.special.values())
    out = []
    for prompt in given:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise bad("the prompt is empty: give at least one token", "prompt")
        for token in ids if not isinstance(prompt, str) else ():
            if token >= tokenizer.vocab_size:
                raise bad(f"{token} is no token id: use 0 to {tokenizer.vocab_size - 1}", "prompt")
            if token in special and not service.settings.allow_control_tokens:
                raise bad(
                    f"{token} is a control token ({tokenizer.decode([token])}): use "
                    "/v1/chat/completions, or start the server with --allow-control-tokens",
                    "prompt",
                )
        if len(ids) >= service.engine.max_context:
            raise bad(
                f"the prompt has {len(ids)} tokens, but the context is "
                f"{service.engine.max_context}: shorten it",
                "prompt",
                "context_length_exceeded",
            )
        out.append(list(ids))
    return out


class _Texts:
    """Generations of several prompts at work: iterate for (choice, piece), choices counted over
    prompts and their completions."""

    def __init__(self, service: Service, request: Request, made: Sequence[batching.Request]):
        self.service, self.request, self.made = service, request, made
        self.n = made[0].sampling.n
        self.open = set(range(self.n * len(made)))
        self.generations: list[batching.Generation] = []
        self.queue: asyncio.Queue = asyncio.Queue()
        self.ends = time.monotonic() + service.settings.request_seconds
        self.completion = 0
        loop = asyncio.get_running_loop()
        record = service.record(request)
        self.observers = [service.observer(record) for _ in made]
        try:
            for place, one in enumerate(made):
                room = service.engine.max_context - len(one.prompt)
                limit = min(one.max_new_tokens or room, room)
                one = dataclasses.replace(one, max_new_tokens=limit)
                self.generations.append(service.engine.submit(one, self._listener(place, loop)))
        except BaseException:
            self.close()
            raise
        record.prompt += self.prompt_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt) for one in self.made)

    @property
    def cached_tokens(self) -> int:
        return sum(generation.cached_tokens for generation in self.generations)

    def _listener(self, place: int, loop: asyncio.AbstractEventLoop) -> batching.Listener:
        def listen(completion: int, came: Piece | batching.Failure) -> None:
            with contextlib.suppress(RuntimeError):  # a closed loop has nobody left to tell
                loop.call_soon_threadsafe(self.queue.put_nowait, (place, completion, came))

        return listen

    def close(self) -> None:
        """Cancels what still runs."""
        for place, generation in enumerate(self.generations):
            if any(place * self.n + i in self.open for i in range(self.n)):
                generation.cancel()
        self.open.clear()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        try:
            while self.open:
                try:
                    async with asyncio.timeout(max(self.ends - time.monotonic(), 0)):
                        place, completion, came = await self.queue.get()
                except TimeoutError:
                    raise TimedOut(
                        "the request took longer than this server allows: ask for fewer tokens"
                    ) from None
                if isinstance(came, batching.Failure):
                    if isinstance(came.error, GptOssError):
                        raise came.error
                    raise EngineFailed from came.error
                if came.finish_reason == "cancelled":
                    raise batching.Closing("the server shut down before the text was complete")
                self.completion += len(came.tokens) + isinstance(came.stop, int)
                self.observers[place](completion, came)
                choice = place * self.n + completion
                if came.finish_reason is not None:
                    self.open.discard(choice)
                    cached = self.generations[place].cached_tokens
                    self.service.account(self.request, came.finish_reason, cached)
                yield choice, came
        finally:
            self.close()

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt_tokens + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


async def _stream(
    texts: _Texts,
    head: dict[str, Any],
    echoed: Sequence[str],
    body: CompletionBody,
    tokenizer: Tokenizer,
) -> AsyncIterator[bytes]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    offsets = [len(echoed[choice // texts.n]) for choice in sorted(texts.open)]
    extra = {"usage": None} if with_usage else {}
    try:
        for number in range(len(offsets)) if body.echo else ():
            text = echoed[number // texts.n]
            choice = {"index": number, "text": text, "logprobs": None, "finish_reason": None}
            yield event({**head, "choices": [choice], **extra})
        async for number, piece in texts:
            choice = {
                "index": number,
                "text": piece.text,
                "logprobs": _logprobs(piece.logprobs, offsets[number], tokenizer, body),
                "finish_reason": piece.finish_reason,
            }
            offsets[number] += len(piece.text)
            yield event({**head, "choices": [choice], **extra})
        if with_usage:
            yield event({**head, "choices": [], "usage": texts.usage()})
        yield event("[DONE]")
    finally:
        texts.close()


async def _whole(
    texts: _Texts,
    head: dict[str, Any],
    echoed: Sequence[str],
    body: CompletionBody,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    pieces: dict[int, list[Piece]] = {choice: [] for choice in sorted(texts.open)}
    async for number, piece in texts:
        pieces[number].append(piece)
    choices = []
    for number, parts in pieces.items():
        before = echoed[number // texts.n]
        found = [logprob for part in parts for logprob in part.logprobs or ()]
        choices.append(
            {
                "index": number,
                "text": before + "".join(part.text for part in parts),
                "logprobs": _logprobs(found, len(before), tokenizer, body),
                "finish_reason": parts[-1].finish_reason,
            }
        )
    return {**head, "choices": choices, "usage": texts.usage()}


def _logprobs(
    found: Sequence[TokenLogprob] | None, offset: int, tokenizer: Tokenizer, body: CompletionBody
) -> dict[str, Any] | None:
    """OpenAI's older shape; a token's offset is where its text begins."""
    if body.logprobs is None:
        return None
    found = found or ()
    tokens = [tokenizer.decode([logprob.token]) for logprob in found]
    offsets, decoder = [], tokenizer.decoder()
    for logprob in found:
        offsets.append(offset)
        offset += len(decoder.feed(logprob.token))
    return {
        "tokens": tokens,
        "token_logprobs": [max(float(logprob.logprob), -9999.0) for logprob in found],
        "top_logprobs": [
            {tokenizer.decode([token]): max(float(value), -9999.0) for token, value in x.top}
            for x in found
        ],
        "text_offset": offsets,
    }
