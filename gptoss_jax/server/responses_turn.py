"""From the body of POST /v1/responses to the turn it asks for, and to the response object.

Knows what each parameter means here. Refuses to know items' shapes, answers and HTTP.
"""

from collections.abc import Sequence
from typing import Any

from gptoss_jax.chat.messages import ChatSettings, Message, ResponseFormat, Tool
from gptoss_jax.server.conversation import Turn
from gptoss_jax.server.errors import bad
from gptoss_jax.server.parameters import ObjectFormat, check_schema
from gptoss_jax.server.responses_models import (
    AllowedTools,
    CreateResponse,
    NamedFunction,
    SchemaFormat,
)
from gptoss_jax.server.settings import ServerSettings


def check_together(body: CreateResponse) -> None:
    """Refuses parameters that do not go together."""
    if body.background and body.store is False:
        raise bad("background needs store: leave store out, or true", "background")
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options needs stream: true", "stream_options")


def turn_of(
    body: CreateResponse,
    messages: Sequence[Message],
    settings: ServerSettings,
    vocab_size: int,
    adapter: str | None,
) -> Turn:
    """The turn that a body asks for.

    Args:
      body: The request.
      messages: The whole conversation, earlier responses included; without instructions.
      settings: The server's limits and date.
      vocab_size: Ids of logit_bias are below it.
      adapter: That `model` names.

    Raises ApiError or GptOssError if it cannot be.
    """
    tools, choice = _tools(body, settings)
    top = body.top_logprobs or 0
    if top > settings.max_top_logprobs:
        raise bad(f"top_logprobs is {top}: at most {settings.max_top_logprobs}", "top_logprobs")
    logprobs = top > 0 or "message.output_text.logprobs" in (body.include or ())
    effort = body.reasoning.effort if body.reasoning is not None else None
    return Turn(
        messages,
        ChatSettings(
            reasoning_effort=effort or "medium",
            date=settings.today(),
            instructions=body.instructions,
            tools=tools,
            response_format=_format(body, settings),
        ),
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        sampling=body.sampling(settings, vocab_size, logprobs=logprobs, top_logprobs=top),
        stop=body.stops(settings),
        max_new_tokens=body.max_output_tokens,
        adapter=adapter,
        priority=body.priority or 0,
    )


def _tools(body: CreateResponse, settings: ServerSettings) -> tuple[tuple[Tool, ...], str]:
    """The tools on offer, and the choice in Turn's words."""
    given = body.tools or []
    if len(given) > settings.max_tools:
        raise bad(f"{len(given)} tools: at most {settings.max_tools} are allowed", "tools")
    tools = []
    for place, tool in enumerate(given):
        if tool.parameters is not None:
            check_schema(tool.parameters, settings, f"tools.{place}.parameters")
        strict = tool.strict is not False
        tools.append(Tool(tool.name, tool.description or "", tool.parameters, strict))
    choice = body.tool_choice
    if isinstance(choice, AllowedTools):
        names = {tool.name for tool in choice.tools}
        if unknown := names - {tool.name for tool in tools}:
            raise bad(f"tool_choice allows {min(unknown)!r}, which is no tool", "tool_choice")
        return tuple(tool for tool in tools if tool.name in names), choice.mode
    if isinstance(choice, NamedFunction):
        if choice.name not in [tool.name for tool in tools]:
            raise bad(f"tool_choice names {choice.name!r}, which is no tool", "tool_choice")
        return tuple(tools), f"functions.{choice.name}"
    if choice == "required" and not tools:
        raise bad("tool_choice asks for a call, but there are no tools", "tool_choice")
    return tuple(tools), choice or "auto"


def _format(body: CreateResponse, settings: ServerSettings) -> ResponseFormat | None:
    wanted = body.text.format if body.text is not None else None
    if isinstance(wanted, ObjectFormat):
        return ResponseFormat({"type": "object"})
    if isinstance(wanted, SchemaFormat):
        check_schema(wanted.schema_, settings, "text.format.schema")
        return ResponseFormat(wanted.schema_, wanted.name, wanted.description or "")
    return None


def response_of(
    body: CreateResponse, turn: Turn, id: str, model: str, created: float
) -> dict[str, Any]:
    """The response object before anything has come: what was asked for, with the values in force.

    Args:
      body: The request.
      turn: What it asks for.
      id: Of the response.
      model: Its name, or the adapter's.
      created: Seconds since 1970.
    """
    shown = body.model_dump(by_alias=True, exclude_none=True)
    background = body.background is True
    return {
        "id": id,
        "object": "response",
        "created_at": int(created),
        "completed_at": None,
        "status": "queued" if background else "in_progress",
        "background": background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": turn.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": body.prompt_cache_retention,
        "reasoning": {"effort": turn.settings.reasoning_effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": turn.sampling.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **shown.get("text", {})},
        "tool_choice": shown.get("tool_choice", "auto"),
        "tools": [_tool(tool) for tool in shown.get("tools", ())],
        "top_logprobs": turn.sampling.top_logprobs,
        "top_p": turn.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _tool(shown: dict[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": True, **shown}
