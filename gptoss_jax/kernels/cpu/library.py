"""The C++ sources, compiled once for a machine and kept in the cache folder.

Every instruction set is a unit of its own with its own flags; which one runs is decided when the
library is loaded, so that machines of different kinds can share a cache folder.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
from jaxlib import version as jaxlib_version

from gptoss_jax.kernels import tuning

log = logging.getLogger(__name__)
SOURCES = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-w"]
AVX512 = ["-mavx512f", "-mprefer-vector-width=512"]
BFLOAT16 = [*AVX512, "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
UNITS: list[tuple[str, list[str]]] = [
    ("choice.cc", []),
    ("threads.cc", []),
    ("products.cc", []),
    ("compact.cc", []),
    ("experts.cc", []),
    ("attention.cc", []),
    ("attention_gradient.cc", []),
    ("low_rank.cc", []),
    ("rows.cc", []),
    ("training.cc", []),
    ("float32.cc", ["-DNAME=gptoss_float32_base", "-DWIDTH=4"]),
]
X86_UNITS = [
    ("float32.cc", ["-DNAME=gptoss_float32_avx2", "-DWIDTH=8", "-mavx2", "-mfma"]),
    ("float32.cc", ["-DNAME=gptoss_float32_avx512", "-DWIDTH=16", *AVX512]),
    ("bfloat16_avx512.cc", BFLOAT16),
]
TARGETS = (
    "gptoss_product",
    "gptoss_four_in_turn",
    "gptoss_compact",
    "gptoss_compact_pack",
    "gptoss_compact_exceptions",
    "gptoss_attention",
    "gptoss_attention_gradient",
    "gptoss_low_rank",
    "gptoss_low_rank_gradient",
    "gptoss_rows",
    "gptoss_dense",
    "gptoss_swiglu",
    "gptoss_swiglu_gradient",
    "gptoss_weighted",
    "gptoss_weighted_gradient",
    "gptoss_rotate",
    "gptoss_norm",
    "gptoss_norm_gradient",
    "gptoss_cross_entropy",
    "gptoss_first_largest",
    "gptoss_store",
)


class CannotBuild(Exception):
    """No library on this machine; the message says why."""


def why_not() -> str | None:
    """Why these kernels cannot run here, None if they can; said once in the log."""
    return _load()[1]


def arithmetics() -> list[str]:
    """What this machine can compute with, the best first: avx512_bf16, avx512, avx2, portable."""
    library = _load()[0]
    if library is None:
        return []
    library.gptoss_arithmetics.restype = ctypes.c_char_p
    return library.gptoss_arithmetics().decode().split()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What can be tuned; no result depends on it.

    Attributes:
      columns: Outputs of one task, a multiple of 8.
      cache: Bytes of activations that stay in a core's second cache.
    """

    columns: int = 32
    cache: int = 512 << 10


def tune(values: Tuning) -> None:
    """Computes with these values from now on."""
    library = _load()[0]
    assert library is not None
    _tune(library, values)


def _tune(library: ctypes.CDLL, values: Tuning) -> None:
    library.gptoss_tune(*map(ctypes.c_int64, dataclasses.astuple(values)))


def choose(arithmetic: str) -> None:
    """Computes with one of `arithmetics` from now on, in all threads; by itself with the best."""
    library = _load()[0]
    assert library is not None
    assert arithmetic in arithmetics(), arithmetic
    library.gptoss_choose(arithmetic.encode())


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        library = ctypes.CDLL(str(build()))
    except (CannotBuild, OSError) as problem:
        log.warning(
            "the kernels for this CPU could not be built (%s): XLA computes instead, several times "
            "slower; install a C++ compiler (g++), or name one in CXX",
            problem,
        )
        return None, str(problem)
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    _tune(library, tuning.find("cpu", Tuning()))
    return library, None


def folder() -> Path:
    """Where compiled libraries are kept; a new place each time if nothing is to be kept."""
    place = tuning.folder()
    return Path(tempfile.mkdtemp(prefix="gptoss_jax-")) if place is None else place


def build(where: Path | None = None) -> Path:
    """The compiled library, made if it is not there yet.

    Args:
      where: Folder of compiled libraries; by default `folder()`.

    Raises:
      CannotBuild: There is no compiler, or it fails; the message has its last line.
    """
    compiler = _compiler()
    machine = platform.machine().lower()
    units = [*UNITS, *(X86_UNITS if machine in ("x86_64", "amd64") else [])]
    parts = [repr((FLAGS, units, machine, jaxlib_version.__version__)), _version(compiler)]
    parts += [(SOURCES / name).read_text() for name in sorted({name for name, _ in units})]
    parts += [header.read_text() for header in sorted(SOURCES.glob("*.h"))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    where = folder() if where is None else where
    target = where / f"cpu-{key}.so"
    if target.exists():
        return target
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=where) as temporary:
            made = Path(temporary) / target.name
            _compile(compiler, units, made)
            made.replace(target)
    except OSError as problem:
        raise CannotBuild(str(problem)) from None
    return target


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return found
    raise CannotBuild(f"no C++ compiler: {wanted or 'g++, clang++ or c++'} is not there")


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _compile(compiler: str, units: list[tuple[str, list[str]]], target: Path) -> None:
    include = ["-isystem", jax.ffi.include_dir()]
    objects = [str(target.parent / f"{number}.o") for number in range(len(units))]
    commands = [
        [compiler, *FLAGS, *flags, *include, "-c", str(SOURCES / name), "-o", made]
        for (name, flags), made in zip(units, objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))  # raises what the first of them raised
    _run([compiler, "-shared", "-pthread", "-o", str(target), *objects])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise CannotBuild(str(problem)) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise CannotBuild(f"{Path(command[0]).name} failed: {errors[0]}")
    return done.stdout
