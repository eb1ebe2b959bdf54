"""/tokenize and /detokenize: texts and conversations as the model reads them."""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Body as InBody
from pydantic import Discriminator, Field, Tag

from gptoss_jax.server.chat_body import ChatBody
from gptoss_jax.server.conversation import prompt_of
from gptoss_jax.server.errors import DOCUMENTED, bad
from gptoss_jax.server.json_response import JSONResponse
from gptoss_jax.server.parameters import Body, StrictRoute
from gptoss_jax.server.service import Service
from gptoss_jax.server.shapes import Text, Tokens
from gptoss_jax.server.stream import unless_gone


class TextBody(Body):
    """A text to be cut into tokens; control tokens in it are spelled out."""

    model: str | None = None
    prompt: str
    return_token_strs: bool | None = None


class MessagesBody(ChatBody):
    """A conversation to be rendered: the prompt that /v1/chat/completions would read."""

    return_token_strs: bool | None = None


class TokensBody(Body):
    """Tokens to be joined to a text."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


def _kind(given: Any) -> str:
    conversation = isinstance(given, MessagesBody) or (
        isinstance(given, Mapping) and "messages" in given
    )
    return "conversation" if conversation else "text"


TextOrMessages = Annotated[
    Annotated[MessagesBody, Tag("conversation")] | Annotated[TextBody, Tag("text")],
    Discriminator(_kind),
    InBody(),  # FastAPI 0.115 takes a union for a query
]


def router(service: Service) -> APIRouter:
    """The routes."""
    out = APIRouter(route_class=StrictRoute, tags=["tokens"])
    tokenizer = service.engine.tokenizer

    @out.post("/tokenize", responses={**DOCUMENTED, 200: {"model": Tokens}})
    async def tokenize(request: Request, body: TextOrMessages) -> Any:
        """The token ids of a text, or of a conversation as it is rendered for the model."""
        adapter = service.adapter(body.model, request)
        if isinstance(body, TextBody):
            ids = await unless_gone(request, asyncio.to_thread(tokenizer.encode, body.prompt))
        else:
            turn = body.turn(service.settings, tokenizer.vocab_size, adapter)
            ids = await unless_gone(request, asyncio.to_thread(prompt_of, turn, tokenizer))
        answer = {"tokens": ids, "count": len(ids), "max_model_len": service.engine.max_context}
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.decode([token]) for token in ids]
        return JSONResponse(answer)

    @out.post("/detokenize", responses={**DOCUMENTED, 200: {"model": Text}})
    async def detokenize(request: Request, body: TokensBody) -> Any:
        """The text of token ids; control tokens appear by name."""
        service.adapter(body.model, request)
        for token in body.tokens:
            if token >= tokenizer.vocab_size:
                raise bad(f"{token} is no token id: use 0 to {tokenizer.vocab_size - 1}", "tokens")
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})

    return out
