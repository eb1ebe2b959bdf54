"""The folder of a run: what is in it, whether it may be used, and what was found there.

    settings.json   everything that the run was made with
    metrics.jsonl   a row a step
    checkpoints/    the last ones and the best
    adapter/        the result (model/ of a full fine-tuning)

Knows files; knows no arrays.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptOssError

SETTINGS, METRICS, CHECKPOINTS = "settings.json", "metrics.jsonl", "checkpoints"
ADAPTER, MODEL = "adapter", "model"
_LOCK = ".lock"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@contextlib.contextmanager
def opened(folder: Path, restart: bool, speaks: bool) -> Iterator[None]:
    """Holds a run's folder, which only one command may do.

    Args:
      folder: Made if it is not there.
      restart: Remove what an earlier run left.
      speaks: Whether this is the process that writes; the others only use the folder.

    Raises:
      GptOssError: It holds something else, or another command is at it.
    """
    if folder.exists() and not folder.is_dir():
        raise GptOssError(f"{folder} is a file: give a folder for the run")
    others = [p.name for p in folder.iterdir() if p.name != _LOCK] if folder.exists() else []
    if others and not any(name in others for name in (SETTINGS, CHECKPOINTS)):
        raise GptOssError(
            f"{folder} holds {others[0]} and no {SETTINGS}: it is no run; give a new folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not speaks:
        yield
        return
    with open(folder / _LOCK, "w") as lock:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GptOssError(
                    f"{folder}: another command is training there: wait for it, or give another "
                    "folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        if restart:
            for name in (CHECKPOINTS, ADAPTER, MODEL, "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in (METRICS, SETTINGS):
                (folder / name).unlink(missing_ok=True)
        yield


def write_settings(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes settings.json, whole or not at all."""
    temporary = folder / (SETTINGS + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
    os.replace(temporary, folder / SETTINGS)


def versions() -> dict[str, str]:
    """Of the packages that a result depends on."""
    from gptoss_jax import __version__

    found = {"gptoss_jax": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def plain(settings: Any) -> Any:
    """Settings as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))
