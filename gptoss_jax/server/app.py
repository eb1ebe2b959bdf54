"""The server as an ASGI application: routes, and what stands before them.

From outside to inside: the account of the request (log, metrics, drain, what breaks), CORS if
wanted, the API key, the body's size, then the routes.
"""

import re
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss_jax.batching.requests import BatchingEngine
from gptoss_jax.errors import GptOssError
from gptoss_jax.server import (
    chat_completions,
    completions,
    embeddings,
    models,
    page,
    responses,
    tokens,
)
from gptoss_jax.server.errors import DOCUMENTED, ApiError, handle, of_exception
from gptoss_jax.server.json_response import JSONResponse
from gptoss_jax.server.security import Authentication, BodyLimit, Hosts
from gptoss_jax.server.service import Record, Service, report
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.server.shapes import Health
from gptoss_jax.server.stream import ClientGone


def create_app(engine: BatchingEngine, settings: ServerSettings | None = None) -> FastAPI:
    """The application; `app.state.service` is its Service.

    Args:
      engine: Makes the tokens. The application does not close it.
      settings: Keys, limits, dates.
    """
    from gptoss_jax import __version__

    service = Service(engine, settings)
    settings = service.settings
    middleware: list[Middleware] = [Middleware(Account, service=service)]
    if settings.cors_origins:
        cors: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        origins = list(settings.cors_origins)
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, **cors))
    middleware += [
        Middleware(Hosts, names=settings.hosts),
        Middleware(Authentication, keys=settings.api_keys, pages=tuple(page.files())),
        Middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.body_seconds),
    ]
    app = FastAPI(
        title="gptoss",
        description="OpenAI's API over gpt-oss models in JAX",
        version=__version__,
        middleware=middleware,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.service = service
    for kind in (RequestValidationError, HTTPException, GptOssError):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(405, _not_allowed)
    for module in (chat_completions, completions, responses, models, tokens, embeddings):
        app.include_router(module.router(service))
    app.include_router(_plain(service))
    app.router.routes.extend(page.routes())
    app.openapi = lambda: _openapi(app)
    return app


def _plain(service: Service) -> APIRouter:
    """/health and /metrics."""
    router = APIRouter()

    @router.get(
        "/health", responses={200: {"model": Health}, 503: DOCUMENTED[503]}, tags=["server"]
    )
    async def health() -> Any:
        """200 while requests are taken; 503 while the server shuts down."""
        if service.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return JSONResponse({"status": "ok"})

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: DOCUMENTED[401]},
        tags=["server"],
    )
    async def metrics() -> Any:
        """Numbers in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


async def _not_allowed(request: Request, error: Exception) -> Response:
    """405 with all methods of the path: a route alone knows only its own."""
    told, path = of_exception(error), request.url.path
    paths = request.app.openapi()["paths"]
    matching = [path] if path in paths else [t for t in paths if _matches(t, path)]
    methods = {method.upper() for template in matching for method in paths[template]}
    if methods:
        told.headers = {"Allow": ", ".join(sorted(methods))}
    return told.response()


def _matches(template: str, path: str) -> bool:
    return re.fullmatch(re.sub(r"\\\{[^}]*\}", "[^/]+", re.escape(template)), path) is not None


def _openapi(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description; validation errors are 400 in OpenAI's shape, not FastAPI's 422."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        components = schema.setdefault("components", {})
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema


class Account:
    """Keeps the account of every request, and answers what nobody else has answered."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope["gptoss.record"] = Record(scope["path"])
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", record.id.encode()),
                ]
            await send(message)

        self.service.running += 1
        try:
            if self.service.draining and scope["path"] != "/health":
                closing = ApiError(
                    503,
                    "the server is shutting down: try another",
                    code="shutting_down",
                    headers={"Retry-After": "5", "Connection": "close"},
                )
                await closing.response()(scope, receive, noting)
            else:
                await self.app(scope, receive, noting)
        except ClientGone:
            record.status = record.status or 499
            record.finish.append("disconnected")
        except Exception as error:
            report(error, record)
            if not started:
                await of_exception(error).response()(scope, receive, noting)
        finally:
            self.service.running -= 1
            self._note(scope, record)

    def _note(self, scope: Scope, record: Record) -> None:
        metrics, route = self.service.metrics, scope.get("route")
        # the template, not the path: paths that clients make up are no labels
        label = getattr(route, "path", None) or "other"
        metrics.requests.labels(label, str(record.status)).inc()
        metrics.duration.labels(label).observe(time.perf_counter() - record.started)
        if record.prompt:
            metrics.prompt_tokens.observe(record.prompt)
            metrics.completion_tokens.observe(record.completion)
        if self.service.settings.log:
            print(record.line(), flush=True)
