"""Devices that can be rented: their memory, bandwidths and matrix rate, by name, and how a topology
is written.

Numbers are the makers' own, for dense bfloat16, a chip's share for each device that JAX sees.
"""

import dataclasses
import math
import re

from gptoss_jax.errors import GptOssError

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX sees it.

    Attributes:
      name: For people.
      platform: "tpu" or "gpu".
      memory: Bytes that a program can have: what XLA's TPU compiler allows, or 97 % of a GPU's.
      bandwidth: Bytes a second of its memory.
      flops: bfloat16 operations a second, dense.
      link: Bytes a second that it sends to its neighbours, all links, one direction.
      capability: CUDA's, for GPUs.
      cores: Streaming multiprocessors, for GPUs.
    """

    name: str
    platform: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    capability: tuple[int, int] = (0, 0)
    cores: int = 0


def _tpu(name: str, gib: float, bandwidth: float, flops: float, link: float) -> Device:
    return Device(name, "tpu", gib * GIB, bandwidth * GB, flops * TERA, link * GB)


def _gpu(name, gb, bandwidth, flops, link, capability, cores) -> Device:
    return Device(
        name, "gpu", 0.97 * gb * GB, bandwidth * GB, flops * TERA, link * GB, capability, cores
    )


# TPU memory: what the compiler of libtpu 0.0.51 says is available. The rest: cloud.google.com/tpu
# docs, system architecture; NVIDIA's data sheets of each card (A100, H100 SXM, H200 SXM, L4, L40S)
# and the Ada and Blackwell architecture papers (4090, B200); memory as nvidia-smi shows it, links
# NVLink's in one direction, or PCIe 4 x16.
DEVICES = {
    "v5e": _tpu("TPU v5e", 15.75, 819, 197, 100),
    "v5p": _tpu("TPU v5p", 95.73, 2765, 459, 300),
    "v6e": _tpu("TPU v6e", 31.24, 1640, 918, 200),
    "l4": _gpu("NVIDIA L4", 24.1, 300, 121, 32, (8, 9), 58),
    "l40s": _gpu("NVIDIA L40S", 48.3, 864, 362, 32, (8, 9), 142),
    "4090": _gpu("NVIDIA RTX 4090", 25.7, 1008, 165, 32, (8, 9), 128),
    "a100-40": _gpu("NVIDIA A100 40GB", 42.9, 1555, 312, 300, (8, 0), 108),
    "a100": _gpu("NVIDIA A100 80GB", 85.9, 2039, 312, 300, (8, 0), 108),
    "h100": _gpu("NVIDIA H100 80GB", 85.5, 3350, 989, 450, (9, 0), 132),
    "h200": _gpu("NVIDIA H200", 150.7, 4800, 989, 450, (9, 0), 132),
    "b200": _gpu("NVIDIA B200", 192.0, 8000, 2250, 900, (10, 0), 148),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some devices of one kind.

    Attributes:
      name: As the user wrote it, for example "v6e:2x2" or "h100:8".
      kind: Key of DEVICES.
      count: Devices.
    """

    name: str
    kind: str
    count: int

    @property
    def device(self) -> Device:
        """Of which it consists."""
        return DEVICES[self.kind]


def parse(text: str) -> Topology:
    """Reads "v6e:2x2", "v5p:2x2x1" (chips along each axis of the slice), "h100:8" (GPUs).

    Raises:
      GptOssError: The kind is unknown, or the shape is not one that such devices come in.
    """
    kind, _, shape = text.lower().strip().partition(":")
    if kind not in DEVICES:
        known = ", ".join(DEVICES)
        raise GptOssError(
            f"topology {text!r}: {kind or 'nothing'} is no device known here: "
            f"use one of {known}, as in v6e:2x2 or h100:8"
        )
    axes = 1 if DEVICES[kind].platform == "gpu" else 3 if kind == "v5p" else 2
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), shape):
        example = {1: f"{kind}:8", 2: f"{kind}:2x4", 3: f"{kind}:2x2x1"}[axes]
        what = "a number of GPUs" if axes == 1 else f"chips along {axes} axes"
        raise GptOssError(f"topology {text!r}: expected {kind} and {what}, as in {example}")
    return Topology(f"{kind}:{shape}", kind, math.prod(map(int, shape.split("x"))))
