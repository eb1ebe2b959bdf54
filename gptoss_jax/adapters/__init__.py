"""Adapters on disk: our own form, and that of Hugging Face's peft.

    adapter.json          what it adds to, the base it was trained on
    adapter.safetensors   one float32 tensor a leaf: layers.0.attention.q.a, layers.0.mlp.gate_up.b

Knows trees of adapters and files; knows no model in memory but what tells one base from another.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gptoss_jax import lora as low_rank
from gptoss_jax import sharding
from gptoss_jax.adapters import peft
from gptoss_jax.adapters.form import Adapter, size_up
from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.hf_names import put_leaf
from gptoss_jax.kernels.cpu import CompactMatrix, CpuExperts
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import Params
from gptoss_jax.mxfp4 import MxTensor, unpack

CONFIG, TENSORS = "adapter.json", "adapter.safetensors"
FORMAT, VERSION = "gptoss_jax adapter", 1
# Probed parts of each layer: enough to tell a fine-tuned or merged model from its base.
_PROBES = (
    ("attention", "norm"),
    ("attention", "q"),
    ("attention", "o"),
    ("mlp", "norm"),
    ("mlp", "gate_up"),
    ("mlp", "down"),
)


def save(
    folder: str | os.PathLike[str],
    tree: Params,
    lora: LoraConfig,
    config: GptOssConfig,
    *,
    fingerprint: str = "",
    source: str = "",
) -> None:
    """Saves an adapter in our form; the folder appears whole or not at all, what is there is
    replaced.

    Args:
      folder: Where.
      tree: Arrays, which this process can read whole; saved as float32.
      lora: What they add to.
      config: The base's.
      fingerprint: Of the base (`fingerprint`), to be compared when it is loaded.
      source: Where the base came from.
    """
    folder = Path(folder)
    leaves = {
        ".".join(map(str, (*path, part))): np.asarray(pair[part], np.float32)
        for path, pair in low_rank.pairs_of(tree)
        for part in ("a", "b")
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "lora": dataclasses.asdict(lora),
        "base": {"source": source, "fingerprint": fingerprint},
        "config": size_up(config),
    }
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries = [(name, array.dtype, array.shape) for name, array in leaves.items()]
    safetensors_file.write(partial / TENSORS, entries, iter(leaves.values()))
    (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    if folder.exists():
        replaced = folder.with_name(folder.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)


def load(
    folder: str | os.PathLike[str], config: GptOssConfig, *, fingerprint: str | None = None
) -> Adapter:
    """Loads an adapter: our form, a run's folder that holds one, or peft's.

    Args:
      folder: Local folder.
      config: The base's.
      fingerprint: The base's; compared with the adapter's where both are known.

    Returns:
      The adapter, its arrays numpy float32.

    Raises:
      GptOssError: There is none, it is damaged, or it belongs to another base; the message says
        which.
    """
    folder = locate(folder)
    if (folder / peft.CONFIG).exists():
        adapter = peft.load(folder, config)
    else:
        adapter = _load(folder, config)
    if fingerprint and adapter.fingerprint and adapter.fingerprint != fingerprint:
        came = f" ({adapter.source})" if adapter.source else ""
        raise GptOssError(
            f"{folder}: the adapter was trained on another base{came}, of fingerprint "
            f"{adapter.fingerprint}; this model's is {fingerprint}: load it on its own base"
        )
    return adapter


def locate(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds an adapter: itself, or its "adapter" (a run's folder).

    Raises:
      GptOssError: Neither does.
    """
    folder = Path(folder).expanduser()
    for place in (folder, folder / "adapter"):
        if (place / CONFIG).exists() or (place / peft.CONFIG).exists():
            return place
    state = "no such folder" if not folder.is_dir() else f"no {CONFIG} and no {peft.CONFIG}"
    raise GptOssError(
        f"{folder}: {state}: expected an adapter, ours or peft's, or the folder of a run"
    )


def base_of(folder: str | os.PathLike[str]) -> tuple[str, GptOssConfig | None]:
    """What an adapter says of its base, which need not be there: its source ("" for nothing), and a
    config of its sizes, for `load` (None for peft's form, which has none).

    Raises:
      GptOssError: There is no adapter, or its description is damaged.
    """
    folder = locate(folder)
    if (folder / peft.CONFIG).exists():
        return peft.source_of(folder), None
    content = _read(folder)
    sizes = content["config"]
    chosen = min(GptOssConfig.experts_per_token, sizes["num_experts"])
    return content["base"]["source"], GptOssConfig(**sizes, experts_per_token=chosen)


def _read(folder: Path) -> dict[str, Any]:
    """adapter.json, of a version that this program reads."""
    try:
        content = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise GptOssError(f"{folder / CONFIG}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise GptOssError(f"{folder / CONFIG}: not the description of a {FORMAT}")
    if content.get("version") != VERSION:
        raise GptOssError(
            f"{folder / CONFIG}: version {content.get('version')!r}, this program reads {VERSION}: "
            "upgrade gptoss_jax"
        )
    return content


def _load(folder: Path, config: GptOssConfig) -> Adapter:
    content = _read(folder)
    ours = size_up(config)
    for name, theirs in content["config"].items():
        if ours.get(name) != theirs:
            base = content["base"]["source"] or "another model"
            raise GptOssError(
                f"{folder}: the adapter is for {base}, whose {name} is {theirs}; this model's is "
                f"{ours.get(name)}: load it on its own base"
            )
    raw = content["lora"]
    unknown = sorted(set(raw) - {field.name for field in dataclasses.fields(LoraConfig)})
    if unknown:
        raise GptOssError(f"{folder / CONFIG}: unknown LoRA settings {unknown}: upgrade gptoss_jax")
    layers = raw.get("layers")
    targets, layers = tuple(raw["targets"]), None if layers is None else tuple(layers)
    lora = LoraConfig(**{**raw, "targets": targets, "layers": layers})
    tensors = safetensors_file.read_header(folder / TENSORS)
    tree: Params = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(low_rank.shapes(config, lora))[0]:
        path = tuple(key.key for key in keys)
        name = ".".join(map(str, path))
        tensor = tensors.pop(name, None)
        if tensor is None:
            raise GptOssError(f"{folder / TENSORS}: tensor {name} is missing: it is damaged")
        if tensor.shape != leaf.shape or tensor.dtype != "F32":
            raise GptOssError(
                f"{folder / TENSORS}: tensor {name} is {tensor.dtype} {tensor.shape}, {CONFIG} "
                f"asks for F32 {leaf.shape}"
            )
        put_leaf(tree, path, tensor.read())
    if tensors:
        raise GptOssError(f"{folder / TENSORS}: tensor {min(tensors)} is none of {CONFIG}'s")
    base = content["base"]
    return Adapter(tree, lora, base["source"], base["fingerprint"])


def fingerprint(config: GptOssConfig, params: Params) -> str:
    """Sixteen hexadecimal digits that tell a base from others, whatever it is held in.

    Of a row of q, o, gate_up and down of every layer and of the norms, rounded to bfloat16. Called
    under the mesh that the parameters are spread over.
    """

    @jax.jit
    def probe(layers):
        found = []
        for layer in layers:
            for room, name in _PROBES:
                value = layer[room][name]
                if isinstance(value, CompactMatrix | CpuExperts):
                    value = value.head()
                while value.ndim > 1:
                    value = value[0]
                value = value.dequantize() if isinstance(value, MxTensor) else value
                found.append(value.astype(jnp.bfloat16))
        return sharding.replicate(found)

    rows = probe([params["layers"][i] for i in range(config.num_layers)])
    return _digest(config, [np.asarray(row) for row in rows])


def fingerprint_of(opened: Any) -> str:
    """`fingerprint` of a checkpoint on disk, from what `checkpoint.open_checkpoint` gives."""
    arrays = {leaf.path: leaf for leaf in opened.leaves}

    def first(path) -> np.ndarray:
        leaf = arrays[path]
        kept = 2 if path[-1] == "blocks" else 1
        index = [slice(0, 1)] * (len(leaf.shape) - kept) + [slice(None)] * kept
        return opened.read(leaf, tuple(index)).reshape(leaf.shape[-kept:])

    rows = []
    for number in range(opened.config.num_layers):
        for room, name in _PROBES:
            path = ("layers", number, room, name)
            if (*path, "blocks") in arrays:
                row = unpack(first((*path, "blocks")), first((*path, "scales")))
            else:
                row = first(path)
            rows.append(row.astype(ml_dtypes.bfloat16))
    return _digest(opened.config, rows)


def _digest(config: GptOssConfig, rows: list[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(size_up(config)).encode())
    for row in rows:
        digest.update(np.ascontiguousarray(row).view(np.uint16).tobytes())
    return digest.hexdigest()[:16]
