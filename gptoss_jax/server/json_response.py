"""JSON and server-sent events as bytes."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


def to_bytes(value: Any) -> bytes:
    """Compact JSON; lone surrogates, which no UTF-8 has, become `?`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class JSONResponse(Response):
    """An answer of JSON."""

    media_type = "application/json"

    def __init__(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(to_bytes(value), status, headers)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event; `data` is JSON, or text as it is ("[DONE]")."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + (data.encode() if isinstance(data, str) else to_bytes(data)) + b"\n\n"
