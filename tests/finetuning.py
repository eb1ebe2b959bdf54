"""A two-layer model, texts and settings for the tests of fine-tuning: small, so that compiling is
quick.
"""

import dataclasses
import random

import jax
import numpy as np
import tiny

from gptoss_jax import checkpoint
from gptoss_jax.engine import Model
from gptoss_jax.lora import LoraConfig
from gptoss_jax.tokenizer import KEPT_FILE, write_kept
from gptoss_jax.train.settings import OptimizerSettings, Settings

CONFIG = tiny.SMALL
LORA = LoraConfig(rank=3, alpha=5.0, expert_rank=2)
SETTINGS = Settings(
    lora=LORA,
    optimizer=OptimizerSettings(learning_rate=1e-2, schedule="constant", warmup=0),
    steps=6,
    batch_size=2,
    accumulate=1,
    length=32,
    remat=False,
    save_every=2,
    eval_every=2,
)


def settings(**changes) -> Settings:
    """SETTINGS with other values; learning_rate is the optimizer's."""
    rate = changes.pop("learning_rate", None)
    if rate is not None:
        changes["optimizer"] = dataclasses.replace(SETTINGS.optimizer, learning_rate=rate)
    return dataclasses.replace(SETTINGS, **changes)


def model(**changes) -> Model:
    """The model behind the engine, experts packed."""
    found = Model(CONFIG, tiny.params(CONFIG), tiny.tokenizer(), CONFIG.max_context)
    return dataclasses.replace(found, **changes)


def texts(count: int = 12, seed: int = 0) -> list[dict[str, str]]:
    """Rows of plain text, 5 to 20 letters."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnop"
    return [
        {"text": "".join(generator.choice(letters) for _ in range(generator.randint(5, 20)))}
        for _ in range(count)
    ]


def batch(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows of two segments and padding; some weights are 0, some are not 1."""
    generator = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        first, second = np.sort(generator.choice(np.arange(6, length), 2, replace=False))
        row[:first], row[first:second] = 1, 2
    starts = np.diff(segments, axis=1, prepend=0) != 0
    weights = generator.choice([0.0, 0.5, 1.0], segments.shape, p=[0.5, 0.2, 0.3])
    return {
        "tokens": generator.integers(0, CONFIG.vocab_size, segments.shape).astype(np.int32),
        "segments": segments,
        "weights": np.where((segments > 0) & ~starts, weights, 0).astype(np.float32),
    }


def save(folder, config=CONFIG) -> None:
    """The model as a checkpoint, for commands."""
    checkpoint.save_params(folder, config, tiny.params(config))
    write_kept(folder / KEPT_FILE, tiny.tokenizer().kept)


def assert_same_bits(a, b) -> None:
    """Two trees hold the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def largest_difference(a, b) -> float:
    """Largest difference of two trees, relative to each leaf's largest value."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        worst = max(worst, float(np.abs(x - y).max() / max(1e-12, np.abs(y).max())))
    return worst
