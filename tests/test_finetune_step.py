"""One update: rates and AdamW against closed forms, sums over micro-batches, packing, what is
skipped.
"""

import dataclasses
import math
import subprocess
import sys

import finetuning
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gptoss_jax import lora
from gptoss_jax.errors import GptOssError
from gptoss_jax.train.objective import objective
from gptoss_jax.train.optimizer import rate, transform
from gptoss_jax.train.settings import OptimizerSettings, Settings
from gptoss_jax.train.step import make_step, merge, new_state
from gptoss_jax.train.trainable import split

CONFIG, LORA = finetuning.CONFIG, finetuning.LORA


def adapter(seed=1):
    """One whose b is not zero, so that every a has a gradient."""
    tree = lora.init(CONFIG, LORA, jax.random.key(seed))
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x if x.any() else jnp.asarray(0.05 * generator.normal(size=x.shape), jnp.float32),
        tree,
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rates_are_those_of_the_closed_forms(schedule):
    settings = OptimizerSettings(
        learning_rate=3e-3, schedule=schedule, warmup=0.2, final_share=0.25
    )
    found = [float(rate(settings, 21)(i)) for i in range(21)]
    np.testing.assert_allclose(found[:4], [3e-3 * (i + 1) / 5 for i in range(4)], rtol=1e-6)
    for i in range(4, 21):
        part = (i - 4) / 16
        share = {
            "cosine": 0.25 + 0.75 * (1 + math.cos(math.pi * part)) / 2,
            "linear": 1 - 0.75 * part,
            "constant": 1.0,
        }[schedule]
        assert found[i] == pytest.approx(3e-3 * share, rel=1e-5)
    assert float(rate(dataclasses.replace(settings, warmup=3), 21)(0)) == pytest.approx(3e-3 / 4)


def test_adamw_is_the_papers():
    """Three updates in numpy: clipping, moments with bias correction, decay of matrices alone."""
    settings = OptimizerSettings(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip=0.5)
    generator = np.random.default_rng(0)
    tree = {"q": {"a": generator.normal(size=(3, 4))}, "q_bias": generator.normal(size=5)}
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    rule = transform(settings)
    state = rule.init(tree)
    want = {
        name: np.asarray(x, np.float64)
        for name, x in (("a", tree["q"]["a"]), ("b", tree["q_bias"]))
    }
    m, v = ({name: np.zeros_like(x) for name, x in want.items()} for _ in range(2))
    for t in range(1, 4):
        g = {name: generator.normal(size=x.shape) for name, x in want.items()}
        moves, state = rule.update(
            {
                "q": {"a": jnp.asarray(g["a"], jnp.float32)},
                "q_bias": jnp.asarray(g["b"], jnp.float32),
            },
            state,
            tree,
        )
        tree = jax.tree.map(lambda x, move: x - 0.1 * move, tree, moves)
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        for name in want:
            clipped = g[name] * min(1, 0.5 / norm)
            m[name] = 0.8 * m[name] + 0.2 * clipped
            v[name] = 0.9 * v[name] + 0.1 * clipped**2
            move = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.9**t)) + 1e-3)
            want[name] = want[name] - 0.1 * (move + (0.1 * want[name] if name == "a" else 0))
    np.testing.assert_allclose(tree["q"]["a"], want["a"], rtol=1e-5)
    np.testing.assert_allclose(tree["q_bias"], want["b"], rtol=1e-5)


@pytest.fixture(scope="module")
def step():
    """Updates of 3 micro-batches of one row, and of one micro-batch of 3 rows."""
    settings = finetuning.settings(router_loss=0.0)
    return settings, jax.jit(
        make_step(CONFIG, settings, 6, jnp.float32), compiler_options=tiny.QUICK
    )


def test_three_micro_batches_are_one_batch_and_a_bad_update_changes_nothing(step):
    settings, update = step
    params = tiny.params(CONFIG)
    rows = finetuning.batch(3, 24)
    sums = rows["weights"].sum(1)
    assert len(set(sums.tolist())) == 3  # a mean of means would differ
    start = new_state(adapter(), settings)
    parts = {name: x[:, None] for name, x in rows.items()}
    once, all_at_once = update(start, params, {name: x[None] for name, x in rows.items()})
    thrice, in_parts = update(start, params, parts)
    for name, value in all_at_once.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=1e-4, err_msg=name)
    # moments are the gradients but for a factor; Adam itself would hide a wrong scale
    a, b = (jax.tree.leaves(state["optimizer"]) for state in (thrice, once))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * float(jnp.abs(y).max()))
    assert int(once["step"]) == 1

    bad = {**parts, "weights": parts["weights"] * np.float32(np.nan)}
    twice = thrice
    for count in (1, 2):
        twice, metrics = update(twice, params, bad)
        finetuning.assert_same_bits(twice["trained"], thrice["trained"])
        finetuning.assert_same_bits(twice["optimizer"], thrice["optimizer"])
        assert (int(metrics["skipped"]), int(metrics["in_a_row"])) == (count, count)
        assert int(twice["step"]) == 1 + count
    after, metrics = update(twice, params, parts)
    assert (int(metrics["skipped"]), int(metrics["in_a_row"])) == (2, 0)
    assert finetuning.largest_difference(after["trained"], thrice["trained"]) > 0


def test_expert_load_counts_tokens_that_are_there(step):
    """Shares of each layer's experts, from a forward pass of its own; padding does not count."""
    from gptoss_jax import model

    settings, update = step
    params, rows = tiny.params(CONFIG), finetuning.batch(3, 24)
    tree = adapter()
    _, metrics = update(new_state(tree, settings), params, {n: x[None] for n, x in rows.items()})

    @jax.jit
    def chosen(params, tree):
        known = jnp.asarray(rows["segments"])
        added, tokens = lora.additions(tree, LORA), jnp.asarray(rows["tokens"])
        return model.hidden(params, tokens, config=CONFIG, segments=known, added=added)[2]

    experts = chosen(params, tree)
    experts, known = np.asarray(experts), rows["segments"] > 0
    counts = np.array(
        [np.bincount(experts[known][:, layer].ravel(), minlength=12) for layer in range(2)]
    )
    shares = counts / counts.sum(1, keepdims=True)
    assert float(metrics["load_max"]) == pytest.approx(12 * shares.max(), rel=1e-5)
    assert float(metrics["load_min"]) == pytest.approx(12 * shares.min(), abs=1e-6)
    assert int(metrics["dead_experts"]) == (counts == 0).sum()
    logs = np.where(shares > 0, np.log(np.maximum(shares, 1e-30)), 0)
    assert float(metrics["load_entropy"]) == pytest.approx(
        (-shares * logs).sum(1).mean() / math.log(12), rel=1e-5
    )
    assert int(metrics["tokens"]) == known.sum()
    assert int(metrics["supervised"]) == (rows["weights"] > 0).sum()


def test_packed_samples_learn_as_if_each_were_alone():
    """Loss and gradient of a row of three samples, against the sum over three rows of one."""
    generator = np.random.default_rng(4)
    lengths = [13, 9, 18]
    width = sum(lengths) + 3
    alone = {
        "tokens": np.zeros((3, 24), np.int32),
        "segments": np.zeros((3, 24), np.int32),
        "weights": np.zeros((3, 24), np.float32),
    }
    packed = {name: np.zeros((1, width), x.dtype) for name, x in alone.items()}
    at = 0
    for i, n in enumerate(lengths):
        tokens = generator.integers(0, CONFIG.vocab_size, n)
        weights = generator.choice([0.0, 0.5, 1.0], n)
        weights[0] = 0
        for target, row, start, segment in ((alone, i, 0, 1), (packed, 0, at, i + 1)):
            target["tokens"][row, start : start + n] = tokens
            target["weights"][row, start : start + n] = weights
            target["segments"][row, start : start + n] = segment
        at += n
    params = tiny.params(CONFIG)

    def loss(tree, batch):
        return objective(tree, params, batch, config=CONFIG, lora=LORA, remat=False)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=tiny.QUICK)
    (one, sums), gradient = run(adapter(), packed)
    (want, their), expected = run(adapter(), alone)
    assert float(one) == pytest.approx(float(want), rel=1e-5)
    assert float(sums["weight"]) == float(their["weight"]) == packed["weights"].sum()
    assert finetuning.largest_difference(gradient, expected) < 2e-4


def test_frozen_patterns_divide_the_parameters():
    params = tiny.params(CONFIG, packed=False)
    trained, frozen = split(params, ("router*", "sinks", "norm"))
    assert "router" not in trained["layers"][0]["mlp"]
    assert set(frozen["layers"][1]["mlp"]) == {"router", "router_bias", "norm"}
    assert set(frozen["layers"][1]["attention"]) == {"sinks", "norm"}
    finetuning.assert_same_bits(merge(frozen, trained), params)
    with pytest.raises(
        GptOssError,
        match=r"frozen 'gate' matches nothing: use names and patterns of down, down_bias",
    ):
        split(params, ("gate",))
    with pytest.raises(GptOssError, match="all parameters are frozen"):
        split(params, ("*",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0: expected a whole number of 1 or more"),
        ({"accumulate": True}, "accumulate is True"),
        ({"eval_share": 1.0}, "eval_share is 1.0: expected 0 to below 1"),
        ({"log": ("tensorbord",)}, "log 'tensorbord': use tensorboard, wandb, trackio"),
        ({"frozen": ("sinks",)}, "frozen is for full fine-tuning"),
        ({"result": "first"}, "result 'first': use last or best"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(GptOssError, match=message):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0: expected a positive number"),
        ({"schedule": "step"}, "schedule 'step': use cosine, linear or constant"),
        ({"b2": 1.0}, "b2 is 1.0: expected 0 to below 1"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(GptOssError, match=message):
        OptimizerSettings(**wrong)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(GptOssError, match="warmup takes 10 of 10 steps"):
        rate(OptimizerSettings(warmup=10), 10)


MEMORY = """
import ctypes, resource, sys
from gptoss_jax.train.memory import keep_freed
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
kept = keep_freed() if sys.argv[1] == "kept" else None
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(100 << 20)
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, pages)
"""


def test_freed_memory_is_kept():
    """Blocks as large as a step's temporary memory come back as the same pages."""
    found = {}
    for way in ("kept", "given back"):
        run = [sys.executable, "-c", MEMORY, way]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        found[way] = text.split()
    if found["kept"][0] == "False":
        pytest.skip("not glibc")
    # large pages may make them few, but never none
    assert int(found["kept"][1]) < 10 < int(found["given back"][1])
