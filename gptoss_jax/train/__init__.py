"""Training: fine-tuning in one call (`finetune`), and the recipe of gpt-oss-tiny with its
evaluation. Names are imported when first used.
"""

import importlib

_HOMES = {
    "Data": "loop",
    "OptimizerSettings": "settings",
    "Result": "loop",
    "SampleSettings": "samples",
    "Settings": "settings",
    "finetune": "loop",
    "load_data": "loop",
    "load_samples": "samples",
    "plot": "metrics",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss_jax.train' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gptoss_jax.train.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
