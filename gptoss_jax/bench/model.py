"""The model that is measured: a real one, or one of random parameters."""

from gptoss_jax import sharding
from gptoss_jax.bench.weights import random_model
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.hub import TINY
from gptoss_jax.loading import load


def open_model(
    source: str | None = None,
    *,
    random_weights: bool = False,
    layers: int | None = None,
    mesh: sharding.Sizes | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> Model:
    """Loads a model, or makes one up.

    Args:
      source: As `load` takes it, with random weights also gpt-oss-20b or 120b; by default
        gpt-oss-tiny.
      random_weights: Random parameters of the real format and sizes.
      layers: Only so many layers; of random parameters only.
      mesh, dtype, max_context, revision, offline: As `load` takes them.

    Raises:
      GptOssError: As `load`; or layers are left out of a real model.
    """
    shared = {"mesh": mesh, "dtype": dtype, "max_context": max_context}
    if random_weights:
        return random_model(source or TINY, layers=layers, **shared)
    if layers is not None:
        raise GptOssError(
            f"{layers} layers of a real model: it needs all its layers; add --random-weights"
        )
    return load(source or TINY, revision=revision, offline=offline, **shared)
