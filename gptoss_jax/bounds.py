"""What a step has to move and compute at least, on the busiest device of a mesh: arithmetic on
shapes and shardings, nothing is compiled.

The counts take each weight as read once a step, each cached key and value once, and of the experts
those that the rows choose. Routing is taken as uniform: how many different experts fall on the
busiest device is the mean of a fixed simulation.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptoss_jax import dims, sharding
from gptoss_jax.cache import cache_bytes
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.model import letters
from gptoss_jax.mxfp4 import BLOCK, BYTES

DRAWS = 200
EXPERT_WEIGHTS = ("gate_up", "gate_up_bias", "down", "down_bias")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes of parameters on one device.

    Attributes:
      experts: Of the experts it holds, all layers.
      embedding: Of which a step reads a few rows only.
      rest: Attention, norms, router, unembedding: read whole by every step.
    """

    experts: int
    embedding: int
    rest: int

    @property
    def total(self) -> int:
        """All."""
        return self.experts + self.embedding + self.rest


@dataclasses.dataclass(frozen=True)
class Work:
    """Least work of one step on the busiest device: bytes of device memory read, operations."""

    bytes: float
    flops: float

    def seconds(self, device) -> float:
        """At least, by memory bandwidth or matrix rate."""
        return max(self.bytes / device.bandwidth, self.flops / device.flops)


def parts(spec: PartitionSpec, sizes: dict[str, int]) -> int:
    """Into how many parts a sharding cuts an array."""
    named = [axes if isinstance(axes, tuple) else (axes,) for axes in spec if axes]
    return math.prod(sizes.get(axis, 1) for axes in named for axis in axes)


@functools.lru_cache
def leaves(
    config: GptOssConfig, packed: bool, dtype: Any = jnp.bfloat16
) -> list[tuple[tuple, str, tuple[int, ...], np.dtype]]:
    """(path, letters, shape, dtype) of every array of the parameter tree; packed experts are two
    arrays, all others have `dtype`.
    """
    found = []
    for keys, axes in jax.tree_util.tree_flatten_with_path(letters(config))[0]:
        path, shape = tuple(key.key for key in keys), dims.shape(axes, config)
        if packed and path[-1] in ("gate_up", "down"):
            blocks = shape[-1] // BLOCK
            u8 = np.dtype(np.uint8)
            found += [
                ((*path, "blocks"), axes[:-1] + "UY", (*shape[:-1], blocks, BYTES), u8),
                ((*path, "scales"), axes[:-1] + "U", (*shape[:-1], blocks), u8),
            ]
        else:
            found.append((path, axes, shape, np.dtype(dtype)))
    return found


def weights(
    config: GptOssConfig, sizes: dict[str, int], packed: bool = True, dtype: Any = jnp.bfloat16
) -> Weights:
    """Bytes of parameters on each device of a mesh.

    Args:
      config: The model.
      sizes: Mesh axis -> size.
      packed: Experts in MXFP4; else as all the rest.
      dtype: Of the rest.
    """
    found = {"experts": 0, "embedding": 0, "rest": 0}
    for path, axes, shape, stored in leaves(config, packed, dtype):
        cut = parts(sharding.parameter_spec(path, axes), sizes)
        names = [key for key in path if isinstance(key, str)]
        kind = "experts" if set(names) & set(EXPERT_WEIGHTS) else names[0]
        kind = kind if kind in found else "rest"
        found[kind] += math.prod(shape) * stored.itemsize // cut
    return Weights(**found)


def rows_of(batch: int, sizes: dict[str, int]) -> int:
    """Rows of a batch on one device: as `sharding.batch_axes` spreads them."""
    return batch // math.prod(sizes[axis] for axis in sharding.batch_axes(batch, sizes))


def cache(
    config: GptOssConfig,
    sizes: dict[str, int],
    batch: int,
    context: int,
    dtype: Any = jnp.bfloat16,
) -> int:
    """Bytes of the KV cache on one device."""
    held = cache_bytes(config, rows_of(batch, sizes), context, np.dtype(dtype).itemsize)
    return held // sizes.get("tensor", 1)


def busiest(config: GptOssConfig, sizes: dict[str, int], tokens: int) -> float:
    """How many different experts of a layer the busiest device reads for `tokens` tokens."""
    groups = sizes.get("expert", 1) * sizes.get("tensor", 1)
    return _busiest(config.num_experts, config.experts_per_token, groups, tokens)


@functools.lru_cache
def _busiest(E: int, X: int, groups: int, tokens: int) -> float:
    if tokens * X >= 8 * E:
        return E / groups
    random = np.random.default_rng(0)
    draws = random.random((DRAWS, tokens, E)).argpartition(X - 1, axis=2)[..., :X]
    chosen = np.zeros((DRAWS, E), bool)
    chosen[np.arange(DRAWS)[:, None], draws.reshape(DRAWS, -1)] = True
    return float(chosen.reshape(DRAWS, groups, -1).sum(2).max(1).mean())


def step(
    config: GptOssConfig,
    sizes: dict[str, int],
    batch: int,
    new: int,
    context: int,
    packed: bool = True,
    dtype: Any = jnp.bfloat16,
) -> Work:
    """Least work of a step that reads `new` tokens of each row and ends at `context` tokens.

    Args:
      config: The model.
      sizes: Mesh axis -> size.
      batch: Rows.
      new: Tokens of each row: 1 for decode.
      context: Tokens in the cache after it.
      packed: Experts in MXFP4.
      dtype: Of all other weights, activations and cache.
    """
    held = weights(config, sizes, packed, dtype)
    tensor, groups = sizes.get("tensor", 1), sizes.get("expert", 1) * sizes.get("tensor", 1)
    rows = rows_of(batch, sizes)
    # rows that share experts: those of one copy of the model
    copies = sizes.get("data", 1) * sizes.get("fsdp", 1)
    together = (batch // copies if batch % copies == 0 else batch) * new
    one = held.experts / (config.num_experts / groups)
    moved = held.rest + one * busiest(config, sizes, together)
    moved += rows * new * config.hidden_size * np.dtype(dtype).itemsize
    moved += cache(config, sizes, batch, context, dtype)
    D, F, N, K = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads // tensor,
        config.num_kv_heads // tensor,
    )
    H = config.head_dim
    projections = D * H * (2 * N + 2 * K) + D * config.num_experts
    experts = together * config.experts_per_token * 3 * D * F / groups
    flops = 2 * (rows * new * projections + experts) * config.num_layers
    flops += 2 * rows * D * config.vocab_size / tensor
    for kind in config.layer_types:
        seen = min(config.sliding_window, context) if kind == SLIDING else context - (new - 1) / 2
        flops += 4 * rows * new * seen * N * H
    return Work(moved, flops)
