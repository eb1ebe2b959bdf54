"""The one table of tensor names: where each of our parameters lies in the three layouts.

Layouts: "mxfp4" (Hugging Face, packed experts), "bfloat16" (Hugging Face, experts transposed to [E,
D, 2F] and [E, F, D]), "original" (OpenAI's, fused qkv). Axes are written as letters (dims.py),
merged axes as one word: a file's "NH D" is our NHD after a reshape, a file's "E D FP" is our EFPD
after a reshape and a transposition. Knows names, shapes and dtypes; opens no file.

Source: openai/gpt-oss gpt_oss/torch/weights.py; transformers
models/gpt_oss/convert_gpt_oss_weights_to_hf.py.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from gptoss_jax import dims
from gptoss_jax.config import MXFP4_BLOCK, GptOssConfig
from gptoss_jax.errors import GptOssError

Layout = Literal["mxfp4", "bfloat16", "original"]
Path = tuple[str | int, ...]

# our path, the file's axes, Hugging Face's name, the original name. Rows that share an original
# tensor lie in it one after another along its first axis (q, k, v).
_TOP = (
    ("embedding", "V D", "model.embed_tokens.weight", "embedding.weight"),
    ("norm", "D", "model.norm.weight", "norm.scale"),
    ("unembedding", "V D", "lm_head.weight", "unembedding.weight"),
)
_LAYER = (
    ("attention.norm", "D", "input_layernorm.weight", "attn.norm.scale"),
    ("attention.q", "NH D", "self_attn.q_proj.weight", "attn.qkv.weight"),
    ("attention.q_bias", "NH", "self_attn.q_proj.bias", "attn.qkv.bias"),
    ("attention.k", "KH D", "self_attn.k_proj.weight", "attn.qkv.weight"),
    ("attention.k_bias", "KH", "self_attn.k_proj.bias", "attn.qkv.bias"),
    ("attention.v", "KH D", "self_attn.v_proj.weight", "attn.qkv.weight"),
    ("attention.v_bias", "KH", "self_attn.v_proj.bias", "attn.qkv.bias"),
    ("attention.sinks", "N", "self_attn.sinks", "attn.sinks"),
    ("attention.o", "D NH", "self_attn.o_proj.weight", "attn.out.weight"),
    ("attention.o_bias", "D", "self_attn.o_proj.bias", "attn.out.bias"),
    ("mlp.norm", "D", "post_attention_layernorm.weight", "mlp.norm.scale"),
    ("mlp.router", "E D", "mlp.router.weight", "mlp.gate.weight"),
    ("mlp.router_bias", "E", "mlp.router.bias", "mlp.gate.bias"),
    ("mlp.gate_up_bias", "E FP", "mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    ("mlp.down_bias", "E D", "mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
)
_PACKED = (
    ("mlp.gate_up.blocks", "E FP U Y", "mlp.experts.gate_up_proj_blocks", "mlp.mlp1_weight.blocks"),
    ("mlp.gate_up.scales", "E FP U", "mlp.experts.gate_up_proj_scales", "mlp.mlp1_weight.scales"),
    ("mlp.down.blocks", "E D U Y", "mlp.experts.down_proj_blocks", "mlp.mlp2_weight.blocks"),
    ("mlp.down.scales", "E D U", "mlp.experts.down_proj_scales", "mlp.mlp2_weight.scales"),
)
_UNPACKED = (
    ("mlp.gate_up", "E D FP", "mlp.experts.gate_up_proj", None),
    ("mlp.down", "E F D", "mlp.experts.down_proj", None),
)
# Our order of axes where it is not the file's.
_TRANSPOSED = {"EDFP": "EFPD", "EFD": "EDF"}
_PREFIX = {"mxfp4": "model.layers.{}.", "bfloat16": "model.layers.{}.", "original": "block.{}."}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter tree, and the part of a file's tensor that holds it.

    Attributes:
      path: Keys in our tree, for example ("layers", 0, "mlp", "gate_up", "blocks").
      letters: Our axes, for example "EFPUY".
      shape: Our shape.
      packed: True for MXFP4 blocks and scales (uint8), False for floating point.
      tensor: Name of the tensor in the file.
      tensor_shape: Shape of that tensor.
      stored: Axes of our part in the file's order, split; a transposition of `letters`.
      row: First index of our part along the tensor's first axis (0 but for k and v in a fused qkv).
    """

    path: Path
    letters: str
    shape: tuple[int, ...]
    packed: bool
    tensor: str
    tensor_shape: tuple[int, ...]
    stored: str
    row: int = 0

    @property
    def name(self) -> str:
        """The path as one word, for people and for the manifest: layers.0.mlp.gate_up.blocks."""
        return ".".join(map(str, self.path))

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of our part in the file's order of axes."""
        return tuple(self.shape[self.letters.index(letter)] for letter in self.stored)

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Our array in the file's order and shape (of our part, where several share a tensor).

        Args:
          array: Array of `shape`.

        Returns:
          Array of the file's rank; a view where no transposition is needed.
        """
        ordered = array.transpose([self.letters.index(letter) for letter in self.stored])
        return ordered.reshape(-1, *self.tensor_shape[1:])

    def from_file(self, array: np.ndarray) -> np.ndarray:
        """Our order of axes from the file's, merged axes split already: the inverse transposition.

        Args:
          array: Array with axes `stored` (any slice of it).

        Returns:
          A view with axes `letters`.
        """
        return array.transpose([self.stored.index(letter) for letter in self.letters])


def leaves(config: GptOssConfig, layout: Layout) -> tuple[Leaf, ...]:
    """All arrays of a model and where a layout keeps them; MXFP4 experts are blocks and scales.

    Args:
      config: Sizes.
      layout: "mxfp4", "bfloat16" or "original".

    Returns:
      Leaves, layer by layer, the embedding first.

    Raises:
      GptOssError: The layout is unknown.
    """
    if layout not in _PREFIX:
        raise GptOssError(
            f"no checkpoint layout {layout!r}: use one of {', '.join(map(repr, _PREFIX))}"
        )
    rows = _LAYER + (_UNPACKED if layout == "bfloat16" else _PACKED)
    found = [_leaf(config, layout, _TOP[0], ("embedding",), "", {})]
    for number in range(config.num_layers):
        ends: dict[str, int] = {}
        for row in rows:
            path = ("layers", number, *row[0].split("."))
            found.append(_leaf(config, layout, row, path, _PREFIX[layout].format(number), ends))
    found += [_leaf(config, layout, row, (row[0],), "", {}) for row in _TOP[1:]]
    totals: dict[str, int] = {}
    for leaf in found:
        totals[leaf.tensor] = leaf.row + leaf.tensor_shape[0]
    return tuple(
        dataclasses.replace(leaf, tensor_shape=(totals[leaf.tensor], *leaf.tensor_shape[1:]))
        for leaf in found
    )


def _leaf(config, layout, row, path, prefix, ends: dict[str, int]) -> Leaf:
    """One leaf; `ends` remembers how far each tensor of the layer is taken by the leaves before."""
    _, axes, hf, original = row
    known = dims.sizes(config)
    known["U"] = (known["D"] if "gate_up" in path else known["F"]) // MXFP4_BLOCK
    words = axes.split()
    stored = "".join(words)
    letters = _TRANSPOSED.get(stored, stored) if path[-1] in ("gate_up", "down") else stored
    tensor = prefix + (original if layout == "original" else hf)
    tensor_shape = tuple(int(np.prod([known[letter] for letter in word])) for word in words)
    start = ends.get(tensor, 0)
    ends[tensor] = start + tensor_shape[0]
    shape = tuple(known[letter] for letter in letters)
    return Leaf(
        path, letters, shape, path[-1] in ("blocks", "scales"), tensor, tensor_shape, stored, start
    )


def tensors(config: GptOssConfig, layout: Layout) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Names of a layout's tensors, each with its shape and whether it is packed (uint8)."""
    return {leaf.tensor: (leaf.tensor_shape, leaf.packed) for leaf in leaves(config, layout)}


def detect(names: Iterable[str]) -> Layout:
    """Layout of a checkpoint from the names of its tensors.

    Raises:
      GptOssError: They are not the names of a gpt-oss model.
    """
    found = set(names)
    if any(name.startswith("block.") for name in found):
        return "original"
    if any(name.endswith(".gate_up_proj_blocks") for name in found):
        return "mxfp4"
    if any(name.endswith(".gate_up_proj") for name in found):
        return "bfloat16"
    example = f", for example {min(found)!r}" if found else ""
    raise GptOssError(
        f"{len(found)} tensors{example}, none of them experts of gpt-oss: expected the names "
        "of Hugging Face's layout (model.layers.0.mlp.experts.gate_up_proj…) or of OpenAI's "
        "original layout (block.0.mlp.mlp1_weight…)"
    )


def put_leaf(tree: dict[Any, Any], path: Path, value: Any) -> None:
    """Puts a value at a path of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def nested(leaves: Mapping[Path, Any]) -> dict[Any, Any]:
    """The nested dict of values by path."""
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        put_leaf(tree, path, value)
    return tree
