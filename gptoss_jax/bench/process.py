"""This process: its cores, its peak memory, the versions that it runs; and others that measure.

Loads nothing, so that it can speak for other systems' processes too.
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptoss_jax.errors import GptOssError


def peak_resident() -> int:
    """Most bytes of main memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def processor() -> str:
    """The processor's name for people."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(count: int) -> None:
    """Keeps this process to its first cores; before XLA starts, which makes a thread for each.

    Raises:
      GptOssError: There are fewer, or this system cannot.
    """
    if not 0 < count <= cores():
        raise GptOssError(f"{count} threads: this process may use 1 to {cores()} cores")
    if count == cores():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise GptOssError(f"{count} of {cores()} cores: this system cannot; leave --threads out")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def last_line(
    command: Sequence[str],
    name: str,
    *,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> str:
    """The last line that a process of its own prints.

    Args:
      command: The process.
      name: For the message.
      environment: Set beside this process' own.
      seconds: It is ended after so many.

    Raises:
      GptOssError: It failed, or took too long.
    """
    whole = os.environ | dict(environment or {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=whole, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise GptOssError(f"{name} failed: the time was over after {seconds:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise GptOssError(f"{name} failed: {lines[-1]}")
    return (done.stdout.splitlines() or [""])[-1]
