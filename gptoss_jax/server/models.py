"""/v1/models: the base model and its adapters, as names that requests may give."""

from typing import Any

from fastapi import APIRouter

from gptoss_jax.server.errors import DOCUMENTED
from gptoss_jax.server.json_response import JSONResponse
from gptoss_jax.server.service import Service
from gptoss_jax.server.shapes import Model, Models


def router(service: Service) -> APIRouter:
    """The routes."""
    out = APIRouter(tags=["models"])
    errors = {status: DOCUMENTED[status] for status in (401, 404, 503)}

    @out.get("/v1/models", responses={**errors, 200: {"model": Models}})
    async def every() -> Any:
        """Lists the models."""
        data = [_model(service, name) for name in service.models]
        return JSONResponse({"object": "list", "data": data})

    @out.get("/v1/models/{model:path}", responses={**errors, 200: {"model": Model}})
    async def one(model: str) -> Any:
        """Tells of one model."""
        service.check_model(model)
        return JSONResponse(_model(service, model))

    return out


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.engine.name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "gptoss_jax",
        "root": base,
        "parent": None if name == base else base,
        "max_model_len": service.engine.max_context,
    }
