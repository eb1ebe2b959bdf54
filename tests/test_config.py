"""Every spelling of config.json, and every refusal with its key and value."""

import dataclasses
import math

import pytest
import tiny

from gptoss_jax import dims
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.ops.rope import frequencies

ORIGINAL = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128, "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
}  # fmt: skip


def released():
    """The released 20b config.json, as far as the model reads it."""
    return GptOssConfig.preset("gpt-oss-20b").to_hf()


def test_presets():
    small, large = (
        GptOssConfig.preset("openai/gpt-oss-20b"),
        GptOssConfig.preset("gpt-oss-safeguard-120b"),
    )
    assert (small.num_layers, small.num_experts, large.num_layers, large.num_experts) == (
        24,
        32,
        36,
        128,
    )
    assert small.layer_types[:3] == ("sliding_attention", "full_attention", "sliding_attention")
    with pytest.raises(
        GptOssError, match="no preset 'gpt-oss-7b': use one of gpt-oss-20b, gpt-oss-120b"
    ):
        GptOssConfig.preset("gpt-oss-7b")


def test_the_three_spellings_and_the_original_agree():
    expected = GptOssConfig.preset("gpt-oss-20b")
    first = released()
    inside, outside = dict(first), dict(first)
    rope = first["rope_scaling"]
    del inside["rope_scaling"], inside["rope_theta"], outside["rope_scaling"]
    inside["rope_parameters"] = {**rope, "rope_theta": 150000}
    outside["rope_parameters"] = rope
    for raw in (first, inside, outside, ORIGINAL):
        found = GptOssConfig.from_hf(raw)
        assert dataclasses.replace(found, eos_token_ids=expected.eos_token_ids) == expected
    assert GptOssConfig.from_hf(first).eos_token_ids == (200002,)
    assert GptOssConfig.from_hf({**first, "eos_token_id": [200002, 199999]}).eos_token_ids == (
        200002,
        199999,
    )


def test_plain_rope():
    config = dataclasses.replace(
        tiny.CONFIG, rope_factor=1.0, original_context=tiny.CONFIG.max_context
    )
    assert GptOssConfig.from_hf(config.to_hf()).rope_factor == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": True}, "config key 'tie_word_embeddings' has the value True: supported is False"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "config key 'rope_scaling.rope_type' has the value 'llama3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8}}, "config key 'rope_scaling.truncate' has the value True"),
        ({"layer_types": ["linear_attention"] * 24}, "config key 'layer_types' has the value 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "supported is a list of num_hidden_layers = 24 entries"),
        ({"hidden_size": 2890}, "config key 'hidden_size' has the value 2890: supported is a multiple of 32"),
        ({"intermediate_size": 2885}, "config key 'intermediate_size' has the value 2885: supported is a multiple of 32"),
        ({"num_key_value_heads": 7}, "config key 'num_key_value_heads' has the value 7: supported is a divisor of"),
        ({"num_experts_per_tok": 33}, "config key 'num_experts_per_tok' has the value 33: supported is at most"),
        ({"head_dim": 0}, "config key 'head_dim' has the value 0: supported is a positive integer"),
        ({"head_dim": 63}, "config key 'head_dim' has the value 63: supported is an even number"),
        ({"hidden_act": "gelu"}, "config key 'hidden_act' has the value 'gelu': supported is 'silu'"),
        ({"model_type": "llama"}, "config key 'model_type' has the value 'llama': supported is 'gpt_oss'"),
        ({"attention_bias": False}, "config key 'attention_bias' has the value False: supported is True"),
        ({"attention_dropout": 0.1}, "config key 'attention_dropout' has the value 0.1: supported is 0.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method' has the value 'gptq'"),
        ({"rope_theta": None}, "config key 'rope_theta' has the value None"),
        ({"swiglu_limit": "7"}, "config key 'swiglu_limit' has the value '7': supported is a positive number"),
        ({"sliding_window": None}, "config key 'sliding_window' is missing"),
    ],
)  # fmt: skip
def test_refusals(change, message):
    with pytest.raises(GptOssError) as error:
        GptOssConfig.from_hf({**released(), **change})
    assert message in str(error.value)


def test_test_model_hides_no_transposition():
    sizes = dims.sizes(tiny.CONFIG)
    sizes |= {"W": tiny.CONFIG.sliding_window, "N*H": sizes["N"] * sizes["H"]}
    assert len(set(sizes.values())) == len(sizes), sizes
    assert dims.shape("EFPD", tiny.CONFIG) == (12, 224, 2, 96)


def test_yarn_frequencies_against_the_released_values():
    """Golden values of spec.md a.4, computed there in float64."""
    inverse, concentration = frequencies(64, 150000.0, 32.0, 32.0, 1.0, 4096)
    golden = {0: 1.0, 1: 0.689044306, 8: 0.0508132748, 9: 0.0317056962, 12: 0.00679495949, 17: 0.000129318701,
              18: 3.83088124e-05, 31: 3.02351143e-07}  # fmt: skip
    for index, value in golden.items():
        assert inverse[index] == pytest.approx(value, rel=1e-6), index
    assert concentration == 0.1 * math.log(32) + 1
    plain, one = frequencies(64, 150000.0, 1.0, 32.0, 1.0, 4096)
    assert one == 1.0
    assert plain[31] == pytest.approx(150000 ** (-62 / 64), rel=1e-6)
