"""/v1/embeddings: refused with the reason, so that clients need not guess."""

from typing import Any

from fastapi import APIRouter

from gptoss_jax.server.errors import DOCUMENTED, bad
from gptoss_jax.server.service import Service


def router(service: Service) -> APIRouter:
    """The route."""
    del service
    out = APIRouter(tags=["models"])
    errors: dict[int | str, Any] = {status: DOCUMENTED[status] for status in (400, 401, 413, 503)}

    @out.post("/v1/embeddings", responses=errors)
    async def refuse() -> Any:
        """Always 400: gpt-oss generates text and has no embeddings of texts."""
        raise bad(
            "gpt-oss generates text and has no text embeddings: use an embedding model",
            "model",
            "model_not_supported",
        )

    return out
