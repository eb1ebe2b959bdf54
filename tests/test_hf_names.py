"""The table of names against an independent list of the published names."""

import numpy as np
import pytest
import random_checkpoints as rc

from gptoss_jax import hf_names
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError

CASE = rc.CASES[0]
OURS = {"mxfp4": "mxfp4", "bf16": "bfloat16", "original": "original"}


def _config(layout):
    raw = rc.original_config(CASE) if layout == "original" else rc.hf_config(CASE)
    return GptOssConfig.from_hf(raw)


@pytest.mark.parametrize("layout", rc.LAYOUTS)
def test_names_and_shapes_are_the_published_ones(layout):
    found = rc.tensors(CASE) if layout == "original" else rc.hf_tensors(CASE, layout)
    published = {name: (array.shape, array.dtype == np.uint8) for name, array in found}
    assert hf_names.tensors(_config(layout), OURS[layout]) == published
    assert hf_names.detect(published) == OURS[layout]


@pytest.mark.parametrize(("layout", "released"), [("mxfp4", 459), ("original", 363)])
def test_number_of_tensors_of_the_released_20b(layout, released):
    config = GptOssConfig.preset("gpt-oss-20b")
    assert len(hf_names.tensors(config, layout)) == released
    assert len({leaf.path for leaf in hf_names.leaves(config, layout)}) == 459
    size = sum(leaf.size * (1 if leaf.packed else 2) for leaf in hf_names.leaves(config, layout))
    assert size == 13_761_264_768  # the released model.safetensors.index.json's total_size


def test_every_parameter_once_with_its_own_part():
    for layout in OURS.values():
        parts: dict[str, int] = {}
        for leaf in hf_names.leaves(_config("mxfp4"), layout):
            assert leaf.row == parts.get(leaf.tensor, 0)
            parts[leaf.tensor] = leaf.row + leaf.to_file(np.empty(leaf.shape, np.uint8)).shape[0]
        assert parts == {
            name: shape[0]
            for name, (shape, _) in hf_names.tensors(_config("mxfp4"), layout).items()
        }


def test_meaning_of_axes():
    """Heads, pairs and transpositions, element by element, in the words of the published shapes."""
    config = _config("mxfp4")
    by_name = {leaf.name: leaf for leaf in hf_names.leaves(config, "bfloat16")}
    d, f, h, e = CASE.hidden, CASE.intermediate, CASE.head_dim, CASE.experts
    leaf = by_name["layers.1.mlp.gate_up"]
    stored = np.arange(e * d * 2 * f).reshape(e, d, 2 * f)
    ours = leaf.from_file(stored.reshape(leaf.stored_shape))
    assert ours.shape == leaf.shape == (e, f, 2, d)
    assert ours[3, 5, 0, 7] == stored[3, 7, 10]
    assert ours[3, 5, 1, 7] == stored[3, 7, 11]
    np.testing.assert_array_equal(leaf.to_file(ours), stored)
    leaf = by_name["layers.0.mlp.down"]
    stored = np.arange(e * f * d).reshape(e, f, d)
    ours = leaf.from_file(stored)
    assert ours[2, 9, 4] == stored[2, 4, 9]
    np.testing.assert_array_equal(leaf.to_file(ours), stored)
    leaf = by_name["layers.0.attention.o"]
    stored = np.arange(d * CASE.heads * h).reshape(d, CASE.heads * h)
    assert leaf.from_file(stored.reshape(leaf.stored_shape))[8, 2, 3] == stored[8, 2 * h + 3]


def test_fused_rows_are_q_then_k_then_v():
    leaves = {leaf.name: leaf for leaf in hf_names.leaves(_config("original"), "original")}
    n, k, h = CASE.heads, CASE.kv_heads, CASE.head_dim
    rows = [
        leaves[f"layers.0.attention.{name}"].row
        for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias")
    ]
    assert rows == [0, n * h, (n + k) * h] * 2


def test_unknown_names_and_layouts_are_refused():
    with pytest.raises(GptOssError) as error:
        hf_names.detect(["model.layers.0.mlp.gate_proj.weight", "lm_head.weight"])
    assert str(error.value) == (
        "2 tensors, for example 'lm_head.weight', none of them experts of gpt-oss: expected the "
        "names of Hugging Face's "
        "layout (model.layers.0.mlp.experts.gate_up_proj…) or of OpenAI's original layout "
        "(block.0.mlp.mlp1_weight…)"
    )
    with pytest.raises(
        GptOssError, match="no checkpoint layout 'gguf': use one of 'mxfp4', 'bfloat16', 'original'"
    ):
        hf_names.leaves(_config("mxfp4"), "gguf")
