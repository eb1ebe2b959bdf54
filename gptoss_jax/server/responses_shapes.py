"""What answers of /v1/responses look like, for the server's OpenAPI description and its tests."""

from typing import Annotated, Any, Literal

from pydantic import Field

from gptoss_jax.server.shapes import Logprob, Shape

Ended = Literal["in_progress", "completed", "incomplete"]


class InputTextShape(Shape):
    """A part of a message that the model reads."""

    type: Literal["input_text"]
    text: str


class OutputTextShape(Shape):
    """A part of the assistant's message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[Logprob]


class RefusalShape(Shape):
    """A refusal that a client sent back."""

    type: Literal["refusal"]
    refusal: str


class ReasoningTextShape(Shape):
    """The reasoning itself."""

    type: Literal["reasoning_text"]
    text: str


class InputMessageShape(Shape):
    """A message of the user or developer."""

    type: Literal["message"]
    id: str
    role: Literal["user", "system", "developer"]
    content: list[InputTextShape]
    status: Ended


class MessageShape(Shape):
    """A message of the assistant: its answer, or what it says before a call (commentary)."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    content: list[OutputTextShape | RefusalShape]
    status: Ended
    phase: Literal["commentary", "final_answer"] | None = None


class ReasoningShape(Shape):
    """The model's reasoning. encrypted_content packs the same text, if included."""

    type: Literal["reasoning"]
    id: str
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningTextShape]
    encrypted_content: str | None = None
    status: Ended


class CallShape(Shape):
    """A call, to be answered by a function_call_output unless it is incomplete."""

    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: Ended


class CallOutputShape(Shape):
    """What a function returned."""

    type: Literal["function_call_output"]
    id: str
    call_id: str
    output: str | list[InputTextShape]
    status: Ended


OutputShape = MessageShape | ReasoningShape | CallShape


class ItemsShape(Shape):
    """Items of a response's input."""

    object: Literal["list"]
    data: list[InputMessageShape | OutputShape | CallOutputShape]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedShape(Shape):
    """A response that is gone."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputTokensShape(Shape):
    """How many tokens a prompt has."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class FailureShape(Shape):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class IncompleteShape(Shape):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class InputDetailsShape(Shape):
    """Of the prompt's tokens; what is written to the cache is not counted."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputDetailsShape(Shape):
    """Of the completion's tokens."""

    reasoning_tokens: int


class ResponseUsageShape(Shape):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetailsShape
    output_tokens: int
    output_tokens_details: OutputDetailsShape
    total_tokens: int


class ResponseReasoningShape(Shape):
    """How much the model reasoned."""

    effort: Literal["low", "medium", "high"]
    summary: None


class ResponseShape(Shape):
    """A response: what was asked for, with the values in force, and what came of it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: FailureShape | None
    incomplete_details: IncompleteShape | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputShape]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: ResponseReasoningShape
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsageShape | None
    user: str | None
