"""Checkpoints made of safetensors files: their layout, what is wrong with them, and their slices.

Knows the files of a folder and the table of names; makes no jax arrays and knows nothing of Orbax.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.checkpoint.safetensors_file import Tensor
from gptoss_jax.checkpoint.stored import Stored, refuse
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import Layout, Leaf, detect, leaves
from gptoss_jax.mxfp4 import check_scales

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
_FLOATS = ("BF16", "F32")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of safetensors files, opened: headers read, no data.

    Attributes:
      folder: Where it is.
      layout: How its tensors are named and laid out.
      config: Its config.json.
      tensors: Every tensor of its files.
      leaves: Our parameters, and where the layout keeps them.
    """

    folder: Path
    layout: Layout
    config: GptOssConfig
    tensors: dict[str, Tensor]
    leaves: tuple[Leaf, ...]

    def dtype(self, leaf: Leaf) -> np.dtype:
        """Type in which the file holds a parameter."""
        return safetensors_file.DTYPES[self.tensors[leaf.tensor].dtype]

    def entry(self, leaf: Leaf) -> tuple[str, tuple[int, ...], int] | None:
        """Type, shape in our axes and bytes of a parameter; None if the files lack it."""
        tensor = self.tensors.get(leaf.tensor)
        if tensor is None:
            return None
        dtype = safetensors_file.DTYPES[tensor.dtype]
        return dtype.name, leaf.shape, dtype.itemsize * leaf.size

    def read(self, leaf: Leaf, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a slice of a parameter, as stored, touching only the bytes of the slice.

        Args:
          leaf: The parameter.
          index: Slices along our axes; everything when None.

        Returns:
          The slice with our axes, in the file's type; a transposed view for unpacked experts.

        Raises:
          GptOssError: The file ended early, or a scale is 255.
        """
        stored = (
            None
            if index is None
            else tuple(index[leaf.letters.index(letter)] for letter in leaf.stored)
        )
        array = self.tensors[leaf.tensor].read(leaf.stored_shape, stored, leaf.row)
        if leaf.path[-1] == "scales":
            check_scales(array, leaf.tensor)
        return leaf.from_file(array)

    def arrays(self) -> list[Stored]:
        """All parameters, to be read piece by piece."""
        rest = (slice(None),)
        return [
            Stored(
                leaf.path,
                leaf.shape,
                self.dtype(leaf),
                lambda rows, leaf=leaf: self.read(leaf, (rows, *rest * (len(leaf.shape) - 1))),
            )
            for leaf in self.leaves
        ]

    def problems(self) -> list[str]:
        """What keeps it from being loaded, one line each: missing, surplus, wrong shape or type."""
        found = []
        expected = {leaf.tensor: leaf for leaf in self.leaves}
        for name, leaf in expected.items():
            if name not in self.tensors:
                found.append(
                    f"tensor {name!r} is missing: the checkpoint is incomplete, download it again"
                )
                continue
            tensor = self.tensors[name]
            wanted = ("U8",) if leaf.packed else _FLOATS
            if tensor.shape != leaf.tensor_shape:
                found.append(
                    f"tensor {name!r} in {tensor.file.name} has shape {tensor.shape}, config.json "
                    f"asks for {leaf.tensor_shape}: the two do not belong together"
                )
            if tensor.dtype not in wanted:
                found.append(
                    f"tensor {name!r} in {tensor.file.name} has type {tensor.dtype}, expected "
                    f"{' or '.join(wanted)}"
                )
        for name in self.surplus():
            found.append(
                f"tensor {name!r} in {self.tensors[name].file.name} is none of gpt-oss's: "
                "this is another model"
            )
        return found

    def surplus(self) -> list[str]:
        """Names of tensors that a gpt-oss model does not have."""
        known = {leaf.tensor for leaf in self.leaves}
        return [name for name in self.tensors if name not in known]

    def check(self) -> None:
        """Refuses a checkpoint with problems, before any data is read.

        Raises:
          GptOssError: The first problem, and how many more there are.
        """
        refuse(self.folder, self.problems())


def open_source(folder: Path) -> Source:
    """Opens a folder of safetensors files: reads config.json, the index, if any, and headers.

    Args:
      folder: A local folder in one of the three layouts.

    Returns:
      The opened checkpoint; its `check` has not been called.

    Raises:
      GptOssError: There is no config or no tensor file, a shard is missing or damaged, the index
        points outside the folder, a tensor is there twice, or the names are of another model.
    """
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        for name, tensor in safetensors_file.read_header(file).items():
            if name in tensors:
                raise GptOssError(
                    f"{folder}: tensor {name!r} is in {tensors[name].file.name} and in "
                    f"{file.name}: remove one"
                )
            tensors[name] = tensor
    layout = detect(tensors)
    return Source(folder, layout, config, tensors, leaves(config, layout))


def _files(folder: Path) -> list[Path]:
    """Tensor files of a folder: those that the index names, or all."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            hint = (
                f"; {folder / 'original'} holds OpenAI's layout: give that folder"
                if (folder / "original").is_dir()
                else ""
            )
            raise GptOssError(f"{folder}: no *.safetensors file{hint}")
        return files
    index = read_json(folder / INDEX)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise GptOssError(f"{folder / INDEX}: no weight_map: download it again")
    for tensor, name in weights.items():
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise GptOssError(
                f"{folder / INDEX}: tensor {tensor!r} points to {name!r}: expected the "
                "name of a .safetensors file in the same folder"
            )
    names = sorted(set(weights.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise GptOssError(
            f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)}): "
            "download it again"
        )
    return [folder / name for name in names]


def read_config(folder: Path) -> GptOssConfig:
    """Config of a folder; the end-of-sequence ids are generation_config.json's where it has them.

    config.json of the released models names one of three: a model that did not stop at the others
    would run on.

    Raises:
      GptOssError: config.json is missing or asks for what the model does not do.
    """
    config = GptOssConfig.from_hf(read_json(folder / "config.json"))
    if not (folder / GENERATION).exists():
        return config
    eos = read_json(folder / GENERATION).get("eos_token_id")
    ids = (eos,) if isinstance(eos, int) else tuple(eos or config.eos_token_ids)
    return dataclasses.replace(config, eos_token_ids=ids)


def write_config(folder: Path, config: GptOssConfig, *, quantized: bool) -> None:
    """Writes config.json and generation_config.json in Hugging Face's spelling.

    Args:
      folder: Where.
      config: What.
      quantized: Whether the experts beside it are MXFP4.
    """
    raw = config.to_hf()
    if quantized:
        raw["quantization_config"] = QUANTIZATION
    generation = {
        "do_sample": True,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    for name, content in (("config.json", raw), (GENERATION, generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def read_json(file: Path):
    """Parsed JSON of a checkpoint's file.

    Raises:
      GptOssError: The file is missing or not JSON.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise GptOssError(
            f"{file.parent}: no {file.name}: expected a checkpoint's folder"
        ) from None
    except ValueError as error:
        raise GptOssError(f"{file}: not JSON ({error}): download it again") from error
