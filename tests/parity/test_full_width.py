"""A pair of layers at the width of gpt-oss-20b: hidden 2880, 64 / 8 heads, 32 experts, vocabulary
201088.

Slow (3 minutes, 10 GB of memory, 3.2 GB of disk): `pytest --slow -rP
tests/parity/test_full_width.py`.
"""

import shutil

import numpy as np
import pytest

pytest.importorskip("torch", reason="the references need torch: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="a reference is transformers: pip install -e '.[parity]'"
)

import jax.numpy as jnp
import random_checkpoints
import references
from test_logits import check, openai  # noqa: F401 (openai: a fixture)

from gptoss_jax.cache import make_cache
from gptoss_jax.checkpoint import load_params
from gptoss_jax.model import forward

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def test_a_full_width_pair_of_layers(tmp_path):
    case = random_checkpoints.FULL_WIDTH
    tokens = random_checkpoints.prompts(case)
    theirs = references.streamed_logits(case, random_checkpoints.tensors(case), tokens)
    folder = random_checkpoints.write(tmp_path / "checkpoint", case, "mxfp4")
    try:
        config, params = load_params(folder, dtype="float32")
    finally:
        shutil.rmtree(folder)  # pytest would keep three runs of it
    split = case.window + 8  # the ring has wrapped when the rest is decoded
    prefill, _ = forward(params, jnp.asarray(tokens), config=config)
    cache = make_cache(config, 1, case.tokens, jnp.float32)
    logits, cache = forward(params, jnp.asarray(tokens[:, :split]), cache, config=config)
    found = [np.asarray(logits)]
    for t in range(split, case.tokens):
        logits, cache = forward(params, jnp.asarray(tokens[:, t : t + 1]), cache, config=config)
        found.append(np.asarray(logits))
    check("full width, prefill", np.asarray(prefill), *theirs)
    check("full width, prefill and decode", np.concatenate(found, axis=1), *theirs)
