"""The KV cache: a ring of `sliding_window` slots for sliding layers, all positions for full layers.

An explicit pytree, argument and result of the network and donated by the jitted steps. Keys are
rotated before they are stored, so that the order of slots means nothing. Position p lives in slot p
(full) or p % size (ring), and what a slot holds follows from the length alone. A row can be taken
back to an earlier length: in a ring by as many tokens as it has slots more than the window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend
from gptoss_jax.sharding import activation_spec, batch_axes, current
from gptoss_jax.sharding import constrain as constrain_array

UNROLLED_ROWS = 8  # rows that are stored one after another without a loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers.

    Attributes:
      keys: One [B, S, K, H] a layer; S is the ring's size in sliding layers, the capacity in the
        others.
      values: As keys.
      length_B: int32 [B], tokens stored for each row.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length_B: jax.Array


def make_cache(
    config: GptOssConfig, batch: int, capacity: int, dtype=jnp.bfloat16, slack: int = 0
) -> KVCache:
    """Empty cache.

    Args:
      config: The model.
      batch: Rows.
      capacity: Tokens that a full layer can hold, at most config.max_context.
      dtype: Of keys and values.
      slack: Slots of a ring beyond the window: how many tokens a row can be taken back.

    Returns:
      The cache; for gpt-oss-20b in bfloat16 24 KiB a token and row, and 3 MiB a row for the rings.

    Raises:
      GptOssError: The capacity is more than the model's context.
    """
    if not 0 < capacity <= config.max_context:
        raise GptOssError(
            f"cache of {capacity} tokens asked for: "
            f"the model's context is 1 to {config.max_context}"
        )

    def zeros():
        ring = config.sliding_window + slack
        lengths = (ring if kind == SLIDING else capacity for kind in config.layer_types)
        return tuple(
            jnp.zeros((batch, n, config.num_kv_heads, config.head_dim), dtype) for n in lengths
        )

    return KVCache(zeros(), zeros(), jnp.zeros(batch, jnp.int32))


def constrain(cache: KVCache) -> KVCache:
    """The cache held to its place on the context's mesh; itself without one."""
    keys = tuple(constrain_array(x, "BSKH") for x in cache.keys)
    values = tuple(constrain_array(x, "BSKH") for x in cache.values)
    return KVCache(keys, values, constrain_array(cache.length_B, "B"))


def cache_bytes(
    config: GptOssConfig, batch: int, capacity: int, itemsize: int = 2, slack: int = 0
) -> int:
    """Bytes of `make_cache`'s keys and values."""
    ring = config.sliding_window + slack
    slots = sum(ring if kind == SLIDING else capacity for kind in config.layer_types)
    return 2 * batch * slots * config.num_kv_heads * config.head_dim * itemsize


def ring_positions(length_B: Int[Array, " B"], size: int) -> Int[Array, "B S"]:
    """Position that each slot of a ring holds after `length` tokens, -1 for none."""
    last = (length_B - 1)[:, None]
    slots = jnp.arange(size, dtype=jnp.int32)[None]
    positions = last - (last - slots) % size
    return jnp.where(length_B[:, None] > 0, jnp.maximum(positions, -1), -1)


def last_of_ring(
    stored_BSKH: Float[Array, "B S K H"], length_B: Int[Array, " B"], window: int
) -> Float[Array, "B W K H"]:
    """The last `window` positions of a ring, in order; what lies before position 0 is arbitrary."""
    slots = last_positions(length_B, window) % stored_BSKH.shape[1]
    return jnp.take_along_axis(stored_BSKH, slots[:, :, None, None], axis=1)


def last_positions(length_B: Int[Array, " B"], window: int) -> Int[Array, "B W"]:
    """The last `window` positions before `length`, negative before the first."""
    return (length_B - window)[:, None] + jnp.arange(window, dtype=jnp.int32)[None]


def full_positions(length_B: Int[Array, " B"], capacity: int) -> Int[Array, "B S"]:
    """Position that each slot of a full layer holds, -1 for none."""
    slots = jnp.arange(capacity, dtype=jnp.int32)[None]
    return jnp.where(slots < length_B[:, None], slots, -1)


def write(
    stored_BSKH: Float[Array, "B S K H"],
    new_BTKH: Float[Array, "B T K H"],
    slots_BT: Int[Array, "B T"],
) -> Float[Array, "B S K H"]:
    """Stores new rows in their slots; a slot of S or more stores nothing."""

    def reference(stored_BSKH, new_BTKH, slots_BT):
        rows = jnp.arange(stored_BSKH.shape[0], dtype=jnp.int32)[:, None]
        return stored_BSKH.at[rows, slots_BT].set(new_BTKH, mode="drop")

    return _stored(reference, stored_BSKH, new_BTKH.astype(stored_BSKH.dtype), slots_BT)


def _stored(reference, *parts):
    """CPUs store by a kernel: XLA would turn the whole cache into float32 and back."""
    why = "the mesh's partitioner knows scatters only" if current() else cpu.why_not()
    return backends.run("store", reference, {"cpu": Backend(cpu.store_rows, why)}, *parts)


def append(
    stored_BSKH: Float[Array, "B S K H"],
    new_B1KH: Float[Array, "B 1 K H"],
    slots_B: Int[Array, " B"],
) -> Float[Array, "B S K H"]:
    """Stores one new row for each sequence, in place.

    By dynamic_update_slice, which XLA does in place in any layout: for a scatter, TPUs keep a
    second copy of the whole cache in another layout. Every sequence stores, masked ones too: the
    next slot of a full layer is not known before its token is, and the next slot of a ring holds
    the position that is about to leave the window. A sequence without a free slot (it has stopped:
    the cache grows before others need it) overwrites its last one. On a mesh each device stores the
    rows and heads that it holds.

    Args:
      stored_BSKH: Keys or values of one layer.
      new_B1KH: Of one token.
      slots_B: int32.
    """
    new_B1KH = new_B1KH.astype(stored_BSKH.dtype)

    def store(stored_BSKH, new_B1KH, slots_B):
        def one(b, stored_BSKH):
            row = jax.lax.dynamic_slice_in_dim(new_B1KH, b, 1)
            at = (b, slots_B[b], 0, 0)
            return jax.lax.dynamic_update_slice(stored_BSKH, row, at)

        rows = stored_BSKH.shape[0]
        if rows > UNROLLED_ROWS:
            return jax.lax.fori_loop(0, rows, one, stored_BSKH)
        for b in range(rows):
            stored_BSKH = one(b, stored_BSKH)
        return stored_BSKH

    if current() is None:

        def reference(stored_BSKH, new_B1KH, slots_B1):
            return store(stored_BSKH, new_B1KH, slots_B1[:, 0])

        slots_B1 = jnp.minimum(slots_B, stored_BSKH.shape[1] - 1)[:, None]
        return _stored(reference, stored_BSKH, new_B1KH, slots_B1)
    spread, by_row = (
        activation_spec(letters, x.shape) for letters, x in (("BSKH", stored_BSKH), ("B", slots_B))
    )
    return jax.shard_map(store, in_specs=(spread, spread, by_row), out_specs=spread)(
        stored_BSKH, new_B1KH, slots_B
    )


def row_of(
    stored_BSKH: Float[Array, "B S K H"],
    row: Int[Array, ""],
    start: Int[Array, ""] | int = 0,
    size: int | None = None,
) -> Float[Array, "one S K H"]:
    """One row, or `size` of its slots from `start` on. On a mesh its owner sends it to all over
    which rows are spread, where the partitioner would gather the whole cache.
    """
    size = size or stored_BSKH.shape[1]
    axes = batch_axes(stored_BSKH.shape[0])

    def own(stored_BSKH, row, start):
        count = stored_BSKH.shape[0]
        row = row - count * jax.lax.axis_index(axes)
        at = (jnp.clip(row, 0, count - 1), start, 0, 0)
        found = jax.lax.dynamic_slice(stored_BSKH, at, (1, size, *stored_BSKH.shape[2:]))
        held = (row >= 0) & (row < count)
        return jax.lax.psum(jnp.where(held, found, jnp.zeros_like(found)), axes)

    if not axes:
        at = (row, start, 0, 0)
        return jax.lax.dynamic_slice(stored_BSKH, at, (1, size, *stored_BSKH.shape[2:]))
    whole = PartitionSpec()
    spread = activation_spec("BSKH", stored_BSKH.shape)
    out = PartitionSpec(None, *spread[1:])
    return jax.shard_map(own, in_specs=(spread, whole, whole), out_specs=out)(
        stored_BSKH, row, jnp.asarray(start, jnp.int32)
    )


def full_slots(positions_BT: Int[Array, "B T"], capacity: int) -> Int[Array, "B T"]:
    """Slots of a full layer; positions of -1 are not stored."""
    return jnp.where(positions_BT >= 0, positions_BT, capacity)


def ring_slots(
    positions_BT: Int[Array, "B T"], length_B: Int[Array, " B"], size: int
) -> Int[Array, "B T"]:
    """Slots of a ring after which `length` tokens are known: only the last `size` positions are
    stored.
    """
    kept = (positions_BT >= 0) & (positions_BT >= length_B[:, None] - size)
    return jnp.where(kept, positions_BT % size, size)
