"""transformers reads what we write: the config in every setting, and the model in the box."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the references need torch: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="a reference is transformers: pip install -e '.[parity]'"
)

import jax.numpy as jnp
import random_checkpoints
import references
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

import gptoss_jax
from gptoss_jax.checkpoint import load_params
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import forward
from gptoss_jax.ops.rope import frequencies

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TINY = Path(gptoss_jax.__file__).parent / "assets" / "gpt-oss-tiny"


@pytest.mark.parametrize("case", random_checkpoints.CASES, ids=lambda case: case.name)
def test_the_config_means_the_same(case):
    ours = GptOssConfig.from_hf(random_checkpoints.hf_config(case))
    theirs = transformers.GptOssConfig(**ours.to_hf())
    embedding = GptOssRotaryEmbedding(theirs)
    inverse, concentration = frequencies(
        ours.head_dim,
        ours.rope_theta,
        ours.rope_factor,
        ours.rope_beta_fast,
        ours.rope_beta_slow,
        ours.original_context,
    )
    np.testing.assert_allclose(embedding.inv_freq.numpy(), inverse, rtol=5e-7)
    assert embedding.attention_scaling == concentration
    assert GptOssConfig.from_hf(theirs.to_dict()) == ours
    for name, value in random_checkpoints.hf_config(case).items():
        if name not in ("rope_parameters", "torch_dtype"):
            assert getattr(theirs, name) == value, name


def test_transformers_loads_the_model_in_the_box():
    """gpt-oss-tiny as it lies in the package, MXFP4 and all, gives transformers our logits."""
    if not (TINY / "config.json").exists():
        pytest.skip("gpt-oss-tiny is not in this checkout: make it with gptoss_jax.train.tiny")
    config, params = load_params(TINY, dtype="float32")
    rng = np.random.RandomState(0)
    tokens = rng.randint(0, config.vocab_size, (2, 3 * config.sliding_window)).astype(np.int32)
    model = references.transformers_model(TINY)
    theirs = references.transformers_logits(model, tokens)
    apart = references.distance(references.transformers_decode(model, tokens), theirs)
    ours = np.asarray(forward(params, jnp.asarray(tokens), config=config)[0])
    found = references.distance(ours, theirs)
    print(f"PARITY gpt-oss-tiny: transformers from its own decoding {apart:.1e}, ours {found:.1e}")
    assert found <= min(3 * apart, 5e-4)
