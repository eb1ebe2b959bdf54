"""The facts of a gpt-oss model: sizes, rope, window. Reads and writes every spelling of
config.json.

Knows no mesh, no dtype, no kernel choice, no temperature, and touches no files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gptoss_jax.errors import GptOssError

SLIDING, FULL = "sliding_attention", "full_attention"
MXFP4_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class GptOssConfig:
    """Architecture of a gpt-oss model; hashable, so that it can be a static argument of jax.jit.

    Attributes:
      num_layers: Transformer blocks.
      hidden_size: Width of the residual stream (D).
      intermediate_size: Width inside an expert (F).
      num_heads: Query heads (N).
      num_kv_heads: Key and value heads (K); divides num_heads.
      head_dim: Size of a head (H); N * H need not be D.
      num_experts: Experts a layer (E).
      experts_per_token: Experts chosen for a token (X).
      vocab_size: Rows of the embedding (V); ids are 0 .. V - 1.
      sliding_window: Keys that a query of a sliding layer sees, itself included.
      layer_types: "sliding_attention" or "full_attention", one a layer; layer 0 is sliding in the
        released models.
      rope_theta: Base of the rotary frequencies.
      rope_factor: YaRN's extension factor; 1 means plain rotary embedding.
      rope_beta_fast: Rotations above which YaRN keeps a frequency.
      rope_beta_slow: Rotations below which YaRN divides a frequency by the factor.
      original_context: Context of the model before YaRN, in tokens.
      max_context: Longest context, in tokens.
      swiglu_limit: Clamp of the experts' activations.
      swiglu_alpha: Slope of the sigmoid in SwiGLU.
      rms_norm_eps: Added to the mean square in RMSNorm.
      eos_token_ids: Ids that end a generation.
      pad_token_id: Id used for padding; must not be an eos that gets a loss.

    Source: openai/gpt-oss gpt_oss/torch/model.py ModelConfig; the released config.json files.
    """

    num_layers: int = 36
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 64
    num_experts: int = 128
    experts_per_token: int = 4
    vocab_size: int = 201088
    sliding_window: int = 128
    layer_types: tuple[str, ...] = ()
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    original_context: int = 4096
    max_context: int = 131072
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    rms_norm_eps: float = 1e-5
    eos_token_ids: tuple[int, ...] = (200002, 199999, 200012)
    pad_token_id: int = 199999

    def __post_init__(self):
        if not self.layer_types:
            kinds = tuple(FULL if i % 2 else SLIDING for i in range(self.num_layers))
            object.__setattr__(self, "layer_types", kinds)
        _check(self)

    @classmethod
    def preset(cls, name: str) -> "GptOssConfig":
        """Config of a released model: gpt-oss-20b, gpt-oss-120b, or their safeguard twins.

        Raises:
          GptOssError: The name is not a preset.
        """
        short = name.removeprefix("openai/").replace("gpt-oss-safeguard-", "gpt-oss-")
        presets = {"gpt-oss-20b": {"num_layers": 24, "num_experts": 32}, "gpt-oss-120b": {}}
        if short not in presets:
            raise GptOssError(
                f"no preset {name!r}: use one of {', '.join(presets)} or a checkpoint's folder"
            )
        return cls(**presets[short])

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "GptOssConfig":
        """Config from a parsed config.json, Hugging Face's (three spellings of rope) or OpenAI's
        original.

        Args:
          raw: The parsed JSON object.

        Returns:
          The config.

        Raises:
          GptOssError: A key is missing, or asks for what the model does not do; the message names
            the key and value.
        """
        if (
            "num_local_experts" not in raw
            and "num_experts" in raw
            and "initial_context_length" in raw
        ):
            return cls(**_from_original(raw))
        return cls(**_from_transformers(raw))

    def to_hf(self) -> dict[str, Any]:
        """Hugging Face config.json of this model, without quantization_config (the exporter adds it
        for MXFP4).

        rope settings are written in the spelling that transformers 4 and 5 and vLLM all read.
        """
        rope = {
            "rope_type": "yarn",
            "factor": self.rope_factor,
            "beta_fast": self.rope_beta_fast,
            "beta_slow": self.rope_beta_slow,
            "original_max_position_embeddings": self.original_context,
            "truncate": False,
        }
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "experts_per_token": self.experts_per_token,
            "vocab_size": self.vocab_size,
            "sliding_window": self.sliding_window,
            "layer_types": list(self.layer_types),
            "rope_theta": self.rope_theta,
            # without settings transformers 5 takes YaRN with factor 32
            "rope_scaling": rope if self.rope_factor > 1 else {"rope_type": "default"},
            "max_position_embeddings": self.max_context,
            "initial_context_length": self.original_context,
            "swiglu_limit": self.swiglu_limit,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "router_aux_loss_coef": 0.9,
            "output_router_logits": False,
            "use_cache": True,
            "eos_token_id": self.eos_token_ids[0],
            "pad_token_id": self.pad_token_id,
            "torch_dtype": "bfloat16",
        }


def _refuse(key: str, value: object, supported: str) -> None:
    raise GptOssError(f"config key {key!r} has the value {value!r}: supported is {supported}")


def _get(raw: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    raise GptOssError(
        f"config key {names[0]!r} is missing: is this the config.json of a gpt-oss model?"
    )


def _integer(raw: Mapping[str, Any], *names: str) -> int:
    value = _get(raw, *names)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        _refuse(names[0], value, "a positive integer")
    return value


def _number(value: Any, key: str) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        _refuse(key, value, "a positive number")
    return float(value)


def _from_transformers(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("model_type") not in (None, "gpt_oss"):
        _refuse("model_type", raw["model_type"], "'gpt_oss'")
    for key, wanted in (
        ("tie_word_embeddings", False),
        ("attention_bias", True),
        ("hidden_act", "silu"),
    ):
        if raw.get(key, wanted) not in (wanted, None):
            _refuse(key, raw[key], repr(wanted))
    if raw.get("attention_dropout"):
        _refuse("attention_dropout", raw["attention_dropout"], "0.0")
    quantization = raw.get("quantization_config")
    if quantization and quantization.get("quant_method") != "mxfp4":
        _refuse(
            "quantization_config.quant_method",
            quantization.get("quant_method"),
            "'mxfp4', or no quantization",
        )
    eos = raw.get("eos_token_id")
    defaults = GptOssConfig.__dataclass_fields__
    eos_ids = (eos,) if isinstance(eos, int) else tuple(eos or defaults["eos_token_ids"].default)
    max_context = _integer(raw, "max_position_embeddings")
    return {
        "num_layers": _integer(raw, "num_hidden_layers"),
        "hidden_size": _integer(raw, "hidden_size"),
        "intermediate_size": _integer(raw, "intermediate_size"),
        "num_heads": _integer(raw, "num_attention_heads"),
        "num_kv_heads": _integer(raw, "num_key_value_heads"),
        "head_dim": _integer(raw, "head_dim"),
        "num_experts": _integer(raw, "num_local_experts"),
        "experts_per_token": _integer(raw, "num_experts_per_tok", "experts_per_token"),
        "vocab_size": _integer(raw, "vocab_size"),
        "sliding_window": _integer(raw, "sliding_window"),
        "layer_types": tuple(raw.get("layer_types") or ()),
        "max_context": max_context,
        "swiglu_limit": _number(raw.get("swiglu_limit", 7.0), "swiglu_limit"),
        "swiglu_alpha": _number(raw.get("swiglu_alpha", 1.702), "swiglu_alpha"),
        "rms_norm_eps": _number(raw.get("rms_norm_eps", 1e-5), "rms_norm_eps"),
        "eos_token_ids": eos_ids,
        "pad_token_id": raw.get("pad_token_id") if raw.get("pad_token_id") is not None else 199999,
        **_rope(raw, max_context),
    }


def _rope(raw: Mapping[str, Any], max_context: int) -> dict[str, Any]:
    """Rope settings from `rope_scaling` + `rope_theta`, or `rope_parameters` with or without
    `rope_theta` inside.
    """
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(key) or {}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        _refuse("rope_theta", None, "a positive number, beside or inside rope_parameters")
    if not rope:  # plain rotary embedding to transformers 4, YaRN by 32 to transformers 5
        _refuse(key, None, "YaRN's settings, or {'rope_type': 'default'}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    found: dict[str, Any] = {"rope_theta": _number(theta, "rope_theta")}
    if kind == "default":
        return {**found, "rope_factor": 1.0, "original_context": max_context}
    if kind != "yarn":
        _refuse(f"{key}.rope_type", kind, "'yarn' or 'default'")
    if rope.get("truncate", True):
        _refuse(
            f"{key}.truncate",
            rope.get("truncate", True),
            "false (gpt-oss does not round YaRN's bounds)",
        )
    for extra in ("mscale", "mscale_all_dim", "attention_factor"):
        if rope.get(extra) is not None:
            _refuse(f"{key}.{extra}", rope[extra], "no such key")
    original = rope.get("original_max_position_embeddings") or raw.get("initial_context_length")
    if original is None:
        _refuse(f"{key}.original_max_position_embeddings", None, "a positive integer")
    return {
        **found,
        "rope_factor": _number(rope.get("factor"), f"{key}.factor"),
        "rope_beta_fast": _number(rope.get("beta_fast", 32.0), f"{key}.beta_fast"),
        "rope_beta_slow": _number(rope.get("beta_slow", 1.0), f"{key}.beta_slow"),
        "original_context": int(_number(original, f"{key}.original_max_position_embeddings")),
    }


def _from_original(raw: Mapping[str, Any]) -> dict[str, Any]:
    original = _integer(raw, "initial_context_length")
    factor = _number(raw.get("rope_scaling_factor", 1.0), "rope_scaling_factor")
    return {
        "num_layers": _integer(raw, "num_hidden_layers"),
        "hidden_size": _integer(raw, "hidden_size"),
        "intermediate_size": _integer(raw, "intermediate_size"),
        "num_heads": _integer(raw, "num_attention_heads"),
        "num_kv_heads": _integer(raw, "num_key_value_heads"),
        "head_dim": _integer(raw, "head_dim"),
        "num_experts": _integer(raw, "num_experts"),
        "experts_per_token": _integer(raw, "experts_per_token"),
        "vocab_size": _integer(raw, "vocab_size"),
        "sliding_window": _integer(raw, "sliding_window"),
        "rope_theta": _number(_get(raw, "rope_theta"), "rope_theta"),
        "rope_factor": factor,
        "rope_beta_fast": _number(raw.get("rope_ntk_beta", 32.0), "rope_ntk_beta"),
        "rope_beta_slow": _number(raw.get("rope_ntk_alpha", 1.0), "rope_ntk_alpha"),
        "original_context": original,
        "max_context": round(original * factor),
        "swiglu_limit": _number(raw.get("swiglu_limit", 7.0), "swiglu_limit"),
    }


def _check(config: GptOssConfig) -> None:
    """Refuses what the model cannot do; names are those of Hugging Face's config.json."""
    for key, value in (
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
    ):
        if value % MXFP4_BLOCK:
            _refuse(key, value, f"a multiple of {MXFP4_BLOCK}, the MXFP4 block")
    if config.num_heads % config.num_kv_heads:
        _refuse(
            "num_key_value_heads",
            config.num_kv_heads,
            f"a divisor of num_attention_heads = {config.num_heads}",
        )
    if config.head_dim % 2:
        _refuse("head_dim", config.head_dim, "an even number (rotary embedding)")
    if config.experts_per_token > config.num_experts:
        _refuse(
            "num_experts_per_tok",
            config.experts_per_token,
            f"at most num_local_experts = {config.num_experts}",
        )
    if len(config.layer_types) != config.num_layers:
        _refuse(
            "layer_types",
            config.layer_types,
            f"a list of num_hidden_layers = {config.num_layers} entries",
        )
    for kind in config.layer_types:
        if kind not in (SLIDING, FULL):
            _refuse("layer_types", kind, f"{SLIDING!r} or {FULL!r}")
