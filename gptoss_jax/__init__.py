"""OpenAI's gpt-oss models in JAX and Flax. Names are imported when first used: importing the
package loads nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Chat": "chat",
    "Completion": "completions",
    "GptOssConfig": "config",
    "GptOssError": "errors",
    "KVCache": "cache",
    "Model": "engine",
    "MxTensor": "mxfp4",
    "Sampling": "sampling",
    "apply": "model",
    "forward": "model",
    "init_params": "model",
    "load": "loading",
    "make_cache": "cache",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gptoss_jax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
