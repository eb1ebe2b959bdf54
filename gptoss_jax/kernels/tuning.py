"""What was measured to be fastest on a kind of device, one file for each kind.

`gptoss bench --tune` writes the file of the device at hand into the cache folder; where there is
none the package's own (kernels/tuned) is used, and without that the kernels' defaults. No result
depends on these values.
"""

import dataclasses
import functools
import json
import os
import platform
import re
from pathlib import Path
from typing import Any, TypeVar

import jax

from gptoss_jax.errors import GptOssError
from gptoss_jax.places import cache_home

PACKAGED = Path(__file__).parent / "tuned"
Values = TypeVar("Values")


def folder() -> Path | None:
    """Where compiled kernels and tuned values are kept, beside XLA's compilation cache; None with
    GPTOSS_COMPILATION_CACHE=off.
    """
    place = os.environ.get("GPTOSS_COMPILATION_CACHE")
    if place:
        return None if place == "off" else Path(place) / "kernels"
    return cache_home() / "kernels"


@functools.cache
def kind(platform_name: str) -> str:
    """The kind of the default device: JAX's name for it, a CPU's model and cores."""
    if platform_name != "cpu":
        return jax.devices(platform_name)[0].device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    names = ("model name", "cpu family", "model")
    model = " ".join(found[n] for n in names if n in found) or platform.processor()
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def file_name(kind: str) -> str:
    """Name of a kind's file."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


def find(platform_name: str, defaults: Values) -> Values:
    """The values for the device at hand.

    Args:
      platform_name: "cpu", "tpu" or "gpu".
      defaults: A dataclass; fields that no file has keep their values.

    Raises:
      GptOssError: The file is damaged, or has fields that this version does not know.
    """
    name = file_name(kind(platform_name))
    own = folder()
    for place in [own, PACKAGED] if own else [PACKAGED]:
        if (place / name).exists():
            return _read(place / name, platform_name, defaults)
    return defaults


def _read(file: Path, platform_name: str, defaults: Any) -> Any:
    try:
        values = json.loads(file.read_text())[platform_name]
        return dataclasses.replace(defaults, **values)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise GptOssError(
            f"{file}: not a file of tuned values for {platform_name} ({problem}): "
            "delete it, or make it again with gptoss bench --tune"
        ) from None


def save(platform_name: str, values: Any, facts: dict[str, Any], where: Path | None = None) -> Path:
    """Keeps values for the device at hand.

    Args:
      platform_name: As `find`.
      values: A dataclass.
      facts: What the figures mean: versions, date, times before and after.
      where: Folder; by default the cache's.

    Returns:
      The file.

    Raises:
      GptOssError: There is no cache folder.
    """
    where = where or folder()
    if where is None:
        raise GptOssError("GPTOSS_COMPILATION_CACHE is off: there is no place to keep tuned values")
    where.mkdir(parents=True, exist_ok=True)
    file = where / file_name(kind(platform_name))
    text = {"kind": kind(platform_name), platform_name: dataclasses.asdict(values), "facts": facts}
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(text, indent=2) + "\n")
    temporary.replace(file)
    return file
