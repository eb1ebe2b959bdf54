"""What requests may say about sampling, stops and constraints, and what the engine is told of it.

Every parameter is honoured or refused by name; `null` counts as absent. Those of vLLM that have a
meaning here are accepted beside OpenAI's.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from gptoss_jax.chat.grammar import Choice, Lark, Regex
from gptoss_jax.errors import GptOssError
from gptoss_jax.sampling import Sampling
from gptoss_jax.server.errors import REFUSED, bad
from gptoss_jax.server.settings import ServerSettings

Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Strict(BaseModel):
    """No unknown keys, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Body(Strict):
    """A request's body. A parameter that we know and refuse counts as absent when it is null."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        known = cls.model_fields
        return {
            key: value
            for key, value in given.items()
            if not (value is None and key in REFUSED and key not in known)
        }


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class GeneratingBody(Body):
    """How tokens are chosen, in all endpoints that generate."""

    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    priority: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    stream: bool | None = None
    user: str | None = None

    def sampling(self, settings: ServerSettings, vocab_size: int, **more: Any) -> Sampling:
        """The engine's settings, and `more` of them; ApiError if they cannot be."""
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
                "seed",
            )
            if getattr(self, name) is not None
        }
        values["top_k"] = max(values.get("top_k", 0), 0)  # -1 means all in vLLM's words
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and int(key[:20]) < vocab_size):
                raise bad(
                    f"logit_bias: {key[:20]!r} is no token id: use 0 to {vocab_size - 1}",
                    "logit_bias",
                )
            bias[int(key)] = value
        try:
            return Sampling(logit_bias=bias, **values, **more)
        except GptOssError as error:
            raise bad(str(error), str(error).split(" ", 1)[0].split("[", 1)[0]) from None

    def stops(self, settings: ServerSettings) -> tuple[str, ...]:
        """The stop strings; ApiError if they are too many, too long or empty."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > settings.max_stops:
            raise bad(f"stop has {len(stops)} strings: at most {settings.max_stops}", "stop")
        for stop in stops:
            if not 0 < len(stop) <= settings.max_stop_length:
                raise bad(
                    f"a stop string has {len(stop)} characters: use 1 to "
                    f"{settings.max_stop_length}",
                    "stop",
                )
        return stops


class SamplingBody(GeneratingBody):
    """The same, of completions: there may be several, and ids may end them."""

    n: Count | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    max_tokens: Count | None = None

    def sampling(self, settings: ServerSettings, vocab_size: int, **more: Any) -> Sampling:
        """The engine's settings; ApiError if they go beyond the server's limits."""
        n = self.n or 1
        if n > settings.max_n:
            raise bad(f"parameter 'n' is {n}: this server allows at most {settings.max_n}", "n")
        for token in self.stop_token_ids or ():
            if token >= vocab_size:
                raise bad(
                    f"stop_token_ids: {token} is no token id: use 0 to {vocab_size - 1}",
                    "stop_token_ids",
                )
        ids = tuple(self.stop_token_ids or ())
        if len(ids) > settings.max_stops:
            raise bad(
                f"stop_token_ids has {len(ids)} entries: at most {settings.max_stops}",
                "stop_token_ids",
            )
        return super().sampling(settings, vocab_size, n=n, stop_token_ids=ids, **more)


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Strict):
    """What the answer must match, in vLLM's words."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def guide_of(kind: str, value: Any, settings: ServerSettings, param: str) -> Regex | Choice | Lark:
    """A regex, choice or grammar within the server's limits."""
    if kind == "choice" and not (value and all(value)):
        raise bad(f"{param}: give one or more strings that are not empty", param)
    size = sum(map(len, value))
    if not size:
        raise bad(f"{param}: expected text, got none", param)
    if size > settings.max_schema_bytes:
        raise bad(
            f"{param} has {size} characters: at most {settings.max_schema_bytes} are allowed", param
        )
    if kind == "choice":
        return Choice(tuple(value))
    return Regex(value) if kind == "regex" else Lark(value)


def check_schema(schema: Any, settings: ServerSettings, param: str) -> None:
    """Refuses JSON schemas beyond the server's limits."""
    if depth(schema, settings.max_schema_depth + 1) > settings.max_schema_depth:
        raise bad(
            f"{param}: nested deeper than {settings.max_schema_depth}: make the schema flatter",
            param,
        )
    size = len(json.dumps(schema))
    if size > settings.max_schema_bytes:
        raise bad(
            f"{param} has {size} bytes: at most {settings.max_schema_bytes} are allowed", param
        )


def depth(value: Any, limit: int) -> int:
    """How deep lists and objects are nested, counted up to `limit` without recursion."""
    level, nodes = 0, [value]
    while nodes and level < limit:
        nodes = [
            child
            for node in nodes
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        level += 1
    return level


class StrictRequest(Request):
    """A request whose JSON has no NaN, no infinity and no repeated keys."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = read_json(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its body as StrictRequest does."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def read_json(body: bytes) -> Any:
    """The body's JSON; ApiError 400 for anything else."""

    def refuse(constant: str) -> Any:
        raise bad(
            f"the body holds {constant}, which is not JSON: send numbers", code="invalid_json"
        )

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise bad(f"the number {text[:40]} is too large", code="invalid_json")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise bad(f"the key {twice[:40]!r} comes twice in one object", code="invalid_json")
        return out

    try:
        return json.loads(body, parse_constant=refuse, parse_float=number, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise bad(
            f"the body is not JSON{where}: send one JSON object", code="invalid_json"
        ) from None
