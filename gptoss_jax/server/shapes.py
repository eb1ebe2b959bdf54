"""What answers look like, for the server's OpenAPI description and its tests."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Shape(BaseModel):
    """An answer's part: nothing but what is named here."""

    model_config = ConfigDict(extra="forbid")


class PromptDetails(Shape):
    """Of the prompt's tokens."""

    cached_tokens: int


class CompletionDetails(Shape):
    """Of the completion's tokens."""

    reasoning_tokens: int


class UsageShape(Shape):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogprob(Shape):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    """The token at a place."""

    top_logprobs: list[TopLogprob]


class Logprobs(Shape):
    """Of the visible text."""

    content: list[Logprob]
    refusal: None


class Called(Shape):
    """A function and the arguments it is called with."""

    name: str
    arguments: str


class Call(Shape):
    """A call to be answered by a message of role tool."""

    id: str
    type: Literal["function"]
    function: Called


class Answer(Shape):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str = ""
    reasoning_content: str = ""
    tool_calls: list[Call] = Field(default_factory=list)
    function_call: Called | None = None


class ChatChoice(Shape):
    """One of n answers."""

    index: int
    message: Answer
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class ChatCompletion(Shape):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[ChatChoice]
    usage: UsageShape


class LegacyLogprobs(Shape):
    """Of a text, token by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Shape):
    """One continuation."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextUsage(Shape):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TextCompletion(Shape):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: None
    choices: list[TextChoice]
    usage: TextUsage


class Model(Shape):
    """A name that requests may give as `model`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class Models(Shape):
    """The base model and its adapters."""

    object: Literal["list"]
    data: list[Model]


class Tokens(Shape):
    """A text's or conversation's tokens."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Text(Shape):
    """What tokens spell."""

    prompt: str


class Health(Shape):
    """The server takes requests."""

    status: Literal["ok"]
