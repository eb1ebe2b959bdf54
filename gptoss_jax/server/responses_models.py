"""What POST /v1/responses takes: parameters with their bounds, and what is refused by name.

Knows names, types and bounds. Refuses to know what they do.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gptoss_jax.server.errors import bad
from gptoss_jax.server.parameters import (
    Count,
    GeneratingBody,
    Name,
    ObjectFormat,
    Strict,
    TextFormat,
)

REFUSED = {
    "access_programs": "there are none here",
    "context_management": "conversations are never compacted or cut",
    "conversation": "use previous_response_id",
    "image": "gpt-oss reads text only",
    "max_completion_tokens": "use max_output_tokens",
    "max_tokens": "use max_output_tokens",
    "messages": "use input",
    "moderation": "this server moderates nothing",
    "n": "a response is one completion: ask again with another seed",
    "prompt": "there are no stored prompts: send instructions and input",
    "prompt_cache_options": "prefixes are shared by content, without options",
    "reasoning_effort": 'use reasoning {"effort": ...}',
    "response_format": 'use text {"format": ...}',
}
"""OpenAI's parameters that have no meaning here, and those of Chat Completions."""


class Reasoning(Strict):
    """How much the model reasons. There are no summaries: the reasoning itself is in the output;
    `auto` leaves the choice to the server, which makes none. Reasoning is kept back to the last
    answer (current_turn).
    """

    effort: Literal["low", "medium", "high"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto", "current_turn"] | None = None
    mode: Literal["standard"] | None = None


class SchemaFormat(Strict):
    """JSON that is valid under a schema; it always is, `strict` or not."""

    type: Literal["json_schema"]
    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


AnyFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Text(Strict):
    """Form of the answer. gpt-oss has no switch for verbosity: ask for it in the instructions."""

    format: AnyFormat | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(Strict):
    """A function that the model may call. `strict` (true if not given, as OpenAI has it): its
    arguments are always valid under the schema.
    """

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: None = None
    defer_loading: None = None
    output_schema: None = None


class NamedFunction(Strict):
    """A function by its name."""

    type: Literal["function"]
    name: Name


class AllowedTools(Strict):
    """Only these of the tools may be called; the others are not shown to the model."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1)]


AnyChoice = Annotated[NamedFunction | AllowedTools, Field(discriminator="type")]


class ResponseStreamOptions(Strict):
    """Of a stream. `include_obfuscation` fills deltas up to equal lengths; not the default."""

    include_obfuscation: bool | None = None


class CreateResponse(GeneratingBody):
    """A response to make.

    Accepted without effect, and shown again: user, safety_identifier, prompt_cache_key,
    prompt_cache_retention (prefixes are shared by content), max_tool_calls (which counts calls of
    built-in tools, of which there are none). service_tier is always `default`.

    Besides OpenAI's: top_k, min_p, the penalties, logit_bias, seed, stop, priority.
    """

    model: str | None = None
    input: str | list[dict[str, Any]] = Field(
        description="The user's words, or items: message, function_call, function_call_output, "
        "reasoning, item_reference"
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    reasoning: Reasoning | None = None
    text: Text | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | AnyChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Count | None = None
    max_output_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    truncation: Literal["disabled"] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: (
        Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        for name, reason in REFUSED.items():
            if given.get(name) is not None:
                raise bad(
                    f"parameter {name!r} is not supported: {reason}", name, "unsupported_parameter"
                )
        return {name: value for name, value in given.items() if name not in REFUSED}


class TextPart(Strict):
    """Text in a message."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None  # clients' own reading of our text, sent back


class Refusal(Strict):
    """An answer that was a refusal."""

    type: Literal["refusal"]
    refusal: str


class ReasoningText(Strict):
    """Reasoning of the model."""

    type: Literal["reasoning_text"]
    text: str


Status = Literal["in_progress", "completed", "incomplete"]
AnyPart = Annotated[TextPart | Refusal, Field(discriminator="type")]


class MessageItem(Strict):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[AnyPart]
    phase: Literal["commentary", "final_answer"] | None = None
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Strict):
    """The model's reasoning, as it came."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    summary: list[dict[str, Any]] | None = None
    id: str | None = None
    status: Status | None = None


class CallItem(Strict):
    """The model calls a function."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None
    parsed_arguments: Any = None  # clients' own reading of our arguments, sent back


class OutputItem(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[TextPart]
    name: str | None = None
    id: str | None = None
    status: Status | None = None


class ReferenceItem(Strict):
    """A stored item."""

    type: Literal["item_reference"] = "item_reference"
    id: str


Item = MessageItem | ReasoningItem | CallItem | OutputItem | ReferenceItem
ITEMS: dict[str, type[Item]] = {
    "message": MessageItem,
    "reasoning": ReasoningItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "item_reference": ReferenceItem,
}
