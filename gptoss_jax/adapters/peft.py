"""Hugging Face peft's layout of an adapter: adapter_config.json and adapter_model.safetensors.

Of a linear layer lora_A is [r, in] and lora_B [out, r]. Of experts, lora_A is [E r, in], the expert
slowest, and lora_B is [out, r E], the expert FASTEST; nothing but the values tells a wrong order.
With both expert weights adapted, "experts.base_layer" is gate_up_proj and "experts" is
down_proj; with one of them, "experts" is that one, and only `target_parameters` says which. Knows
names and layouts; runs without torch and without peft.

Source: peft 0.21.2 tuners/lora/layer.py ParamWrapper; tuners_utils.py _inject_parameters.
"""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax import dims, hf_names
from gptoss_jax import lora as low_rank
from gptoss_jax.adapters.form import Adapter
from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.checkpoint.stored import new_folder
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import AXES, EXPERTS, LoraConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT, SOURCE = "gptoss_jax_base", "gptoss_jax_source"
WRITTEN_AS = "0.19.1"  # the first version that reads and writes experts as all after it
_TRANSPOSING = "0.19.0"
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])"
    r"(?:\.default)?(?:\.weight)?"
)
_UNSLOTH = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<name>gate_up|down)_projs\.(?P<e>\d+)")
_COPY = re.compile(r"base_model\.model\.(?:lm_head|model\.embed_tokens)\.base_layer\.weight")
# What changes the result and is not part of this adapter's arithmetic.
_REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "fan_in_fan_out",
    "lora_bias": "biases",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron layers",
}


def export(
    folder: str | Path,
    adapter: Adapter,
    config: GptOssConfig,
    *,
    dtype: Any = np.float32,
    overwrite: bool = False,
) -> Path:
    """Writes an adapter as peft does, for transformers, vLLM and others; one rank and one alpha for
    all: smaller ranks are padded with zeros, rsLoRA's scale becomes alpha / r.

    Args:
      folder: Where; must not exist.
      adapter: The adapter.
      config: Its base's.
      dtype: Of the tensors.
      overwrite: Replace an adapter that is there.

    Returns:
      The folder.

    Raises:
      GptOssError: The folder exists, or the disk is full.
    """
    tree, scale = adapter.tree, adapter.lora.scale
    pairs = sorted(low_rank.pairs_of(tree), key=lambda item: list(AXES).index(item[0][-1]))
    pairs = dict(pairs)
    rank = max(pair["b"].shape[-1] for pair in pairs.values())
    names = modules(config)
    tensors: dict[str, np.ndarray] = {}
    target_modules, target_parameters = [], []
    for path, pair in pairs.items():
        name = path[-1]
        module = names[path]
        both = all((*path[:-1], other) in pairs for other in EXPERTS)
        a, b = to_peft(name, np.asarray(pair["a"]), np.asarray(pair["b"]), rank)
        if name in EXPERTS:
            target_parameters.append(module)
            module = module.rpartition(".")[0] + (
                ".base_layer" if both and name == "gate_up" else ""
            )
        else:
            target_modules.append(module)
        kind = "embedding_" if name == "embedding" else ""
        end = "" if kind else ".weight"
        tensors[f"{PREFIX}{module}.lora_{kind}A{end}"] = a.astype(dtype)
        tensors[f"{PREFIX}{module}.lora_{kind}B{end}"] = b.astype(dtype)
    alpha = scale * rank
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.source or None,
        "revision": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _short(target_modules, config),
        "target_parameters": _short(target_parameters, config) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "peft_version": WRITTEN_AS,
    }
    entries = [(name, array.dtype, array.shape) for name, array in sorted(tensors.items())]
    needed = sum(array.nbytes for array in tensors.values())
    known = {FINGERPRINT: adapter.fingerprint, SOURCE: adapter.source}
    known = {key: value for key, value in known.items() if value}
    folder = Path(folder).expanduser()
    if overwrite and (folder / CONFIG).exists():
        shutil.rmtree(folder)
    with new_folder(folder, needed=needed) as partial:
        arrays = (array for _, array in sorted(tensors.items()))
        safetensors_file.write(partial / TENSORS, entries, arrays, known)
        (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return folder


def modules(config: GptOssConfig) -> dict[tuple, str]:
    """Hugging Face's module, or for experts parameter, of every weight that can be adapted."""
    return {
        leaf.path: leaf.tensor.removesuffix(".weight")
        for leaf in hf_names.leaves(config, "bfloat16")
        if leaf.path[-1] in AXES
    }


def to_peft(name: str, a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """lora_A and lora_B of a weight, padded with zeros to a rank.

    Args:
      name: Of AXES.
      a, b: In our axes.
      rank: At least theirs.
    """
    missing = rank - b.shape[-1]
    axis = AXES[name][0].index("R")
    a = np.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])
    b = np.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, missing)])
    if name not in EXPERTS:
        return a.reshape(rank, -1), b.reshape(-1, rank)
    E = len(a)
    outputs_first = b.reshape(E, -1, rank).transpose(1, 2, 0)  # [out, r, E]: the expert fastest
    return a.reshape(E * rank, -1), outputs_first.reshape(-1, rank * E)


def from_peft(
    name: str, a: np.ndarray, b: np.ndarray, config: GptOssConfig
) -> tuple[np.ndarray, np.ndarray]:
    """a and b in our axes: the inverse of `to_peft`; shapes have been checked."""
    letters_a, letters_b = AXES[name]
    known = dims.sizes(config)
    E = known["E"] if name in EXPERTS else 1
    rank = len(a) // E
    known["R"] = rank
    if name in EXPERTS:
        b = b.reshape(-1, rank, E).transpose(2, 0, 1)
    shape_a, shape_b = ([known[letter] for letter in word] for word in (letters_a, letters_b))
    return np.ascontiguousarray(a.reshape(shape_a)), np.ascontiguousarray(b.reshape(shape_b))


def _short(targets: list[str], config: GptOssConfig) -> list[str]:
    """Targets by their last names where all layers have them, else one for each layer."""
    kinds: dict[str, list[str]] = {}
    for target in targets:
        found = re.fullmatch(r"model\.layers\.\d+\.(.+)", target)
        kind = found[1].removeprefix("self_attn.") if found else target.rpartition(".")[2]
        kinds.setdefault(kind, []).append(target)
    short = []
    for kind, members in kinds.items():
        whole = len(members) == config.num_layers or not members[0].startswith("model.layers.")
        short += [kind] if whole else [member.removeprefix("model.") for member in members]
    return short


def load(folder: Path, config: GptOssConfig) -> Adapter:
    """Reads a peft adapter: peft's own keys, Unsloth's of single experts, and what `export` writes.

    Args:
      folder: With adapter_config.json and adapter_model.safetensors.
      config: The base's.

    Raises:
      GptOssError: It is of another kind than LoRA, has keys that are no weight of gpt-oss or
        shapes of another model, or experts that peft 0.19.0 may have written transposed.
    """
    raw = _read_config(folder)
    tensors = safetensors_file.read_header(folder / TENSORS)
    found = _sorted(folder, tensors, raw, config)
    base_rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    power = 0.5 if raw.get("use_rslora") else 1.0
    scale = alpha / base_rank**power
    _check_version(folder, raw, found, config)
    parts: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
    for path, (module, pair) in found.items():
        a, b = (_matrix(folder, module, pair, part, config) for part in "AB")
        rank = _check(folder, module, path, a, b, config)
        wanted = _pattern(raw.get("rank_pattern"), module, base_rank)
        if rank != wanted:
            raise GptOssError(
                f"{folder}: {module} has rank {rank}, {CONFIG} says {wanted}: the two do not "
                "belong together"
            )
        own = _pattern(raw.get("alpha_pattern"), module, alpha) / rank**power
        parts[path] = from_peft(path[-1], a, b * np.float32(own / scale), config)
    groups: dict[bool, int] = {}
    for path, (_, b) in parts.items():
        groups[path[-1] in EXPERTS] = max(groups.get(path[-1] in EXPERTS, 0), b.shape[-1])
    rank, expert_rank = groups.get(False) or groups[True], groups.get(True)
    tree: dict = {}
    for path, (a, b) in parts.items():
        missing = groups[path[-1] in EXPERTS] - b.shape[-1]
        axis = AXES[path[-1]][0].index("R")
        a = np.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])
        b = np.pad(b, [(0, 0)] * (b.ndim - 1) + [(0, missing)])
        hf_names.put_leaf(tree, path, {"a": a, "b": b})
    layers = tuple(sorted({path[1] for path in parts if path[0] == "layers"}))
    lora = LoraConfig(
        rank=rank,
        alpha=alpha if power != 1 and rank == base_rank else scale * rank,
        targets=tuple(name for name in AXES if any(path[-1] == name for path in parts)),
        layers=None if not layers or len(layers) == config.num_layers else layers,
        expert_rank=expert_rank if expert_rank != rank else None,
        rslora=power != 1 and rank == base_rank,
    )
    known = safetensors_file.read_metadata(folder / TENSORS)
    return Adapter(tree, lora, source_of(folder), known.get(FINGERPRINT, ""))


def source_of(folder: Path) -> str:
    """Where an adapter says that its base came from; "" if it says nothing."""
    raw = _read_config(folder)
    known = safetensors_file.read_metadata(folder / TENSORS)
    return known.get(SOURCE) or str(raw.get("base_model_name_or_path") or "")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise GptOssError(f"{folder / CONFIG}: not JSON ({error})") from error
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise GptOssError(f"{folder / CONFIG}: an adapter of type {kind!r}: only LoRA is supported")
    for name, what in _REFUSED.items():
        if raw.get(name):
            raise GptOssError(f"{folder / CONFIG}: {name} is set: {what} is not supported")
    if raw.get("bias", "none") != "none":
        raise GptOssError(f"{folder / CONFIG}: bias is {raw['bias']!r}: only 'none' is supported")
    if not (folder / TENSORS).exists():
        raise GptOssError(f"{folder}: no {TENSORS}: download it again, or save it as safetensors")
    return raw


def _sorted(folder, tensors, raw, config) -> dict[tuple, tuple[str, Any]]:
    """Path of a weight -> (module, {"A": tensor, "B": tensor}); keys ("A", expert) of Unsloth's."""
    names = {module: path for path, module in modules(config).items()}
    experts = {
        module.rpartition(".")[0] for path, module in modules(config).items() if path[-1] in EXPERTS
    }
    wrapped = {
        key.partition(".base_layer.lora_")[0] for key in tensors if ".base_layer.lora_" in key
    }
    targeted = _targeted(raw)
    found: dict[tuple, tuple[str, Any]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = match["module"] if match else key
        if module.startswith("layers."):
            module = f"model.{module}"
        single = _UNSLOTH.fullmatch(module)
        inner = module.removesuffix(".base_layer")
        path: tuple | None = None
        part: Any = match and match["part"]
        if single:
            path = names.get(f"{single['experts']}.{single['name']}_proj")
            module, part = f"{single['experts']}.{single['name']}_proj", (part, int(single["e"]))
        elif inner in experts:
            outer = module == inner
            both = any(stem.endswith(inner) for stem in wrapped)
            which = "down" if outer and both else "gate_up" if both else targeted
            if which is None:
                raise GptOssError(
                    f"{folder}: {key}: {CONFIG} has no target_parameters that say whether it adds "
                    "to gate_up_proj or down_proj"
                )
            module = f"{inner}.{which}_proj"
            path = names[module]
        elif _COPY.fullmatch(key) and tensor.shape == (config.vocab_size, config.hidden_size):
            continue  # peft saves the base's own weight beside a LoRA of it
        elif match and bool(match["embedding"]) == (module == "model.embed_tokens"):
            path = names.get(module)
        if match is None or path is None:
            raise GptOssError(_unknown(folder, key, config))
        found.setdefault(path, (module, {}))[1][part] = tensor
    if not found:
        raise GptOssError(f"{folder / TENSORS}: no tensors: the adapter is empty")
    return found


def _unknown(folder: Path, key: str, config: GptOssConfig) -> str:
    layer = re.search(r"layers\.(\d+)\.", key)
    if layer and int(layer[1]) >= config.num_layers:
        return (
            f"{folder}: key {key!r} is of layer {layer[1]}, this model's are 0 to "
            f"{config.num_layers - 1}: the adapter belongs to another base"
        )
    return (
        f"{folder}: key {key!r} is no LoRA of a weight of gpt-oss (q_proj, k_proj, v_proj, o_proj, "
        "mlp.experts, embed_tokens, lm_head): nothing was loaded"
    )


def _targeted(raw: dict[str, Any]) -> str | None:
    """The only expert weight that target_parameters name, if there is one."""
    ends = {target.rpartition(".")[2] for target in raw.get("target_parameters") or ()}
    named = [name for name in EXPERTS if f"{name}_proj" in ends]
    return named[0] if len(named) == 1 else None


def _matrix(folder: Path, module: str, pair: dict, part: str, config) -> np.ndarray:
    """lora_A or lora_B in peft's fused layout, float32."""
    if part in pair:
        return pair[part].read().astype(np.float32)
    each = {key[1]: tensor for key, tensor in pair.items() if key[0] == part}
    lacking = sorted(set(range(config.num_experts)) - set(each))
    if not each or lacking:
        whose = f" of experts {lacking}" if each else ""
        raise GptOssError(f"{folder / TENSORS}: lora_{part} of {module}{whose} is missing")
    arrays = [each[e].read().astype(np.float32) for e in sorted(each)]
    if len({array.shape for array in arrays}) > 1:
        raise GptOssError(f"{folder / TENSORS}: lora_{part} of {module} differs between experts")
    if part == "A":
        return np.concatenate(arrays)
    return np.stack(arrays, axis=-1).reshape(len(arrays[0]), -1)  # [out, r, E]


def _check(folder, module, path, a, b, config) -> int:
    """Rank of a pair whose shapes fit the model.

    Raises:
      GptOssError: They do not.
    """
    known = dims.sizes(config)
    name = path[-1]
    letters_a, letters_b = (word.replace("R", "").replace("E", "") for word in AXES[name])
    E = known["E"] if name in EXPERTS else 1
    inputs = math.prod(known[letter] for letter in letters_a)
    outputs = math.prod(known[letter] for letter in letters_b)
    fits = (
        a.shape[1] == inputs and b.shape[0] == outputs and len(a) == b.shape[1] and not len(a) % E
    )
    if not fits:
        times = f"{E} r" if E > 1 else "r"
        raise GptOssError(
            f"{folder}: {module}: lora_A {a.shape} and lora_B {b.shape} do not fit this model, "
            f"which takes ({times}, {inputs}) and ({outputs}, {times}): the adapter belongs to "
            "another base, or was written transposed (peft 0.19.0)"
        )
    return len(a) // E


def _check_version(folder, raw, found, config) -> None:
    """Refuses experts that peft 0.19.0 may have written with inputs and outputs exchanged.

    gate_up_proj is never square and tells; down_proj of gpt-oss is.
    """
    version = str(raw.get("peft_version") or "")
    if not version.startswith(_TRANSPOSING):
        return
    for path, (_, pair) in found.items():
        if path[-1] == "gate_up" and "A" in pair and pair["A"].shape[1] == config.hidden_size:
            return
        if path[-1] == "down" and config.hidden_size != config.intermediate_size:
            return  # the shape tells
    if any(path[-1] in EXPERTS for path in found):
        raise GptOssError(
            f"{folder}: written by peft {version}, which exchanged inputs and outputs of expert "
            "weights (0.19.1 does not), and the shapes do not tell: merge it in the environment "
            "that wrote it, or train it again with another version"
        )


def _pattern(patterns: dict | None, module: str, default):
    """Value of the pattern that matches a module, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default
