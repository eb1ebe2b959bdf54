"""The test model: every letter of another size, so that a transposition cannot hide."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import mxfp4
from gptoss_jax.config import GptOssConfig
from gptoss_jax.engine import Model
from gptoss_jax.model import init_params
from gptoss_jax.tokenizer import KEPT_FILE, kept_ids, load_tokenizer, write_kept

CONFIG = GptOssConfig(
    num_layers=4,
    hidden_size=96,
    intermediate_size=224,
    num_heads=15,
    num_kv_heads=3,
    head_dim=14,
    num_experts=12,
    experts_per_token=4,
    vocab_size=331,
    sliding_window=8,
    original_context=64,
    rope_factor=8.0,
    max_context=512,
    eos_token_ids=(330,),
    pad_token_id=329,
)
# One layer of each kind, where more would only compile longer.
SMALL = dataclasses.replace(CONFIG, num_layers=2, layer_types=CONFIG.layer_types[:2])
QUICK = {"xla_backend_optimization_level": "0"}  # compiles in half the time


@functools.lru_cache
def params(config: GptOssConfig = CONFIG, packed: bool = True, seed: int = 0):
    """Random float32 parameters with biases, sinks and scales that matter; experts packed or
    plain.
    """
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        scale = 0.3 if leaf.ndim == 1 or name.endswith("bias") else 0.05
        return jnp.asarray(
            (name == "norm") + scale * generator.normal(size=leaf.shape), jnp.float32
        )

    tree = jax.tree_util.tree_map_with_path(draw, tree)
    if packed:
        for layer in tree["layers"].values():
            for name in ("gate_up", "down"):
                layer["mlp"][name] = jax.tree.map(
                    jnp.asarray, mxfp4.pack(np.asarray(layer["mlp"][name]))
                )
    return tree


def tokens(batch: int, length: int, seed: int = 1) -> jax.Array:
    """Random ids [batch, length]."""
    return jax.random.randint(
        jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size, jnp.int32
    )


@functools.lru_cache
def tokenizer(size: int = CONFIG.vocab_size):
    """A pruned tokenizer of `size` tokens: 256 bytes, the control tokens, some pairs of letters."""
    with tempfile.TemporaryDirectory() as folder:
        kept = kept_ids([])
        pairs = [i for i in range(256, 1000) if i not in kept][: size - len(kept)]
        write_kept(Path(folder) / KEPT_FILE, sorted([*kept, *pairs]))
        return load_tokenizer(folder)


def model(**changes):
    """The test model behind the engine."""
    return dataclasses.replace(Model(CONFIG, params(), tokenizer(), CONFIG.max_context), **changes)
