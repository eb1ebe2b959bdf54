"""From a name or a folder to a Model: its files, its devices, its adapters, and where compiled
programs are kept.

Knows what is chosen where nobody chose: type, mesh, context. Knows nothing of what files hold
(checkpoint/, adapters/) and nothing of generating.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gptoss_jax import adapters as files
from gptoss_jax import checkpoint, hub, libtpu, lora, sharding
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.hub import TINY
from gptoss_jax.kernels import cpu, tpu
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import Params
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.places import cache_home
from gptoss_jax.tokenizer import load_tokenizer

log = logging.getLogger(__name__)
KERNELS_OWN = (tpu.TpuExperts, cpu.CpuExperts, cpu.CompactMatrix)  # layouts that are made at load
Layout = Literal["released", "packed", "folded"]
SMALL_BYTES = 1 << 30  # below it a CPU computes in float32: faster there, and exact to the tests


def load(
    source: str | os.PathLike[str] = TINY,
    *,
    mesh: sharding.Sizes | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    experts: Layout | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Model:
    """Loads a model.

    Args:
      source: "gpt-oss-tiny" (in the package), a Hub id such as "openai/gpt-oss-20b", or a folder:
        Hugging Face's layout (MXFP4 or bfloat16), OpenAI's original one, or an Orbax checkpoint
        made by `gptoss convert`.
      mesh: Devices to spread it over, by axes of sharding.py: {"expert": 4, "data": 2}, the same as
        text ("expert=4,data=2"), or a jax.sharding.Mesh; {} for one device. By default all
        accelerators, as `sharding.default_sizes` says; on CPU one device.
      dtype: "bfloat16" or "float32", of everything that is not packed MXFP4; by default bfloat16,
        except that a CPU takes float32 for models below 1 GiB.
      max_context: Longest sequence, in tokens; by default the model's.
      revision: Branch, tag or commit on the Hub.
      offline: Use only what the Hub's cache already holds.
      adapters: Name -> folder of an adapter: what `gptoss finetune` or `adapters.save` wrote, or
        peft's; requests choose by name.
      experts: How MXFP4 experts lie in memory: "released", the bytes as they are, which training
        and adapters need; "packed" or "folded", as a TPU's kernels read them (kernels/tpu/layout.py
        says which suits what). By default as the devices' kernels read them fastest
        (`for_kernels`).
      progress: Called with each parameter's name and bytes when it is there.

    Returns:
      The model.

    Raises:
      GptOssError: The source cannot be found or does not hold a gpt-oss model, the mesh does not
        fit it or the devices, or an adapter is damaged or of another base; the message says what
        to do.
    """
    libtpu.hush()
    use_compilation_cache()
    folder = hub.resolve(source, revision=revision, offline=offline)
    if dtype not in (None, "bfloat16", "float32"):
        raise GptOssError(f"dtype {dtype!r}: expected 'bfloat16' or 'float32'")
    if dtype is None:
        small = (
            sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            < SMALL_BYTES
        )
        dtype = "float32" if small and jax.default_backend() == "cpu" else "bfloat16"
    spread = sharding.choose_mesh(mesh, checkpoint.open_checkpoint(folder).config)
    config, params = checkpoint.load_params(
        folder,
        dtype=jnp.dtype(dtype),
        shardings=sharding.for_loading(spread),
        progress=progress,
    )
    if max_context is not None and not 0 < max_context <= config.max_context:
        raise GptOssError(
            f"max_context is {max_context}: this model's context is 1 to {config.max_context}"
        )
    if experts is None:
        params = for_kernels(params, spread, "released" if adapters else None)
    elif experts != "released":
        params = laid_out(params, experts, spread)
    tokenizer = load_tokenizer(folder)
    context = max_context or config.max_context
    model = Model(config, params, tokenizer, context, str(source), spread)
    return with_adapters(model, adapters) if adapters else model


def storage_for(
    params: Params, mesh: Mesh | None = None, device: Any = None, room: float = 0
) -> Layout:
    """How experts should lie on the devices of a mesh.

    Args:
      params: Arrays or shapes, MXFP4 experts as MxTensor.
      mesh: None for one device.
      device: One of them; by default the mesh's first, or the default device.
      room: Bytes that it has; 0 for what it says, if it is there.

    Returns:
      "released" but on TPUs, where kernels read a layout of their own, unless experts are plain or
      cut by fsdp; there as `kernels.tpu.storage` says.
    """
    if device is None:
        device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    sizes = {} if mesh is None else mesh.shape
    packed = [x for x in _experts(params) if isinstance(x, MxTensor)]
    if device.platform != "tpu" or not packed or sizes.get("fsdp", 1) > 1:
        return "released"
    if not room and device in jax.local_devices():  # one that is not there says nothing
        room = (device.memory_stats() or {}).get("bytes_limit", 0)
    parts = math.prod(sizes.get(axis, 1) for axis in sharding.EXPERT_AXES)
    folded = sum(_nbytes(tpu.shapes(x, "folded")) for x in packed) // parts
    others = sum(map(_nbytes, jax.tree.leaves(params))) - sum(map(_nbytes, packed))
    return tpu.storage(device.device_kind, folded + others // sizes.get("tensor", 1), int(room))


def for_kernels(params: Params, mesh: Mesh | None, experts: Layout | None = None) -> Params:
    """The same parameters as the kernels of their devices read them fastest; the tree given is
    changed.

    Args:
      params: The tree, as released.
      mesh: Over which it is spread.
      experts: How TPUs hold them; by default as `storage_for` says.
    """
    form = experts or storage_for(params, mesh)
    if form != "released":
        params = laid_out(params, form, mesh)
    return params if mesh is not None else for_cpu(params)


def laid_out(params: Params, form: tpu.Storage, mesh: Mesh | None = None) -> Params:
    """The same parameters with MXFP4 experts as a TPU's kernels read them.

    Layer after layer, and the tree given is changed: at no time two copies of all experts are held.
    Experts whose values do not fit the form take the next one that holds them, which the log says.

    Args:
      params: The tree, MXFP4 experts as MxTensor.
      form: "packed" or "folded".
      mesh: Over which it is spread.
    """
    for number, layer in params["layers"].items():
        for name in ("gate_up", "down"):
            weight, path = layer["mlp"][name], f"layers.{number}.mlp.{name}"
            found, why = tpu.to_tpu(weight, form, path)
            if found is None and form == "folded":
                log.info("%s", why)
                found, why = tpu.to_tpu(weight, "packed", path)
            if found is None:
                log.info("%s", why)
                continue
            if mesh is not None:
                found = jax.device_put(found, expert_sharding(mesh))
            layer["mlp"][name] = found
    return params


def for_cpu(params: Params) -> Params:
    """The same parameters with the large bfloat16 matrices in 12 bits a value and the packed
    experts' rows four in turn, where the default device is a CPU that reads them faster so.

    One after another, and the tree given is changed: at no time two copies of all are held. The
    embedding stays, of which a step reads a few rows.
    """
    if jax.default_backend() != "cpu" or cpu.why_not() or params["embedding"].dtype != jnp.bfloat16:
        return params

    def replace(room, name, made):
        room[name] = room[name] if made is None else made

    for layer in params["layers"].values():
        mlp, attention = layer["mlp"], layer["attention"]
        for name in ("gate_up", "down"):
            if isinstance(mlp[name], MxTensor):
                replace(mlp, name, cpu.as_cpu_experts(mlp[name]))
        for name in "qkvo":
            inputs = 2 if name == "o" else 1
            replace(attention, name, cpu.as_compact(attention[name], inputs))
    replace(params, "unembedding", cpu.as_compact(params["unembedding"], 1))
    return params


def released(model: Model, kinds: tuple[type, ...] = KERNELS_OWN) -> Model:
    """The same model with its weights as they were released, bit for bit: what training and saving
    take. The model itself if that is how they lie.

    Args:
      model: What `load` gave.
      kinds: Of the layouts that are undone; adapters do with those of CPUs.

    Raises:
      GptOssError: Its experts are folded, and hold their released bytes no more.
    """

    def is_leaf(x):
        return isinstance(x, kinds)

    def one(leaf):
        if not is_leaf(leaf):
            return leaf
        if isinstance(leaf, tpu.TpuExperts) and not leaf.packed:
            raise GptOssError(
                f"{model.name}: the experts are folded to float8_e5m2 for a TPU's kernels and hold "
                "the released bytes no more: load the model with experts='released'"
            )
        return leaf.released()

    if not any(map(is_leaf, jax.tree.leaves(model.params, is_leaf=is_leaf))):
        return model
    params = jax.tree.map(one, model.params, is_leaf=is_leaf)
    return dataclasses.replace(model, params=params)


def expert_sharding(mesh: Mesh) -> NamedSharding:
    """Where the arrays of `laid_out` experts lie."""
    return NamedSharding(mesh, sharding.parameter_spec((), "EPUU"))


def shapes_laid_out(params: Params, form: tpu.Storage, where: Any) -> Params:
    """`laid_out` of jax.ShapeDtypeStruct, each with the sharding `where`."""

    def one(leaf):
        if not isinstance(leaf, MxTensor):
            return leaf
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tpu.shapes(leaf, form)
        )

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, MxTensor))


def _experts(params: Params) -> list[Any]:
    return [
        layer["mlp"][name] for layer in params["layers"].values() for name in ("gate_up", "down")
    ]


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def with_adapters(model: Model, adapters: Mapping[str, str | os.PathLike[str]]) -> Model:
    """The same model with these adapters, in the place of those it had; the base is not copied.

    Args:
      model: What `load` gave.
      adapters: Name -> folder, as in `load`.

    Raises:
      GptOssError: As `load`.
    """
    model = released(model, (tpu.TpuExperts,))
    base = model._on_mesh(files.fingerprint, model.config, model.params)
    loaded = {}
    for name, folder in adapters.items():
        adapter = files.load(folder, model.config, fingerprint=base)
        loaded[name] = adapter.tree, adapter.lora
    return with_stack(model, loaded)


def with_stack(model: Model, adapters: Mapping[str, tuple[Params, LoraConfig]]) -> Model:
    """The same model with these adapters from memory, in the place of those it had; the base is not
    copied.

    Args:
      model: What `load` gave.
      adapters: Name -> tree of arrays that this process can read whole, and its config.
    """

    def put(path, letters, array):
        if model.mesh is None:
            return jnp.asarray(array)
        where = NamedSharding(model.mesh, sharding.parameter_spec(path, letters))
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    stack = lora.stack(adapters, model.params["embedding"].dtype, put)
    return dataclasses.replace(model, adapters=stack)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX has been told where to, or
    GPTOSS_COMPILATION_CACHE is "off".

    The place is $GPTOSS_COMPILATION_CACHE, by default ~/.cache/gptoss_jax/xla (XDG_CACHE_HOME is
    followed).
    """
    place = os.environ.get("GPTOSS_COMPILATION_CACHE")
    if place == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", place or str(cache_home() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
