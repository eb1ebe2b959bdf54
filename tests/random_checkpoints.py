"""Random gpt-oss checkpoints in the three published layouts, the same bits on every machine.

Written from the published tensor names and shapes alone, on purpose without the package's name
table, codec or config: it is what they are compared with. Values are integers of 8 bits times a
power of two, so that they are exact in bfloat16 and no platform's libm takes part.

Source: openai/gpt-oss gpt_oss/torch/weights.py; transformers convert_gpt_oss_weights_to_hf.py.
"""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

BF16 = ml_dtypes.bfloat16
LAYOUTS = ("mxfp4", "bf16", "original")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E2M1_RMS, INT8_RMS = 2.926, 73.9


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a random model, and of the batch of tokens that it is compared on.

    Attributes:
      name: Short name, used for test ids and golden files.
      seed: Seed of weights and tokens.
      tokens: Length of a sequence; longer than twice the window.
      factor: YaRN's factor; 1 is plain rotary embedding.
      beta_fast: YaRN's bound (rope_ntk_beta in the original config); the slow bound is 1.
    """

    name: str
    seed: int
    layers: int = 2
    hidden: int = 64
    intermediate: int = 96
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 12
    experts: int = 5
    experts_per_token: int = 2
    vocab: int = 97
    window: int = 8
    theta: int = 150000
    factor: float = 32.0
    beta_fast: float = 32.0
    original_context: int = 4096
    limit: float = 7.0
    batch: int = 2
    tokens: int = 24


# Never D = F, N = H or K = G, so that a transposition cannot hide; between them they vary every
# size and setting.
CASES = (
    Case("released_rope", seed=1),
    Case(
        "plain_rope",
        seed=2,
        layers=3,
        hidden=96,
        intermediate=64,
        heads=8,
        kv_heads=2,
        head_dim=16,
        experts=7,
        experts_per_token=4,
        vocab=131,
        window=5,
        factor=1.0,
        theta=10000,
        tokens=19,
    ),
    Case(
        "short_context",
        seed=3,
        hidden=128,
        intermediate=32,
        heads=4,
        kv_heads=4,
        head_dim=20,
        experts=3,
        experts_per_token=1,
        vocab=83,
        window=11,
        factor=4.0,
        beta_fast=4.0,
        original_context=64,
        tokens=40,
    ),
    Case(
        "wide_experts",
        seed=4,
        hidden=32,
        intermediate=160,
        heads=10,
        kv_heads=2,
        head_dim=8,
        experts=9,
        experts_per_token=3,
        vocab=149,
        window=3,
        factor=8.0,
        theta=500000,
        beta_fast=16.0,
        tokens=17,
        batch=3,
    ),
    Case(
        "one_kv_head",
        seed=5,
        layers=4,
        hidden=160,
        intermediate=64,
        heads=5,
        kv_heads=1,
        head_dim=24,
        experts=6,
        experts_per_token=6,
        vocab=71,
        window=13,
        factor=16.0,
        original_context=2048,
        tokens=33,
        limit=3.5,
    ),
    Case(
        "many_experts",
        seed=6,
        layers=2,
        hidden=64,
        intermediate=128,
        heads=12,
        kv_heads=3,
        head_dim=14,
        experts=32,
        experts_per_token=4,
        vocab=211,
        window=7,
        factor=2.0,
        theta=20000,
        beta_fast=8.0,
        original_context=512,
        tokens=29,
    ),
)

FULL_WIDTH = Case(
    "full_width",
    seed=7,
    hidden=2880,
    intermediate=2880,
    heads=64,
    kv_heads=8,
    head_dim=64,
    experts=32,
    experts_per_token=4,
    vocab=201088,
    window=128,
    batch=1,
    tokens=144,
)


def _bytes(rng: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes; raw output of PCG64 is promised never to change, that of distributions is
    not."""
    size = int(np.prod(shape))
    return rng.random_raw(-(-size // 8)).astype("<u8").view(np.uint8)[:size].reshape(shape)


def _noise(
    rng: np.random.PCG64, shape: tuple[int, ...], rms: float, mean: float = 0.0
) -> np.ndarray:
    """bfloat16 of about the given rms (within a factor sqrt(2)), uniform, exact."""
    step = np.float32(2.0 ** round(float(np.log2(rms / INT8_RMS))))
    integers, values = _bytes(rng, shape).view(np.int8), np.empty(shape, BF16)
    for rows in np.array_split(
        np.arange(shape[0]), max(1, values.size >> 26)
    ):  # a vocabulary takes 2 GB in float32
        part = slice(rows[0], rows[-1] + 1)
        values[part] = integers[part] * step + np.float32(mean)
    return values


def _experts(
    rng: np.random.PCG64, shape: tuple[int, ...], rms: float
) -> tuple[np.ndarray, np.ndarray]:
    """Random MXFP4: blocks uint8 [..., U, 16] and scales uint8 [..., U], three neighbouring
    exponents."""
    *rows, contracted = shape
    blocks = _bytes(rng, (*rows, contracted // 32, 16))
    middle = 127 + round(float(np.log2(rms / E2M1_RMS)))
    return blocks, (middle - 1 + _bytes(rng, (*rows, contracted // 32)) % 3).astype(np.uint8)


def tensors(case: Case):
    """Tensors of a random model, one at a time, under their original names.

    Sizes are such that attention is neither flat nor saturated, the clamp acts on a few per cent of
    the values, and all layers matter in the logits.

    Args:
      case: Sizes and seed.

    Yields:
      (name, numpy array): bfloat16, or uint8 for `.blocks` and `.scales`.
    """
    rng = np.random.PCG64(case.seed)
    d, f, h, e = case.hidden, case.intermediate, case.head_dim, case.experts
    n, k = case.heads, case.kv_heads
    yield "embedding.weight", _noise(rng, (case.vocab, d), 1.0)
    for i in range(case.layers):
        attn, mlp = f"block.{i}.attn.", f"block.{i}.mlp."
        yield attn + "norm.scale", _noise(rng, (d,), 0.25, mean=1.0)
        yield attn + "qkv.weight", _noise(rng, ((n + 2 * k) * h, d), 1.4 / d**0.5)
        yield attn + "qkv.bias", _noise(rng, ((n + 2 * k) * h,), 0.3)
        yield attn + "sinks", _noise(rng, (n,), 2.0)
        yield attn + "out.weight", _noise(rng, (d, n * h), 1.4 / (n * h) ** 0.5)
        yield attn + "out.bias", _noise(rng, (d,), 0.3)
        yield mlp + "norm.scale", _noise(rng, (d,), 0.25, mean=1.0)
        yield mlp + "gate.weight", _noise(rng, (e, d), 1.4 / d**0.5)
        yield mlp + "gate.bias", _noise(rng, (e,), 0.5)
        blocks, scales = _experts(rng, (e, 2 * f, d), 3.0 / d**0.5)
        yield mlp + "mlp1_weight.blocks", blocks
        yield mlp + "mlp1_weight.scales", scales
        yield mlp + "mlp1_bias", _noise(rng, (e, 2 * f), 1.0)
        blocks, scales = _experts(rng, (e, d, f), 0.25 / f**0.5)
        yield mlp + "mlp2_weight.blocks", blocks
        yield mlp + "mlp2_weight.scales", scales
        yield mlp + "mlp2_bias", _noise(rng, (e, d), 0.3)
    yield "norm.scale", _noise(rng, (d,), 0.25, mean=1.0)
    yield "unembedding.weight", _noise(rng, (case.vocab, d), 2.0 / d**0.5)


def prompts(case: Case) -> np.ndarray:
    """Random token ids, int32 [batch, tokens]."""
    rng = np.random.PCG64(1000 + case.seed)
    return (
        (rng.random_raw(case.batch * case.tokens) % case.vocab)
        .astype(np.int32)
        .reshape(case.batch, case.tokens)
    )


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values of MXFP4 bytes, float32 [..., 32 U]: table times power of two, low nibble first."""
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    for value, block, scale in zip(
        values, blocks, scales, strict=True
    ):  # one expert at a time, for memory
        value[..., 0::2], value[..., 1::2] = E2M1[block & 15], E2M1[block >> 4]
        np.ldexp(value, scale.astype(np.int32)[..., None] - 127, out=value)
    return values.reshape(*scales.shape[:-1], -1)


def original_config(case: Case) -> dict:
    """config.json of the original layout (gpt_oss/torch/model.py ModelConfig)."""
    return {
        "num_hidden_layers": case.layers,
        "num_experts": case.experts,
        "experts_per_token": case.experts_per_token,
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "swiglu_limit": case.limit,
        "head_dim": case.head_dim,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "sliding_window": case.window,
        "initial_context_length": case.original_context,
        "rope_theta": case.theta,
        "rope_scaling_factor": case.factor,
        "rope_ntk_alpha": 1.0,
        "rope_ntk_beta": case.beta_fast,
    }


def hf_config(case: Case) -> dict:
    """config.json of the Hugging Face layout; rope as transformers 5 writes it."""
    rope = {"rope_type": "default", "rope_theta": float(case.theta)}
    if case.factor > 1:
        rope |= {
            "rope_type": "yarn",
            "factor": case.factor,
            "beta_fast": case.beta_fast,
            "beta_slow": 1.0,
            "original_max_position_embeddings": case.original_context,
            "truncate": False,
        }
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": case.layers,
        "num_local_experts": case.experts,
        "num_experts_per_tok": case.experts_per_token,
        "experts_per_token": case.experts_per_token,
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "swiglu_limit": case.limit,
        "head_dim": case.head_dim,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "sliding_window": case.window,
        "layer_types": [
            "full_attention" if i % 2 else "sliding_attention" for i in range(case.layers)
        ],
        "max_position_embeddings": round(case.original_context * case.factor),
        "initial_context_length": case.original_context,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": case.vocab - 1,
        "pad_token_id": case.vocab - 2,
        "torch_dtype": "bfloat16",
    }


QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def hf_tensors(case: Case, layout: str):
    """Tensors of the same model under Hugging Face's names: "mxfp4" packed, "bf16" unpacked and
    transposed."""
    names = {"norm.scale": "norm.weight", "unembedding.weight": "lm_head.weight"}
    pending = None
    split = case.heads * case.head_dim, (case.heads + case.kv_heads) * case.head_dim
    for name, value in tensors(case):
        if not name.startswith("block."):
            renamed = {
                "embedding.weight": "model.embed_tokens.weight",
                "norm.scale": "model.norm.weight",
            }
            yield renamed.get(name, names.get(name)), value
            continue
        _, layer, part, rest = name.split(".", 3)
        prefix = f"model.layers.{layer}."
        if rest == "norm.scale":
            yield (
                prefix
                + ("input_layernorm" if part == "attn" else "post_attention_layernorm")
                + ".weight",
                value,
            )
        elif rest.startswith("qkv."):
            for letter, rows in zip("qkv", np.split(value, split), strict=True):
                yield f"{prefix}self_attn.{letter}_proj.{rest[4:]}", np.ascontiguousarray(rows)
        elif rest.startswith("out."):
            yield f"{prefix}self_attn.o_proj.{rest[4:]}", value
        elif rest == "sinks":
            yield prefix + "self_attn.sinks", value
        elif rest.startswith("gate."):
            yield f"{prefix}mlp.router.{rest[5:]}", value
        else:
            matrix, kind = rest.replace("_", ".", 1).split(".", 1)
            expert = f"{prefix}mlp.experts." + {"mlp1": "gate_up_proj", "mlp2": "down_proj"}[matrix]
            if kind == "bias":
                yield expert + "_bias", value
            elif layout == "mxfp4":
                yield f"{expert}_{kind.removeprefix('weight.')}", value
            elif kind == "weight.blocks":
                pending = value
            else:
                dense = dequantize(pending, value).astype(BF16)
                yield expert, np.ascontiguousarray(np.swapaxes(dense, 1, 2))


def write(folder: Path, case: Case, layout: str) -> Path:
    """Writes a checkpoint with its config.json, as one safetensors file.

    Args:
      folder: Created; files in it are replaced.
      case: Sizes and seed.
      layout: "mxfp4", "bf16" (both Hugging Face) or "original".

    Returns:
      The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "original":
        config, found = original_config(case), dict(tensors(case))
    else:
        config, found = hf_config(case), dict(hf_tensors(case, layout))
        if layout == "mxfp4":
            config["quantization_config"] = QUANTIZATION
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
