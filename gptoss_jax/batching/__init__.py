"""Continuous batching: many generations at once over fixed-shape steps. Names load lazily."""

import importlib

_HOMES = {
    "Busy": "requests",
    "Closing": "requests",
    "Engine": "engine",
    "EngineSettings": "settings",
    "Failure": "requests",
    "Request": "requests",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss_jax.batching' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gptoss_jax.batching.{_HOMES[name]}"), name)
