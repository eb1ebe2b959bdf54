"""The chat page: static files that speak to /v1 from the browser, and the headers to serve them
with.

Knows its files and what they are allowed to do. Refuses to know the API: chat.js speaks it.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}

CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        # a notebook on the same machine may embed the page
        "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""Nothing but the page's own files and the server's own API; no text ever becomes HTML."""

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""For each response with one of the files."""


@dataclasses.dataclass(frozen=True)
class File:
    """One file: `tag` changes when the content does (an ETag)."""

    content: bytes
    media_type: str
    tag: str


@functools.cache
def files() -> Mapping[str, File]:
    """The files by the path to serve them at: "/" is the page, the others are below "/page/".

    They hold nothing secret: a page that asks for a key must open without one.
    """
    found = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            at = "/" if path.name == "index.html" else f"/page/{path.name}"
            found[at] = File(content, _TYPES[path.suffix], tag)
    return found


def routes() -> list[Route]:
    """The routes of the files, for an application's router; unchanged files are answered with
    304."""
    return [
        Route(path, _sender(file), methods=["GET"], include_in_schema=False)
        for path, file in files().items()
    ]


def _sender(file: File) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        headers = {**HEADERS, "ETag": file.tag}
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send
