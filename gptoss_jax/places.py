"""Where this package keeps what can be made again: compiled programs, kernels, benchmark files."""

import os
from pathlib import Path


def cache_home() -> Path:
    """~/.cache/gptoss_jax; XDG_CACHE_HOME is followed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptoss_jax"
