"""What a run trains and what it leaves: an adapter over the base, or the parameters themselves.

Knows trees of arrays and where they lie; knows no data and no files.
"""

import dataclasses
import fnmatch
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gptoss_jax import lora as low_rank
from gptoss_jax import sharding
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import put_leaf
from gptoss_jax.model import Params, letters
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.train.optimizer import state_shardings, transform
from gptoss_jax.train.settings import Settings
from gptoss_jax.train.step import State, merge, new_state, on


@dataclasses.dataclass(frozen=True)
class Trainable:
    """A run's arrays at its beginning.

    Attributes:
      frozen: What stays as it is: the base, or of a full fine-tuning the frozen parameters.
      shapes: Tree of jax.ShapeDtypeStruct of what is trained, float32.
      shardings: Where it lies; None for one device.
      begin: Makes the state before the first update.
      like: The state as jax.ShapeDtypeStruct with shardings, for restoring.
      trained: Number of trained parameters.
      whole: Number of the model's.
    """

    frozen: Params
    shapes: Params
    shardings: Params | None
    begin: Any
    like: State
    trained: int
    whole: int

    def __str__(self) -> str:
        return (
            f"{self.trained:,} trainable parameters, {100 * self.trained / self.whole:.3g} % of "
            f"the model's {self.whole:,}"
        )


def prepare(model: Model, settings: Settings) -> Trainable:
    """What `settings` train of a model; arrays of its state are not made yet.

    Raises:
      GptOssError: A target or a pattern of `frozen` matches nothing, or experts are packed that
        were to be trained.
    """
    config, mesh = model.config, model.mesh
    whole = sum(_size(leaf) for leaf in _leaves(model.params))
    if settings.lora is not None:
        lora = settings.lora
        shapes, frozen = low_rank.shapes(config, lora), model.params
        where = None if mesh is None else low_rank.shardings(config, lora, mesh)

        source: Any = jax.random.key(settings.seed)
        start = functools.partial(low_rank.init, config, lora)
    else:
        params = _unpacked(model, settings)
        chosen, frozen = split(params, settings.frozen)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), chosen)
        where = None
        if mesh is not None:
            where = jax.tree.map(lambda x: x.sharding, chosen)

        source, start = chosen, _in_float32

    def state(source):
        return new_state(start(source), settings)

    abstract = jax.eval_shape(state, source)
    if mesh is None:
        everywhere: Any = SingleDeviceSharding(jax.devices()[0])
        like = state_like(abstract, None, everywhere, settings)
        begin = jax.jit(state)
        if settings.lora is not None:
            optimizer = settings.optimizer
            begin = functools.partial(
                _begin_adapter, config=config, lora=settings.lora, optimizer=optimizer
            )
    else:
        like = state_like(abstract, where, NamedSharding(mesh, PartitionSpec()), settings)
        begin = jax.jit(state, out_shardings=jax.tree.map(lambda x: x.sharding, like))

    def made() -> State:
        with on(mesh):
            return begin(source)

    return Trainable(frozen, shapes, where, made, like, low_rank.count(shapes), whole)


@functools.partial(jax.jit, static_argnames=("config", "lora", "optimizer"))
def _begin_adapter(key, *, config, lora, optimizer) -> State:
    """A new adapter's state on one device; a notebook's second call compiles nothing."""
    return new_state(low_rank.init(config, lora, key), Settings(lora=lora, optimizer=optimizer))


def state_like(
    state: State, shardings: Params | None, everywhere: Any, settings: Settings
) -> State:
    """Shapes of a state with where its arrays lie: moments as what they are of, counts everywhere.

    Args:
      state: Tree of jax.ShapeDtypeStruct, of `new_state`.
      shardings: Of what is trained; None for `everywhere`.
      everywhere: Sharding of a replicated array, or of the one device.
      settings: Of the run.

    Returns:
      The tree with shardings.
    """
    shapes = state["trained"]
    trained = jax.tree.map(lambda _: everywhere, shapes) if shardings is None else shardings
    moments = state_shardings(transform(settings.optimizer), shapes, trained, everywhere)
    where = {name: everywhere for name in state} | {"trained": trained, "optimizer": moments}
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where
    )


def _in_float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def split(params: Params, frozen: tuple[str, ...]) -> tuple[Params, Params]:
    """(trained, frozen) parts of a parameter tree; `step.merge` puts them together.

    Args:
      params: The tree.
      frozen: Names or patterns of the last key of a path, "router*" or "sinks".

    Raises:
      GptOssError: A pattern matches nothing, or nothing would be trained.
    """
    leaves = [(tuple(k.key for k in keys), x) for keys, x in _paths(params)]
    names = sorted({path[-1] for path, _ in leaves})
    for pattern in frozen:
        if not fnmatch.filter(names, pattern):
            raise GptOssError(
                f"frozen {pattern!r} matches nothing: use names and patterns of {', '.join(names)}"
            )
    parts: tuple[Params, Params] = {}, {}
    for path, leaf in leaves:
        stays = any(fnmatch.fnmatch(path[-1], pattern) for pattern in frozen)
        put_leaf(parts[stays], path, leaf)
    if not parts[0]:
        raise GptOssError("all parameters are frozen: nothing would be trained; freeze fewer")
    return parts


def _unpacked(model: Model, settings: Settings) -> Params:
    """Parameters with experts as arrays of the model's type."""
    packed = [x for x in _leaves(model.params) if isinstance(x, MxTensor)]
    if not packed:
        return model.params
    size = sum(2 * x.size for x in packed) / 1e9
    if not settings.unpack:
        raise GptOssError(
            f"{model.name} holds its experts packed in MXFP4, which only an adapter can be trained "
            f"on: unpack them ({size:.1f} GB in bfloat16; --unpack), or train an adapter"
        )
    dtype = model.params["embedding"].dtype

    def one(keys, axes, leaf):
        if not isinstance(leaf, MxTensor):
            return leaf
        where = None
        if model.mesh is not None:
            path = tuple(key.key for key in keys)
            where = NamedSharding(model.mesh, sharding.parameter_spec(path, axes))
        return _dequantize(leaf, dtype, where)

    with on(model.mesh):
        return jax.tree_util.tree_map_with_path(one, letters(model.config), model.params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantize(tensor: MxTensor, dtype: Any, where: Any) -> jax.Array:
    array = tensor.dequantize(dtype)
    return array if where is None else jax.lax.with_sharding_constraint(array, where)


def parameters(model: Model, base: Trainable, trained: Params) -> Params:
    """Parameters of a full fine-tuning in the model's own type."""
    dtype = model.params["embedding"].dtype
    return merge(base.frozen, jax.tree.map(lambda x: x.astype(dtype), trained))


def _leaves(tree: Params) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, MxTensor))


def _paths(tree: Params) -> list[Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, MxTensor))[0]


def _size(leaf: Any) -> int:
    return leaf.size
