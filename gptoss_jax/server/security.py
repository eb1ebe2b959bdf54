"""Who may call, and how much they may send: API keys and the size of bodies, before anything is
parsed.

Pure ASGI, so that every route has them, also those that do not exist.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.errors import GptOssError
from gptoss_jax.server.errors import ApiError

KEYS_VARIABLE = "GPTOSS_API_KEYS"
OPEN = ("/health",)


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys of a file (one a line, # begins a comment) and of the variable GPTOSS_API_KEYS
    (commas between them)."""
    found = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        keys = [line.strip() for line in lines if not line.strip().startswith("#")]
        if not any(keys):
            raise GptOssError(f"{file} holds no API key: write one a line")
        found += keys
    return tuple(dict.fromkeys(key for key in found if key))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, keys: Sequence[str], no_auth: bool) -> None:
    """Refuses to serve other machines without a key unless told to."""
    if not keys and not no_auth and not is_loopback(host):
        raise GptOssError(
            f"--host {host} is reachable from other machines and there is no API key: give "
            f"--api-key-file or {KEYS_VARIABLE}, or say --no-auth"
        )


class Hosts:
    """Refuses requests for other names than the server's (DNS rebinding).

    Args:
      app: What is behind.
      names: Allowed names; none: all are.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str]):
        self.app, self.names = app, frozenset(name.lower().strip("[]") for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.names:
            try:
                name = urlsplit("//" + Headers(scope=scope).get("host", "")).hostname
            except ValueError:  # brackets that are no address
                name = None
            if name not in self.names:
                refusal = ApiError(
                    403,
                    f"this server is not {(name or '')[:100]!r}: call it by its own name, or start "
                    "it with --allowed-host",
                    code="wrong_host",
                )
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Authentication:
    """Asks for a key on every path but the open ones; compares it with every key in constant time.

    Args:
      app: What is behind.
      keys: Valid ones; none: nobody is asked.
      pages: Paths of static files, which hold no secrets and may be read without a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], pages: Sequence[str] = ()):
        self.app, self.pages = app, frozenset(pages)
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.digests and not self._may(scope):
            refusal = ApiError(
                401,
                "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            scope["gptoss.error"] = refusal
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in OPEN or (path in self.pages and scope["method"] in ("GET", "HEAD")):
            return True
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        # no early end: the time says nothing about which key nearly fits
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return kind.lower() == "bearer" and any(matches)


class BodyLimit:
    """Reads bodies up to a limit of bytes and time, then hands them on; more is refused while it
    comes, whatever its headers say."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float):
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            scope["gptoss.error"] = error
            await error.response()(scope, receive, send)
            return
        if body is None:  # gone
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.limit:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limit:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {self.seconds:g} seconds: send it again",
                code="timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self.limit} bytes: send a shorter conversation",
            code="body_too_large",
            headers={"Connection": "close"},
        )
