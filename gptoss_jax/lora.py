"""LoRA: which weights get a low-rank addition, its parameters, and how several adapters become one
addition.

An adapter is a second tree with the same paths as the parameters: {"a", "b"} at every weight that
it adds to, W' = W + (alpha / rank) b a. The base is never changed, and stays packed. Knows no files
and no training.

Source: Hu et al., LoRA, 2021, section 4.1; Kalajdzievski, rsLoRA, 2023, for alpha / sqrt(rank).
"""

import dataclasses
import fnmatch
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import dims, sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import put_leaf
from gptoss_jax.model import Params, letters
from gptoss_jax.ops import LowRank, Rounded

# Weight -> axes of a and b. a contracts the weight's inputs; b gives its outputs.
AXES = {
    "q": ("RD", "NHR"),
    "k": ("RD", "KHR"),
    "v": ("RD", "KHR"),
    "o": ("RNH", "DR"),
    "gate_up": ("ERD", "EFPR"),
    "down": ("ERF", "EDR"),
    "embedding": ("RV", "DR"),
    "unembedding": ("RD", "VR"),
}
# Weight -> einsum of b and a that makes what is added to it, in the weight's own order of axes.
PRODUCTS = {
    "q": "NHR,RD->NHD",
    "k": "KHR,RD->KHD",
    "v": "KHR,RD->KHD",
    "o": "DR,RNH->DNH",
    "gate_up": "EFPR,ERD->EFPD",
    "down": "EDR,ERF->EDF",
    "embedding": "DR,RV->VD",
    "unembedding": "VR,RD->VD",
}
EXPERTS = ("gate_up", "down")
GROUPS = {"attention": ("q", "k", "v", "o"), "experts": EXPERTS, "all": (*AXES,)}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What an adapter adds to.

    Attributes:
      rank: Of attention, embedding and unembedding.
      alpha: Scale: additions are multiplied by alpha / rank.
      targets: Names of AXES, "attention", "experts" or "all"; patterns such as "gate*" too.
      layers: Layers that get one; None for all.
      expert_rank: Of the experts; None for `rank`. The experts' alpha is `alpha` in proportion, so
        that their scale is the same.
      rslora: Scale by alpha / sqrt(rank) instead.
      quantization_aware: Compute experts with the MXFP4 rounding of base plus addition, the
        gradient as if nothing were rounded, so that a merged MXFP4 checkpoint computes the same.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention", "experts")
    layers: tuple[int, ...] | None = None
    expert_rank: int | None = None
    rslora: bool = False
    quantization_aware: bool = False

    def __post_init__(self):
        for name, value in (("rank", self.rank), ("expert_rank", self.expert_rank or self.rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GptOssError(f"LoRA {name} of {value!r}: expected a positive integer")
        if not self.alpha > 0:
            raise GptOssError(f"LoRA alpha of {self.alpha!r}: expected a positive number")

    def rank_of(self, name: str) -> int:
        """Rank of the addition to a weight."""
        return (self.expert_rank or self.rank) if name in EXPERTS else self.rank

    @property
    def scale(self) -> float:
        """What b a is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def names(self) -> tuple[str, ...]:
        """Weights that the targets mean, in the order of AXES.

        Raises:
          GptOssError: A target matches nothing; the message lists what exists.
        """
        found: set[str] = set()
        for target in self.targets:
            matched = GROUPS.get(target) or fnmatch.filter(AXES, target)
            if not matched:
                raise GptOssError(
                    f"LoRA target {target!r} matches nothing: use attention, experts, all, or "
                    f"names and patterns of {', '.join(AXES)}"
                )
            found.update(matched)
        if not found:
            raise GptOssError(f"LoRA needs a target: use attention, experts, or {', '.join(AXES)}")
        return tuple(name for name in AXES if name in found)


def paths(config: GptOssConfig, lora: LoraConfig) -> list[tuple]:
    """Paths of the weights that an adapter adds to.

    Raises:
      GptOssError: A target matches nothing, or a layer does not exist.
    """
    names = set(lora.names())
    for layer in lora.layers or ():
        if not 0 <= layer < config.num_layers:
            raise GptOssError(f"LoRA layer {layer}: the model's are 0 to {config.num_layers - 1}")
    if lora.layers == ():
        raise GptOssError("LoRA layers are empty: give some, or None for all")
    found = []
    for keys, _ in jax.tree_util.tree_flatten_with_path(letters(config))[0]:
        path = tuple(key.key for key in keys)
        inside = path[0] == "layers"
        if path[-1] in names and (not inside or lora.layers is None or path[1] in lora.layers):
            found.append(path)
    return found


def axes(config: GptOssConfig, lora: LoraConfig) -> Params:
    """Tree of the adapter's letters, for example [...]["q"] == {"a": "RD", "b": "NHR"}."""
    tree: Params = {}
    for path in paths(config, lora):
        a, b = AXES[path[-1]]
        put_leaf(tree, path, {"a": a, "b": b})
    return tree


def shapes(config: GptOssConfig, lora: LoraConfig) -> Params:
    """Tree of jax.ShapeDtypeStruct, float32."""

    def one(keys, letters: str):
        rank = lora.rank_of(keys[-2].key)
        parts = (rank if letter == "R" else dims.shape(letter, config)[0] for letter in letters)
        return jax.ShapeDtypeStruct(tuple(parts), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, axes(config, lora))


def init(config: GptOssConfig, lora: LoraConfig, key: jax.Array) -> Params:
    """A new adapter, float32: a uniform as torch's Linear (bound 1 / sqrt(inputs), as peft), b
    zero, so that it changes nothing yet.

    Args:
      config: The model.
      lora: What to add to.
      key: Every a has its own, folded from its path's place in the tree.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes(config, lora))
    found = []
    for number, (keys, shape) in enumerate(leaves):
        if keys[-1].key == "b":
            found.append(jnp.zeros(shape.shape, shape.dtype))
            continue
        letters_ = AXES[keys[-2].key][0]
        sizes = zip(shape.shape, letters_, strict=True)
        bound = 1 / math.sqrt(math.prod(size for size, letter in sizes if letter not in "RE"))
        own = jax.random.fold_in(key, number)
        found.append(jax.random.uniform(own, shape.shape, shape.dtype, -bound, bound))
    return jax.tree.unflatten(tree, found)


def count(tree: Params) -> int:
    """Number of parameters of an adapter, arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shardings(config: GptOssConfig, lora: LoraConfig, mesh: Any) -> Params:
    """Where an adapter lies on a mesh: as the weights it adds to, by the same table."""

    def one(keys, letters: str):
        path = tuple(key.key for key in keys)
        return jax.sharding.NamedSharding(mesh, sharding.parameter_spec(path, letters))

    return jax.tree_util.tree_map_with_path(one, axes(config, lora))


def additions(adapter: Params, lora: LoraConfig) -> Params:
    """What `model.apply(added=)` takes: the adapter for all rows."""

    def one(name, pair):
        rank = pair["b"].shape[-1]
        if lora.quantization_aware and name in EXPERTS:
            return Rounded(pair["a"], pair["b"] * lora.scale, jnp.ones((1, rank), jnp.float32))
        return LowRank(pair["a"], pair["b"], jnp.full((1, rank), lora.scale, jnp.float32))

    return each_pair(one, adapter)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Several adapters side by side along the rank, to be chosen row by row.

    Attributes:
      names: Of the adapters, in order; number 0 is none of them.
      pairs: {"a", "b"} at every weight that one of them adds to.
      gains: Tables float32 [1 + adapters, R] at the same weights: what a row of adapter i
        multiplies each rank with, zero for those of others.
    """

    names: tuple[str, ...]
    pairs: Params
    gains: Params

    def added(self, numbers: np.ndarray, put) -> Params:
        """What `model.apply(added=)` takes for rows that use the adapters of these numbers.

        Args:
          numbers: int [B], 0 for none.
          put: Makes a device's array of numpy's float32 [B, R].
        """
        known: dict[bytes, jax.Array] = {}  # most weights have the same table

        def gain(table):
            key = table.tobytes()
            if key not in known:
                known[key] = put(table[numbers])
            return known[key]

        def walk(pairs, gains) -> Any:
            if set(pairs) == {"a", "b"}:
                return LowRank(pairs["a"], pairs["b"], gain(gains))
            return {key: walk(child, gains[key]) for key, child in pairs.items()}

        return walk(self.pairs, self.gains)


def stack(adapters: Mapping[str, tuple[Params, LoraConfig]], dtype: Any, put) -> Stack:
    """Adapters side by side.

    Args:
      adapters: Name -> tree of arrays and its config; trees may have different weights and ranks.
        What a quantization-aware one was trained with is not rounded here.
      dtype: Of the arrays: what the model computes in.
      put: Called with path, letters and a numpy array; puts it on the devices.
    """
    found: dict[tuple, dict[int, Any]] = {}
    for number, (tree, _) in enumerate(adapters.values()):
        for path, pair in pairs_of(tree):
            found.setdefault(path, {})[number] = pair
    configs = [config for _, config in adapters.values()]
    pairs: Params = {}
    gains: Params = {}
    for path, parts in found.items():
        joined = {}
        for part, letters_ in zip("ab", AXES[path[-1]], strict=True):
            arrays = [np.asarray(pair[part]) for pair in parts.values()]
            whole = np.concatenate(arrays, axis=letters_.index("R"))
            joined[part] = put((*path, part), letters_, whole.astype(dtype))
        put_leaf(pairs, path, joined)
        table = np.zeros((1 + len(configs), joined["b"].shape[-1]), np.float32)
        start = 0
        for number, pair in parts.items():
            end = start + pair["b"].shape[-1]
            table[1 + number, start:end] = configs[number].scale
            start = end
        put_leaf(gains, path, table)
    return Stack(tuple(adapters), pairs, gains)


def pairs_of(tree: Params, path: tuple = ()) -> Iterator[tuple[tuple, Params]]:
    """Path of a weight and its {"a", "b"}, for all of an adapter."""
    if set(tree) == {"a", "b"}:
        yield path, tree
        return
    for key, child in tree.items():
        yield from pairs_of(child, (*path, key))


def each_pair(one, tree: Params, name: Any = None) -> Params:
    """A tree with one(weight's name, pair) in the place of every {"a", "b"}."""
    if set(tree) == {"a", "b"}:
        return one(name, tree)
    return {key: each_pair(one, child, key) for key, child in tree.items()}
