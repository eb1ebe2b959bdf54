"""The body of /v1/chat/completions, and the turn it asks for.

Knows OpenAI's parameters, vLLM's beside them, and what each means here. Refuses to know answers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from gptoss_jax.chat.grammar import Choice, Lark, Regex
from gptoss_jax.chat.messages import ChatSettings, ResponseFormat, Tool, from_openai
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.conversation import Turn
from gptoss_jax.server.errors import bad
from gptoss_jax.server.parameters import (
    Count,
    Name,
    ObjectFormat,
    SamplingBody,
    StreamOptions,
    Strict,
    StructuredOutputs,
    TextFormat,
    check_schema,
    guide_of,
    read_json,
)
from gptoss_jax.server.settings import ServerSettings

Effort = Literal["low", "medium", "high"]


Kind = Literal["text", "input_text", "output_text", "refusal"]


class Part(Strict):
    """A part of a message's content; gpt-oss reads text only."""

    type: Kind = "text"
    text: str | None = None
    refusal: str | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _text_only(cls, given: Any) -> Any:
        if isinstance(given, str) and given not in get_args(Kind):
            raise ValueError(f"content of type {given[:40]!r} is not supported: gpt-oss reads text")
        return given


Content = str | list[Part]


class CalledFunction(Strict):
    """The function that a call names."""

    name: str
    arguments: str | None = None
    parsed_arguments: Any = None  # clients' own reading of our arguments, sent back


class ToolCall(Strict):
    """A call that the model has made."""

    id: str | None = None
    type: Literal["function"] | None = "function"
    index: int | None = None
    function: CalledFunction


class SystemMessage(Strict):
    """The owner's or developer's words; both become harmony's developer message."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(Strict):
    """The user's words."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Strict):
    """What the model has said, thought and called."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
    name: Name | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: CalledFunction | None = None
    reasoning: Content | None = None
    reasoning_content: Content | None = None
    thinking: Content | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    parsed: Any = None  # clients' own reading of our content, sent back


class ToolMessage(Strict):
    """A tool's result."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


class FunctionMessage(Strict):
    """A function's result, as it was before there were tools."""

    role: Literal["function"]
    content: str
    name: Name


AnyMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]


class FunctionTool(Strict):
    """A function the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Strict):
    """A tool on offer."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Strict):
    """A function by its name."""

    name: str


class NamedTool(Strict):
    """A tool by its name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedToolsChoice(Strict):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Strict):
    """A named JSON schema; it is always enforced, `strict` or not."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


AnyFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Reasoning(Strict):
    """How long to think, and whether to show it."""

    effort: Effort | None = None
    exclude: bool | None = None


class TemplateArguments(Strict):
    """What other servers give their chat template."""

    reasoning_effort: Effort | None = None


class ChatBody(SamplingBody):
    """A conversation to answer.

    Accepted without effect on the answer, as OpenAI defines them: user, metadata, store (false),
    service_tier, safety_identifier, prompt_cache_key, prompt_cache_retention.
    """

    model: str | None = None
    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    response_format: AnyFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    tools: list[ToolSpec] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionTool] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def legacy(self) -> bool:
        """Are calls asked for in the words from before there were tools?"""
        return bool(self.functions)

    @property
    def shows_reasoning(self) -> bool:
        excluded = self.reasoning is not None and self.reasoning.exclude
        return self.include_reasoning is not False and not excluded

    def turn(self, settings: ServerSettings, vocab_size: int, adapter: str | None) -> Turn:
        """The turn that this body asks for; ApiError or GptOssError if it cannot be."""
        if len(self.messages) > settings.max_messages:
            raise bad(
                f"the conversation has {len(self.messages)} messages: at most "
                f"{settings.max_messages} are allowed",
                "messages",
            )
        try:
            messages = from_openai([_plain(message) for message in self.messages])
        except GptOssError as error:
            raise bad(f"messages: {error}", "messages") from None
        tools, choice = self._tools(settings)
        guide = self._guide(settings)
        json_format = guide if isinstance(guide, ResponseFormat) else None
        sampling = self.sampling(settings, vocab_size, **self._logprobs(settings))
        if self.max_tokens and self.max_completion_tokens:
            if self.max_tokens != self.max_completion_tokens:
                raise bad("max_tokens and max_completion_tokens differ: give one", "max_tokens")
        return Turn(
            messages,
            ChatSettings(
                reasoning_effort=self._effort(),
                date=settings.today(),
                tools=tools,
                response_format=json_format,
            ),
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls is not False and not self.legacy,
            guide=None if isinstance(guide, ResponseFormat) else guide,
            sampling=sampling,
            stop=self.stops(settings),
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            adapter=adapter,
            priority=self.priority or 0,
        )

    def _effort(self) -> str:
        spelled = {
            "reasoning_effort": self.reasoning_effort,
            "reasoning.effort": self.reasoning and self.reasoning.effort,
            "chat_template_kwargs.reasoning_effort": self.chat_template_kwargs
            and self.chat_template_kwargs.reasoning_effort,
        }
        given = {name: effort for name, effort in spelled.items() if effort}
        if len(set(given.values())) > 1:
            raise bad(f"{' and '.join(given)} differ: give one", "reasoning_effort")
        return next(iter(given.values()), "medium")

    def _logprobs(self, settings: ServerSettings) -> dict[str, Any]:
        top = self.top_logprobs or 0
        if top and not self.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        if top > settings.max_top_logprobs:
            raise bad(f"top_logprobs is {top}: at most {settings.max_top_logprobs}", "top_logprobs")
        return {"logprobs": bool(self.logprobs), "top_logprobs": top}

    def _tools(self, settings: ServerSettings) -> tuple[tuple[Tool, ...], str]:
        """The tools on offer, and the choice in Turn's words."""
        if self.legacy and (self.tools or self.tool_choice is not None):
            raise bad("functions and tools do not go together: give tools", "functions")
        if self.function_call is not None and not self.legacy:
            raise bad("function_call needs functions: give tools and tool_choice", "function_call")
        param = "functions" if self.legacy else "tools"
        given = self.functions if self.functions else [tool.function for tool in self.tools or ()]
        if len(given) > settings.max_tools:
            raise bad(f"{len(given)} tools: at most {settings.max_tools} are allowed", param)
        for place, tool in enumerate(given):
            if tool.parameters is not None:
                check_schema(tool.parameters, settings, f"{param}.{place}.parameters")
        tools = [
            Tool(tool.name, tool.description or "", tool.parameters, tool.strict is True)
            for tool in given
        ]
        asked = self.function_call if self.legacy else self.tool_choice
        if isinstance(asked, AllowedToolsChoice):
            names = {tool.function.name for tool in asked.allowed_tools.tools}
            if unknown := names - {tool.name for tool in tools}:
                raise bad(f"tool_choice allows {min(unknown)!r}, which is no tool", "tool_choice")
            tools, choice = [t for t in tools if t.name in names], asked.allowed_tools.mode
        elif isinstance(asked, NamedTool):
            choice = f"functions.{asked.function.name}"
        elif isinstance(asked, NamedFunction):
            choice = f"functions.{asked.name}"
        else:
            choice = asked or "auto"
        if choice not in ("auto", "none") and not tools:
            raise bad("tool_choice asks for a call, but there are no tools", "tool_choice")
        return tuple(tools), choice

    def _guide(self, settings: ServerSettings) -> ResponseFormat | Regex | Choice | Lark | None:
        """What the answer must be, in whichever words."""
        asked = self.structured_outputs
        words: dict[str, tuple[str, Any]] = {
            "guided_json": ("json", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", self.guided_choice),
            "guided_grammar": ("grammar", self.guided_grammar),
            "structured_outputs.json": ("json", asked and asked.json_schema),
            "structured_outputs.regex": ("regex", asked and asked.regex),
            "structured_outputs.choice": ("choice", asked and asked.choice),
            "structured_outputs.grammar": ("grammar", asked and asked.grammar),
        }
        given = {param: pair for param, pair in words.items() if pair[1] is not None}
        shape = self.response_format
        if isinstance(shape, TextFormat):
            shape = None
        if len(given) + (shape is not None) > 1:
            names = [*(["response_format"] if shape is not None else []), *given]
            raise bad(f"{' and '.join(names)} do not go together: give one", names[0])
        if isinstance(shape, ObjectFormat):
            return ResponseFormat({"type": "object"})
        if isinstance(shape, SchemaFormat):
            body = shape.json_schema
            check_schema(body.schema_, settings, "response_format.json_schema.schema")
            return ResponseFormat(body.schema_, body.name, body.description or "")
        for param, (kind, value) in given.items():
            if kind != "json":
                return guide_of(kind, value, settings, param)
            schema = read_json(value.encode()) if isinstance(value, str) else value
            if not isinstance(schema, Mapping):
                raise bad(f"{param}: expected a JSON schema (an object)", param)
            check_schema(schema, settings, param)
            return ResponseFormat(schema)
        return None


_OWN: Any = {  # what clients made of our answers, or we of nothing
    "parsed": True,
    "audio": True,
    "annotations": True,
    "tool_calls": {"__all__": {"index": True, "function": {"parsed_arguments"}}},
    "function_call": {"parsed_arguments"},
}


def _plain(message: Any) -> dict[str, Any]:
    """A message as chat.from_openai reads it: without what is absent or the clients' own."""
    return message.model_dump(exclude_none=True, exclude=_OWN)
