"""The real steps, compiled for devices that are not there.

XLA compiles for a TPU slice with libtpu and for NVIDIA GPUs with jax's CUDA plugin, neither of
which needs the hardware. What comes back is the compiler's own account of memory and work.
"""

import contextlib
import dataclasses
import importlib
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from gptoss_jax import libtpu, sharding, steps
from gptoss_jax.bounds import busiest, leaves
from gptoss_jax.cache import KVCache, make_cache
from gptoss_jax.config import GptOssConfig
from gptoss_jax.engine import CHUNKS, DECODE
from gptoss_jax.errors import GptOssError
from gptoss_jax.loading import Layout, expert_sharding, shapes_laid_out, storage_for
from gptoss_jax.model import Params, letters
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends
from gptoss_jax.plan import ptx
from gptoss_jax.plan.hardware import Topology
from gptoss_jax.plan.hlo import collectives, kernels, moved, overlapped, scopes
from gptoss_jax.sampling import Sampling, to_arrays

KERNEL = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, bytes on one device.

    Attributes:
      arguments: Parameters, cache and state, as the device lays them out.
      temporaries: What it needs beside them.
      results: New arrays that it leaves, those written over arguments not counted.
      code: The program itself.
      flops: Operations by XLA's count, or None where it gives none (GPUs).
      bytes_accessed: By XLA's count, which takes an operand of which a part is read as read whole.
      collectives: kind -> count and bytes of a step, or None where the text cannot be had.
      seconds: It took to compile.
      moved: Operation -> bytes of device memory that a decode step moves, parts of arrays counted
        as parts (`hlo.moved`); None where it is not counted (GPUs, experts as released, prefill).
      started: On a GPU, the scope of the source ("layer" for all layers) -> kernels that a decode
        step starts for it (`hlo.kernels`).
      overlapped: On GPUs, kind -> collectives of a decode step, and those with work beside them
        (`hlo.overlapped`).
    """

    arguments: int
    temporaries: int
    results: int
    code: int
    flops: float | None
    bytes_accessed: float | None
    collectives: dict[str, dict[str, int]] | None
    seconds: float
    moved: dict[str, float] | None = None
    started: dict[str, int] | None = None
    overlapped: dict[str, tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class Training:
    """A training step to plan; made by whoever knows training.

    Attributes:
      parameters: That are trained.
      state: mesh (None for one device), sharding of what is everywhere -> the state as
        jax.ShapeDtypeStruct with shardings.
      step: mesh -> function of (state, parameters, batch of "tokens", "segments", "weights" [1, B,
        T]), the state donated.
    """

    parameters: int
    state: Callable[[Any, Any], Any]
    step: Callable[[Any], Callable[..., Any]]


class DoesNotFit(Exception):
    """The compiler ran out of the device's memory.

    Attributes:
      needed: Bytes by its account, None where it does not say.
    """

    def __init__(self, needed: float | None):
        super().__init__(needed)
        self.needed = needed


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for.

    Raises:
      ModuleNotFoundError: The compiler is not installed.
      GptOssError: The compiler knows no such slice.
    """
    libtpu.hush()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if topology.device.platform == "tpu":
        importlib.import_module("libtpu")  # the compiler

        platform, options = "tpu", {"topology_name": topology.name}
    else:
        importlib.import_module("jax_plugins.xla_cuda13")  # the compiler

        platform = "cuda"
        options = {"target_config": _target(topology), "topology": f"1x1x{topology.count}"}
    try:
        found = topologies.get_topology_desc(platform=platform, **options).devices
    except Exception as error:  # jax's own, whose type differs between versions
        reason = " ".join(str(error).split())[:300]
        raise GptOssError(
            f"topology {topology.name!r}: the compiler refuses it ({reason}): use a slice that can "
            "be rented, such as v5e:2x4, v6e:2x2 or v5p:2x2x1"
        ) from None
    if len(found) != topology.count:
        raise GptOssError(
            f"topology {topology.name!r} has {len(found)} devices here, expected {topology.count}"
        )
    return list(found)


# Names of cards by which JAX's Pallas knows what it compiles for; by CUDA's capability.
KNOWN_CARDS = {
    (8, 0): "NVIDIA A100",
    (8, 9): "NVIDIA L4",
    (9, 0): "NVIDIA H100",
    (10, 0): "NVIDIA B200",
}


def in_place_of(device: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced and lowered for one device that is not there."""
    if device.platform == "tpu":
        return contextlib.nullcontext()
    card = jax.sharding.AbstractDevice(device.device_kind, None, device.platform)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), (AxisType.Auto,), abstract_device=card)
    return jax.sharding.use_abstract_mesh(mesh)


def _target(topology: Topology) -> str:
    """XLA's description of a GPU."""
    device = topology.device
    major, minor = device.capability
    shared = {(8, 0): (166912, 167936), (8, 9): (101376, 102400)}.get((major, minor))
    optin, per_core = shared or (232448, 233472)
    threads = 1536 if (major, minor) == (8, 9) else 2048
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core}
  shared_memory_per_block_optin: {optin} threads_per_core_limit: {threads}
  core_count: {device.cores} fpus_per_core: 128 clock_rate_ghz: 1.7 l2_cache_size: 41943040
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {int(device.bandwidth)} device_memory_size: {int(device.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{KNOWN_CARDS[device.capability]}"
"""


class Steps:
    """The steps of one model on some devices, ready to be compiled for any batch and context.

    `form` says how experts lie in memory, by default as `loading.storage_for` says for devices of
    `room` bytes. A GPU's kernels are left in `folder` as PTX, if one is given (plan/ptx.py).
    """

    def __init__(
        self,
        config: GptOssConfig,
        sizes: dict[str, int],
        devices: list[Any],
        packed: bool = True,
        form: Layout | None = None,
        room: float = 0,
        folder: Path | None = None,
    ):
        self.config, self.sizes, self.folder = config, sizes, folder
        self.mesh = sharding.make_mesh(sizes, config, devices)
        self.device = devices[0]
        self.params = self._params(packed)
        # what generation runs: on TPUs the experts lie as the kernels read them
        self.form = form or storage_for(self.params, self.mesh, self.device, room)
        self.held = self.params
        if self.form != "released":
            where = (
                SingleDeviceSharding(self.device)
                if self.mesh is None
                else expert_sharding(self.mesh)
            )
            self.held = shapes_laid_out(self.params, self.form, where)

    def _where(self, spec: PartitionSpec):
        if self.mesh is None:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, spec)

    def _array(self, shape, dtype, axes: str | None = None) -> Any:
        spec = PartitionSpec()
        if axes is not None and self.mesh is not None:
            spec = sharding.activation_spec(axes, shape, self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._where(spec))

    def _params(self, packed: bool) -> Params:
        found: dict[tuple, Any] = {}
        for path, axes, shape, dtype in leaves(self.config, packed):
            where = sharding.laid_out(axes, self._where(sharding.parameter_spec(path, axes)))
            found[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        def one(keys, _):
            path = tuple(key.key for key in keys)
            if path in found:
                return found[path]
            return MxTensor(found[(*path, "blocks")], found[(*path, "scales")])

        return jax.tree_util.tree_map_with_path(one, letters(self.config))

    def _cache(self, batch: int, context: int) -> KVCache:
        shape = jax.eval_shape(lambda: make_cache(self.config, batch, context))
        keys, values = (
            tuple(self._array(x.shape, x.dtype, "BSKH") for x in side)
            for side in (shape.keys, shape.values)
        )
        return KVCache(keys, values, self._array((batch,), jnp.int32, "B"))

    def decode(self, batch: int, context: int) -> Program:
        """The decode loop at the end of a full context."""
        V = self.config.vocab_size
        state = steps.State(
            self._cache(batch, context),
            self._array((batch, V), jnp.float32, "BV"),
            self._array((batch, V), jnp.int8, "BV"),
            self._array((batch, V), jnp.int32, "BV"),
            self._array((batch,), jnp.bool_, "B"),
        )
        with jax.default_device(jax.devices("cpu")[0]):
            settings = to_arrays([Sampling(seed=0)] * batch, [0] * batch, V)
        settings = jax.tree.map(lambda x: self._array(x.shape, x.dtype), settings)
        stops, limit = self._array((batch, 4), jnp.int32), self._array((), jnp.int32)
        parts = self.held, state, settings, stops, limit
        parts_held = math.prod(self.sizes.get(axis, 1) for axis in sharding.EXPERT_AXES)
        share = busiest(self.config, self.sizes, batch) * parts_held / self.config.num_experts
        return self._compile(
            lambda: steps.decode.trace(*parts, config=self.config, size=DECODE, top=None),
            dict.fromkeys(("experts_gate_up", "experts_down"), share),
        )

    def prefill(self, batch: int, context: int) -> Program:
        """One chunk of the prompts at the end of a full context."""
        chunk = min(CHUNKS[-1], context)
        parts = (
            self.held,
            self._array((batch, chunk), jnp.int32, "BT"),
            self._array((batch, chunk), jnp.bool_, "BT"),
            self._cache(batch, context),
            self._array((batch, self.config.hidden_size), jnp.bfloat16, "BD"),
        )
        return self._compile(lambda: steps.prefill.trace(*parts, config=self.config))

    def train(self, training: Training, batch: int, length: int) -> Program:
        """One update of one micro-batch."""
        state = training.state(self.mesh, self._where(PartitionSpec()))
        rows = {"tokens": jnp.int32, "segments": jnp.int32, "weights": jnp.float32}
        by_row = PartitionSpec(None)
        if self.mesh is not None:
            by_row = PartitionSpec(
                None, *sharding.activation_spec("BT", (batch, length), self.mesh)
            )
        micro = {
            name: jax.ShapeDtypeStruct((1, batch, length), dtype, sharding=self._where(by_row))
            for name, dtype in rows.items()
        }
        step = jax.jit(training.step(self.mesh), donate_argnums=0)
        return self._compile(lambda: step.trace(state, self.params, micro))

    def _compile(self, trace, shares: dict[str, float] | None = None) -> Program:
        tpu = self.device.platform == "tpu"
        started = time.perf_counter()
        with (
            in_place_of(self.device) if self.mesh is None else jax.set_mesh(self.mesh),
            backends.compiling_for("tpu" if tpu else "gpu"),
            tempfile.TemporaryDirectory() as folder,
        ):
            lowered = trace().lower(lowering_platforms=("tpu" if tpu else "cuda",))
            # jaxlib 0.10 cannot read back libtpu's text of some programs: the dump holds it
            dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if tpu else {}
            dump |= ptx.options(self.folder) if self.folder and not tpu else {}
            try:
                compiled = lowered.compile(compiler_options=dump)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise DoesNotFit(_needed(str(error))) from None
            # small parts that are compiled apart, such as sorts, have files of their own
            texts = [f.read_text() for f in Path(folder).glob("*.after_optimizations.txt")]
            text = max(texts, key=len, default=None)
        seconds = time.perf_counter() - started
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        if not tpu:
            text = compiled.as_text()
        of_gpu = None if tpu or shares is None else text or ""
        return Program(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            results=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
            code=memory.generated_code_size_in_bytes,
            flops=cost.get("flops"),
            bytes_accessed=cost.get("bytes accessed"),
            collectives=None if text is None else collectives(text),
            seconds=seconds,
            moved=moved(text, KERNEL, shares)
            if tpu and text and shares and self.form != "released"
            else None,
            started=None if of_gpu is None else scopes(kernels(of_gpu)),
            overlapped=None if of_gpu is None else overlapped(of_gpu),
        )


def _needed(message: str) -> float | None:
    """Bytes out of "Used 33.30G of 31.24G hbm" or "... (390.62G) exceeds available HBM"."""
    match = re.search(r"Used ([\d.]+)([MGT]) of", message) or re.search(
        r"\(([\d.]+)([MGT])\) exceeds", message
    )
    return float(match[1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[match[2]] if match else None
