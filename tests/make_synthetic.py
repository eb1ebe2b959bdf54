"""Writes a random checkpoint with the real names, of any size up to the full one, to measure.

    python tests/make_synthetic.py /tmp/20b                      # 13.8 GB, as fast as the disk
    writes python tests/make_synthetic.py /tmp/bf16 --layout bfloat16 --layers 2

Values come from one random buffer, repeated: statistics are plausible, and it costs no time.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from gptoss_jax import hf_names
from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.config import GptOssConfig

BUFFER = 1 << 25
SHARD = 4_800_000_000


def write(
    folder: Path, config: GptOssConfig, layout: hf_names.Layout = "mxfp4", seed: int = 0
) -> int:
    """Writes config.json, shards of at most 4.8 GB and their index.

    Args:
      folder: Made if it is not there.
      config: Sizes.
      layout: "mxfp4", "bfloat16" or "original".
      seed: Seed of the random buffer.

    Returns:
      Bytes of tensors written.
    """
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(BUFFER, np.float32) * 0.05).astype(ml_dtypes.bfloat16)
    blocks = rng.integers(0, 256, BUFFER, np.uint8)
    scales = rng.integers(117, 122, BUFFER, np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    tensors = hf_names.tensors(config, layout)
    sizes = {
        name: int(np.prod(shape)) * (1 if packed else 2)
        for name, (shape, packed) in tensors.items()
    }
    for name in tensors:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > SHARD:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number:05d}-of-{len(shards) - 1:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        entries = [
            (name, np.dtype(np.uint8) if tensors[name][1] else values.dtype, tensors[name][0])
            for name in names
        ]

        def pieces(names=names):
            for name in names:
                shape, packed = tensors[name]
                source = values if not packed else scales if name.endswith("scales") else blocks
                left = int(np.prod(shape))
                while left:
                    yield source[: min(left, BUFFER)]
                    left -= min(left, BUFFER)

        safetensors_file.write(folder / file, entries, pieces())
    total = sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_config(config, layout), indent=2))
    return total


def _config(config: GptOssConfig, layout: hf_names.Layout) -> dict:
    if layout != "original":
        return config.to_hf()
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.original_context,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.rope_factor,
        "rope_ntk_alpha": config.rope_beta_slow,
        "rope_ntk_beta": config.rope_beta_fast,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", default="mxfp4", choices=("mxfp4", "bfloat16", "original"))
    parser.add_argument("--preset", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset")
    arguments = parser.parse_args()
    preset = GptOssConfig.preset(arguments.preset)
    if arguments.layers:
        preset = dataclasses.replace(preset, num_layers=arguments.layers, layer_types=())
    print(f"{write(arguments.folder, preset, arguments.layout):,} bytes in {arguments.folder}")
