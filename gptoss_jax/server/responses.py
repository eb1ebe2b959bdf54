"""/v1/responses: the routes.

Knows parameters of URLs and the shapes of what they answer; the rest is responses_service.py's.
"""

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from gptoss_jax.server.conversation import prompt_of
from gptoss_jax.server.errors import DOCUMENTED, bad
from gptoss_jax.server.json_response import JSONResponse
from gptoss_jax.server.parameters import StrictRoute
from gptoss_jax.server.responses_items import seal
from gptoss_jax.server.responses_models import CreateResponse
from gptoss_jax.server.responses_service import Responses, error_line, event_lines
from gptoss_jax.server.responses_shapes import (
    DeletedShape,
    InputTokensShape,
    ItemsShape,
    ResponseShape,
)
from gptoss_jax.server.service import Service
from gptoss_jax.server.stream import unless_gone

Json = dict[str, Any]
INCLUDE = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
Included = Annotated[list[INCLUDE] | None, Query()]
Brackets = Annotated[list[INCLUDE] | None, Query(alias="include[]", include_in_schema=False)]


def router(service: Service) -> APIRouter:
    """The routes; opens the store of the settings, and closes it with the application."""
    responses = Responses(service)
    out = APIRouter(route_class=StrictRoute, tags=["responses"], lifespan=responses.lifespan)
    errors: dict[int | str, Json] = {status: DOCUMENTED[status] for status in (400, 401, 404, 503)}
    plain: dict[int | str, Json] = {**errors, 200: {"model": ResponseShape}}
    stream: dict[int | str, Json] = {
        200: {"model": ResponseShape, "content": {"text/event-stream": {}}}
    }

    @out.post("/v1/responses", responses={**DOCUMENTED, **stream})
    async def create(request: Request, body: CreateResponse) -> Any:
        """Answers a conversation: at once, as a stream, or in the background."""
        return await unless_gone(request, responses.create(request, body))

    @out.post("/v1/responses/input_tokens", responses={**errors, 200: {"model": InputTokensShape}})
    async def input_tokens(request: Request, body: CreateResponse) -> Any:
        """How many tokens the prompt of a response would have; nothing is made."""
        turn = (await responses.turn(request, body))[0]
        prompt = await asyncio.to_thread(prompt_of, turn, service.engine.tokenizer)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt)})

    @out.post("/v1/responses/compact", responses=errors)
    async def compact() -> Any:
        """Refused: conversations are never compacted."""
        raise bad("conversations are never compacted here: send fewer items")

    @out.get("/v1/responses/{response_id}", responses={**errors, **stream})
    async def retrieve(
        request: Request,
        response_id: str,
        include: Included = None,
        brackets: Brackets = None,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0)] = None,
        include_obfuscation: bool = False,
    ) -> Any:
        """A stored response; with stream=true the events of a background one, from the first or
        after one's sequence_number, as they come."""
        included = [*(include or ()), *(brackets or ())]
        if stream:
            if "reasoning.encrypted_content" in included:
                raise bad("events are as they were made: ask without stream", "include")
            after = -1 if starting_after is None else starting_after
            events = await responses.replay(response_id, after)
            return service.stream(
                request, event_lines(events, include_obfuscation), last=error_line
            )
        if starting_after is not None or include_obfuscation:
            name = "starting_after" if starting_after is not None else "include_obfuscation"
            raise bad(f"{name} needs stream=true", name)
        found = await responses.find(response_id)
        return JSONResponse(_with_sealed(found.response, included))

    @out.delete("/v1/responses/{response_id}", responses={**errors, 200: {"model": DeletedShape}})
    async def delete(response_id: str) -> Any:
        """Forgets a stored response; a background one is cancelled first."""
        await responses.delete(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @out.post("/v1/responses/{response_id}/cancel", responses=plain)
    async def cancel(response_id: str) -> Any:
        """Ends a background response; one that is over already stays as it is."""
        return JSONResponse(await responses.cancel(response_id))

    @out.get(
        "/v1/responses/{response_id}/input_items",
        responses={**errors, 200: {"model": ItemsShape}},
    )
    async def input_items(
        response_id: str,
        after: str | None = None,
        include: Included = None,
        brackets: Brackets = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Any:
        """The items that a response was given, without those of the responses before it."""
        found = await responses.find(response_id)
        items = [*found.input] if order == "asc" else [*reversed(found.input)]
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise bad(f"there is no item {after[:100]!r} in this response", "after")
            items = items[places[0] + 1 :]
        page = items[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(items) > limit,
            }
        )

    return out


def _with_sealed(response: Json, include: Sequence[str]) -> Json:
    """The response, its reasoning packed too if wanted."""
    if "reasoning.encrypted_content" not in include:
        return response
    output = [
        {**item, "encrypted_content": seal("".join(part["text"] for part in item["content"]))}
        if item["type"] == "reasoning"
        else item
        for item in response["output"]
    ]
    return {**response, "output": output}
