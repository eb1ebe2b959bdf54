"""Meshes over four named axes, and the one table from letters of arrays to axes of the mesh.

    data    copies of the model, each with a part of the batch
    fsdp    parts of every weight, gathered for use; the batch is spread over it too (training)
    expert  parts of the experts; the batch is spread over it too where it divides
    tensor  parts of the heads and of the vocabulary, and of the experts once more

Every mesh here has all four, of size 1 where they are not wanted. Experts are spread whole over
expert x tensor, so that no MXFP4 block is ever cut (2880 / 4 = 720 is no multiple of 32).
Arithmetic finds the mesh in the context (`jax.set_mesh`); without one nothing is spread. Knows
letters and sizes; knows no files, no network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.mxfp4 import MxTensor

AXES = ("data", "fsdp", "expert", "tensor")
EXPERT_AXES = ("expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
# A mesh axis goes to the first letter of an array that asks for it: EFPD has fsdp on F, EDF on D,
# neither of them the axis that MXFP4 blocks run along.
PARAMETERS = {
    "V": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "E": EXPERT_AXES,
    "F": ("fsdp",),
    "D": ("fsdp",),
}
# Activations and cache; B takes those of BATCH_AXES that divide the batch.
ACTIVATIONS = {"V": ("tensor",), "N": ("tensor",), "K": ("tensor",)}
# Scales of gate_up and down, slowest axis first; see `laid_out`.
TPU_ORDER = {"EFPU": (0, 2, 3, 1), "EDU": (0, 2, 1)}

Sizes = Mapping[str, int] | str | Mesh


def parse(text: str) -> dict[str, int]:
    """Sizes written as "expert=8,data=2".

    Raises:
      GptOssError: It is not of that form.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        axis, _, size = part.partition("=")
        if not axis or not size.isdecimal() or axis in sizes:
            raise GptOssError(f"mesh {text!r}: expected axis=size pairs such as expert=4,data=2")
        sizes[axis] = int(size)
    return sizes


def as_text(sizes: Mapping[str, int]) -> str:
    """Sizes as `parse` reads them."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


def sizes_of(wanted: Sizes) -> dict[str, int]:
    """Axis -> size of what a user gives for a mesh.

    Raises:
      GptOssError: As `parse`.
    """
    if isinstance(wanted, str):
        return parse(wanted)
    return dict(wanted.shape if isinstance(wanted, Mesh) else wanted)


def check_count(sizes: Mapping[str, int], devices: int, whose: str | None = None) -> None:
    """Refuses sizes that do not use all devices.

    Args:
      sizes: Axis -> size.
      devices: How many there are.
      whose: Name of what has them; None for this machine.

    Raises:
      GptOssError: With the product that would work.
    """
    needed = math.prod(sizes.values())
    if needed != devices:
        have = f"{whose} has" if whose else "there are"
        raise GptOssError(
            f"mesh {as_text(sizes)} needs {needed} devices, {have} {devices}: "
            f"use sizes whose product is {devices}"
        )


def check(sizes: Mapping[str, int], config: GptOssConfig | None = None) -> None:
    """Refuses axes that there are not, and sizes that do not divide the model.

    Args:
      sizes: Axis -> size.
      config: The model; None checks the names alone.

    Raises:
      GptOssError: With the sizes that would work.
    """
    for axis, size in sizes.items():
        if axis not in AXES:
            raise GptOssError(f"mesh axis {axis!r} is unknown: the axes are {_words(AXES, 'and')}")
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise GptOssError(f"{axis} axis of size {size!r}: expected a positive integer")
    if config is None:
        return
    expert = sizes.get("expert", 1)
    _divide("expert", expert, {f"{config.num_experts} experts": config.num_experts})
    local = config.num_experts // expert
    whose = " in each part of the expert axis" if expert > 1 else ""
    heads, vocabulary = config.num_kv_heads, config.vocab_size
    wanted = {f"{heads} kv heads": heads, f"a vocabulary of {vocabulary}": vocabulary}
    _divide("tensor", sizes.get("tensor", 1), {**wanted, f"the {local} experts{whose}": local})
    width = {
        f"hidden size {config.hidden_size}": config.hidden_size,
        f"expert hidden size {config.intermediate_size}": config.intermediate_size,
    }
    _divide("fsdp", sizes.get("fsdp", 1), width)


def _divide(axis: str, size: int, wanted: dict[str, int]) -> None:
    for what, count in wanted.items():
        if count % size:
            common = math.gcd(*wanted.values())
            good = [str(n) for n in range(1, min(common, 128) + 1) if common % n == 0]
            raise GptOssError(
                f"{axis} axis of size {size} does not divide {what}: use {_words(good, 'or')}"
            )


def _words(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def make_mesh(
    sizes: Sizes,
    config: GptOssConfig | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh | None:
    """A mesh of all four axes.

    Args:
      sizes: Axis -> size, or the same as text ("expert=4,data=2"), or a mesh of some of the axes.
      config: The model that it has to fit; None checks nothing but names and device count.
      devices: By default all.

    Returns:
      The mesh, its axes of type Auto; None if all sizes are 1: one device needs no mesh.

    Raises:
      GptOssError: An axis is unknown, a size does not divide the model, or the sizes do not use all
        devices.
    """
    given = sizes_of(sizes)
    check(given, config)
    shape = tuple(int(given.get(axis, 1)) for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(sizes, Mesh):
        order = [sizes.axis_names.index(axis) for axis in AXES if axis in given]
        return Mesh(sizes.devices.transpose(order).reshape(shape), AXES, axis_types=types)
    if math.prod(shape) == 1:
        return None
    devices = jax.devices() if devices is None else devices
    check_count(given, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def default_sizes(config: GptOssConfig, devices: int, near: int | None = None) -> dict[str, int]:
    """Sizes for inference: heads first, then experts, copies of the model with the rest.

    tensor splits all that a decode step reads (attention, experts, unembedding), so that a single
    sequence gains from every device; it ends at the kv heads. expert splits the experts, nine
    tenths of gpt-oss-120b.

    Args:
      config: The model.
      devices: How many there are.
      near: How many are joined by a fast network, which tensor keeps to; by default all.
    """
    heads = math.gcd(config.num_kv_heads, config.vocab_size, config.num_experts)
    tensor = math.gcd(math.gcd(devices, near or devices), heads)
    expert = math.gcd(devices // tensor, config.num_experts // tensor)
    sizes = {"data": devices // (tensor * expert), "expert": expert, "tensor": tensor}
    return {axis: size for axis, size in sizes.items() if size > 1}


def choose_mesh(wanted: Sizes | None, config: GptOssConfig) -> Mesh | None:
    """The mesh that a user asks for; for None all accelerators, but one device of a CPU, where more
    are simulated. Between hosts without TPU's own network tensor stays within a process.

    Raises:
      GptOssError: As `make_mesh`.
    """
    if wanted is not None:
        return make_mesh(wanted, config)
    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        return None
    near = jax.device_count() if jax.default_backend() == "tpu" else jax.local_device_count()
    return make_mesh(default_sizes(config, jax.device_count(), near), config)


def batch_axes(
    batch: int, mesh: Mesh | AbstractMesh | Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Mesh axes over which a batch is spread: those of data, fsdp and expert that divide it; ()
    without a mesh.

    Args:
      batch: Rows.
      mesh: A mesh, or sizes of axes, 1 where they are not named; by default the context's mesh.
    """
    mesh = current() if mesh is None else mesh
    axes, parts = (), 1
    if mesh is None:
        return axes
    sizes = mesh if isinstance(mesh, Mapping) else mesh.shape
    for axis in BATCH_AXES:
        size = sizes.get(axis, 1)
        if size > 1 and batch % (parts * size) == 0:
            axes, parts = (*axes, axis), parts * size
    return axes


def parameter_spec(path: Sequence[Any], letters: str) -> PartitionSpec:
    """Where a parameter lies; the router and vectors over D are small and everywhere.

    Args:
      path: Keys in the tree, for example ("layers", 0, "mlp", "gate_up", "blocks").
      letters: Its axes, for example "EFPUY".
    """
    if letters == "D" or any(key in ("router", "router_bias") for key in path):
        return PartitionSpec()
    return _spec([PARAMETERS.get(letter, ()) for letter in letters])


def activation_spec(letters: str, shape: Sequence[int], mesh=None) -> PartitionSpec:
    """Where activations, logits and cache lie: B over `batch_axes`, heads, vocabulary over tensor.

    Args:
      letters: Axes, for example "BSKH".
      shape: Sizes; only B's matters.
      mesh: By default the context's.
    """
    return _spec(
        [
            batch_axes(size, mesh) if letter == "B" else ACTIVATIONS.get(letter, ())
            for letter, size in zip(letters, shape, strict=True)
        ]
    )


def _spec(wanted: Sequence[tuple[str, ...]]) -> PartitionSpec:
    taken: set[str] = set()
    parts = []
    for axes in wanted:
        axes = tuple(axis for axis in axes if axis not in taken)
        taken.update(axes)
        parts.append(axes or None)
    return PartitionSpec(*parts)


def for_loading(mesh: Mesh | None) -> Callable[[tuple, str], Sharding | Format] | None:
    """What checkpoint.load_params takes: where a parameter goes, from path and letters.

    Args:
      mesh: None for the default device.
    """
    if mesh is None:
        device = jax.devices()[0]
        if device.platform != "tpu":
            return None
        return lambda path, letters: laid_out(letters, SingleDeviceSharding(device))
    return lambda path, letters: laid_out(
        letters, NamedSharding(mesh, parameter_spec(path, letters))
    )


def laid_out(letters: str, where: Sharding) -> Sharding | Format:
    """The sharding with the order of axes in memory, if the devices' own choice is a bad one.

    TPUs lay the scales of all experts beside each other, because that pads least; each decode then
    begins with a copy of all scales in another order, 1 GB of gpt-oss-20b's 14. Experts first takes
    0.3 % more memory and no copy (compiled for v6e, libtpu 0.0.51).
    """
    order = TPU_ORDER.get(letters)
    if order is None or next(iter(where.device_set)).platform != "tpu":
        return where
    return Format(Layout(order), where)


def parameter_shardings(letters: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings of a parameter tree.

    Args:
      letters: Tree of the parameters' letters (`model.letters`).
      params: The tree, arrays or shapes, experts as they are held.
      mesh: The mesh.

    Returns:
      A tree of the same structure as params.
    """

    def one(keys, letters, leaf):
        path = tuple(getattr(key, "key", key) for key in keys)
        if isinstance(leaf, MxTensor):  # the last axis is blocks of packed bytes
            blocks = one(keys, letters[:-1] + "UY", leaf.blocks)
            return MxTensor(blocks, one(keys, letters[:-1] + "U", leaf.scales))
        return laid_out(letters, NamedSharding(mesh, parameter_spec(path, letters)))

    return jax.tree_util.tree_map_with_path(one, letters, params)


def current() -> AbstractMesh | None:
    """The context's mesh if it is one of ours and not inside shard_map, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == AXES and all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if ours else None


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """x, held to lie as `activation_spec` says; x itself without a mesh."""
    if current() is None:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(letters, x.shape))


def replicate(tree: Any) -> Any:
    """The arrays of a tree, whole on every device, so that every process can read them; themselves
    without a mesh.
    """
    if current() is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def put(x: np.ndarray, letters: str, mesh: Mesh) -> jax.Array:
    """An array of the host, the same in every process, on the mesh as `activation_spec` says."""
    sharding = NamedSharding(mesh, activation_spec(letters, x.shape, mesh))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
