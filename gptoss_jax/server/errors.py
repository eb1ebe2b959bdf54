"""What clients are told when something is wrong: OpenAI's shape, and which status each mistake has.

Refuses to tell clients what broke inside.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gptoss_jax.batching.requests import Busy, Closing
from gptoss_jax.errors import GptOssError
from gptoss_jax.server.conversation import ContextTooLong, TimedOut
from gptoss_jax.server.json_response import JSONResponse


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is not as it must be"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    404: {"model": ErrorBody, "description": "There is no such model or object"},
    408: {"model": ErrorBody, "description": "The request took too long"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "The queue is full"},
    500: {"model": ErrorBody, "description": "The server failed"},
    503: {"model": ErrorBody, "description": "The server is shutting down"},
}


class ApiError(HTTPException):
    """An error for the client.

    Args:
      status: HTTP's.
      message: What was found, what was expected, what to do.
      param: The parameter that is wrong.
      code: OpenAI's, such as model_not_found.
      headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        fallback = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = KINDS.get(self.status_code, fallback)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake: 400."""
    return ApiError(400, message, param, code)


def of_exception(error: BaseException) -> ApiError:
    """What the client is told of any exception; what is not its business becomes a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return of_faults(error.errors(), error.body)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
    if isinstance(error, Busy):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, Closing):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, TimedOut):
        # clients would otherwise send it again at once
        return ApiError(408, str(error), code="timeout", headers={"x-should-retry": "false"})
    if isinstance(error, ContextTooLong):
        return bad(str(error), "messages", "context_length_exceeded")
    if isinstance(error, GptOssError):
        return bad(str(error))
    return ApiError(500, "the server failed on this request; it is in its log", code="internal")


REFUSED: dict[str, str] = {
    "audio": "gpt-oss writes text only",
    "best_of": "ask for n completions and choose yourself",
    "use_beam_search": "there is no beam search: sample with n",
    "length_penalty": "it belongs to beam search, which there is not",
    "early_stopping": "it belongs to beam search, which there is not",
    "prediction": "predicted outputs are not supported; the server drafts by itself (--drafts)",
    "web_search_options": "this server has no web search: offer a function tool",
    "min_tokens": "not supported: use logit_bias or ask in the prompt",
    "include_stop_str_in_output": "stop strings are never part of the text",
    "skip_special_tokens": "control tokens never appear in a message",
    "spaces_between_special_tokens": "control tokens never appear in a message",
    "prompt_logprobs": "log probabilities are of the answer only",
    "allowed_token_ids": "not supported: use a grammar or logit_bias",
    "bad_words": "not supported: use logit_bias",
    "truncate_prompt_tokens": "prompts are never cut: send a shorter one",
    "add_generation_prompt": "the model always answers next",
    "continue_final_message": "the model always begins a message of its own",
    "add_special_tokens": "prompts get no tokens but those you send",
    "echo": "it belongs to /v1/completions",
    "suffix": "gpt-oss does not fill gaps",
    "chat_template": "conversations are rendered in the harmony format",
    "documents": "put documents into a message",
    "mm_processor_kwargs": "gpt-oss reads text only",
    "guided_json_object": 'use response_format {"type": "json_object"}',
    "guided_decoding_backend": "there is one: llguidance",
    "guided_whitespace_pattern": "not supported: use a grammar",
    "logits_processors": "code is not accepted: use logit_bias",
    "request_id": "the server chooses ids: see the x-request-id header",
    "cache_salt": "cached prefixes are shared by content only",
    "return_token_ids": "not supported: use /tokenize",
    "return_tokens_as_token_ids": "not supported: use /tokenize",
    "kv_transfer_params": "there are no separate prefill servers",
    "response_format": "it belongs to /v1/chat/completions",
    "structured_outputs": "it belongs to /v1/chat/completions",
    "guided_json": "it belongs to /v1/chat/completions",
    "guided_regex": "it belongs to /v1/chat/completions",
    "guided_choice": "it belongs to /v1/chat/completions",
    "guided_grammar": "it belongs to /v1/chat/completions",
    "channel": "channels are the model's",
    "recipient": "recipients are the model's",
    "keep_alive": "the model stays loaded",
    "options": "they are another API's: send the sampling parameters by themselves",
    "think": "use reasoning_effort",
    "typical_p": "not supported: use top_p or min_p",
    "mirostat": "not supported: use top_p or min_p",
    "dry_multiplier": "not supported: use the penalties",
    "n_predict": "use max_completion_tokens",
}
"""Known names of other servers and of OpenAI's other models: why they are not accepted here."""


def of_faults(faults: Sequence[Mapping[str, Any]], body: Any = None) -> ApiError:
    """The error that validation's most precise fault makes; values that were sent are not repeated.

    Args:
      faults: As pydantic lists them; of a union there are faults for each of its members.
      body: What was sent.
    """
    fault = max(faults, key=lambda fault: len(fault["loc"]))
    place = _place(fault, body)
    param, kind = ".".join(place) or None, fault["type"]
    if kind == "extra_forbidden":
        known = REFUSED.get(place[-1], "there is no such parameter here")
        reason = known if len(place) == 1 else "there is no such key here"
        return bad(
            f"parameter {param!r} is not supported: {reason}", param, "unsupported_parameter"
        )
    if kind == "missing" and param is not None:
        return bad(f"parameter {param!r} is required", param, "missing_required_parameter")
    if param is None:
        return bad(
            "the body is not one JSON object: send one, with Content-Type: application/json",
            code="invalid_json",
        )
    message = str(fault["msg"]).removeprefix("Value error, ")
    return bad(f"parameter {param!r}: {message}", param, "invalid_value")


def _place(fault: Mapping[str, Any], body: Any) -> list[str]:
    """Where in the body it is, without pydantic's names of the members of unions."""
    parts, node, out = list(fault["loc"]), body, []
    if parts[:1] and parts[0] in ("body", "query", "path", "header"):
        parts = parts[1:]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif not (last and fault["type"] == "missing"):
            continue
        out.append(str(part))
    return [part[:64] for part in out]


async def handle(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of exceptions."""
    told = of_exception(error)
    request.scope["gptoss.error"] = told
    return told.response()
