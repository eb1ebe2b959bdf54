"""Writes a gpt-oss GGUF with random weights in the real format and sizes: MXFP4 experts, bfloat16
matrices, no vocabulary. For llama.cpp to be timed on.

    python -m gptoss_jax.bench.gguf_file OUT.gguf --model gpt-oss-20b --layers 4      4.2 GB

Needs the package gguf.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.bench.weights import config_of, fill
from gptoss_jax.config import GptOssConfig
from gptoss_jax.mxfp4 import BLOCK, BYTES


def write(target: Path, config: GptOssConfig, seed: int = 0) -> None:
    """Writes the file; it appears whole or not at all.

    Args:
      target: Replaced if it is there.
      config: Sizes.
      seed: Same seed, same file.
    """
    import gguf

    kinds = gguf.GGMLQuantizationType
    generator = np.random.SFC64(seed)
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, "gpt-oss")
    _facts(writer, config, gguf)

    def matrix(name: str, *shape: int) -> None:
        values = np.empty(shape, np.uint16)
        fill(values.view(_bfloat16()), name, generator)
        rows = values.view(np.uint8)
        writer.add_tensor(name, rows, raw_shape=rows.shape, raw_dtype=kinds.BF16)

    def vector(name: str, *shape: int, one: bool = False) -> None:
        values = np.empty(shape, np.float32)
        fill(values, "norm" if one else name, generator)
        writer.add_tensor(name, values)

    def experts(name: str, rows: int, columns: int) -> None:
        packed = np.empty((config.num_experts, rows, columns // BLOCK, 1 + BYTES), np.uint8)
        fill(packed, name, generator)
        packed[..., 0] = 118 + (packed[..., 0] & 3)
        shape = (config.num_experts, rows, columns // BLOCK * (1 + BYTES))
        writer.add_tensor(name, packed.reshape(shape), raw_dtype=kinds.MXFP4)

    D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
    q, kv = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    matrix("token_embd.weight", config.vocab_size, D)
    matrix("output.weight", config.vocab_size, D)
    vector("output_norm.weight", D, one=True)
    for layer in range(config.num_layers):
        at = f"blk.{layer}."
        vector(f"{at}attn_norm.weight", D, one=True)
        vector(f"{at}post_attention_norm.weight", D, one=True)
        for name, out, into in (("q", q, D), ("k", kv, D), ("v", kv, D), ("output", D, q)):
            matrix(f"{at}attn_{name}.weight", out, into)
            vector(f"{at}attn_{name}.bias", out)
        vector(f"{at}attn_sinks.weight", config.num_heads)
        vector(f"{at}ffn_gate_inp.weight", E, D)
        vector(f"{at}ffn_gate_inp.bias", E)
        for name, out, into in (("gate", F, D), ("up", F, D), ("down", D, F)):
            experts(f"{at}ffn_{name}_exps.weight", out, into)
            vector(f"{at}ffn_{name}_exps.bias", E, out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


def _facts(writer: Any, config: GptOssConfig, gguf: Any) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(config.original_context)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.experts_per_token)
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int)
    given = parser.parse_args()
    given.target.parent.mkdir(parents=True, exist_ok=True)
    write(given.target, config_of(given.model, given.layers)[0])
