"""What this machine is and what it can do: memory bandwidth and matrix rate of one device, as XLA's
own programs reach them, and what figures have to be published with.

Knows devices; knows no model.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.bench.process import cores, processor, today, versions

REPEATS = 7
MB, ROW = 1 << 20, 1 << 14
# Beyond the caches: up to 32 MB a group of cores, 50 MB (H200) or 126 MB (B200) on GPUs.
SIZES = {"cpu": (128 * MB, 256 * MB), "other": (512 * MB, 2048 * MB)}
# rows, contracted, columns: squares, and 512 tokens through the gate and up of a gpt-oss expert
PRODUCTS = {
    "cpu": ((512, 2880, 5760), (1024, 1024, 1024), (2048, 2048, 2048)),
    "other": ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 2880, 5760)),
}
PACKAGES = ("gptoss_jax", "jax", "jaxlib", "flax", "numpy")
PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin")}


def seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median time of a call whose result is waited for, after one that is not counted."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def read_rate(sizes: Sequence[int] | None = None, repeats: int = REPEATS) -> float:
    """Bytes a second that summing up a large array reads: the best of several sizes, whole and by
    rows.

    Args:
      sizes: Bytes of the arrays, multiples of 16 KB; by default some that no cache holds.
      repeats: Of each, of which the median counts.
    """
    whole, by_rows = jax.jit(jnp.sum), jax.jit(lambda x: x.sum(1))

    def rate(size: int) -> float:
        x = jnp.ones((size // ROW, ROW // 4), jnp.float32)
        return max(size / seconds(lambda f=f: f(x), repeats) for f in (whole, by_rows))

    return max(rate(size) for size in sizes or _own(SIZES))


def copy_rate(sizes: Sequence[int] | None = None, repeats: int = REPEATS) -> float:
    """Bytes a second, those read and those written, of a large array changed in place; arguments as
    `read_rate`.
    """
    negate = jax.jit(lambda x: -x, donate_argnums=0)

    def rate(size: int) -> float:
        held = [jnp.ones(size // 4, jnp.float32)]

        def call():
            held[0] = negate(held[0])
            return held[0]

        return 2 * size / seconds(call, repeats)

    return max(rate(size) for size in sizes or _own(SIZES))


def matrix_rate(
    products: Sequence[tuple[int, int, int]] | None = None, repeats: int = REPEATS
) -> float:
    """Operations a second of bfloat16 products with float32 sums: the best of several sizes.

    Args:
      products: (rows, contracted, columns) of each.
      repeats: Of each, of which the median counts.
    """
    product = jax.jit(
        lambda a, b: jnp.einsum("mk,nk->mn", a, b, preferred_element_type=jnp.float32)
    )

    def rate(m: int, k: int, n: int) -> float:
        a, b = jnp.ones((m, k), jnp.bfloat16), jnp.ones((n, k), jnp.bfloat16)
        return 2 * m * k * n / seconds(lambda: product(a, b), repeats)

    return max(rate(*shape) for shape in products or _own(PRODUCTS))


def limits() -> dict[str, float]:
    """What the default device reaches: `read_bytes_s`, `copy_bytes_s`, `bfloat16_flops`."""
    return {
        "read_bytes_s": read_rate(),
        "copy_bytes_s": copy_rate(),
        "bfloat16_flops": matrix_rate(),
    }


def _own(table: dict[str, Any]) -> Any:
    return table["cpu" if jax.default_backend() == "cpu" else "other"]


def peak_device() -> int | None:
    """Most bytes that the busiest device has held in memory of its own; None where it has none, or
    does not say.
    """
    devices = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((d["peak_bytes_in_use"] for d in devices if "peak_bytes_in_use" in d), default=None)


def free_memory() -> int | None:
    """Bytes that the first device still has, None where that cannot be known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def describe() -> dict[str, Any]:
    """What figures have to be published with: device, processor, versions, date."""
    device = jax.devices()[0]
    names = PACKAGES + PLUGINS.get(device.platform, ())
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.device_count(),
            "processor": processor(),
            "cores": cores(),
        },
        "versions": {"python": platform.python_version(), **versions(names)},
        "date": today(),
    }
