"""The recipe of gpt-oss-tiny: trains it from nothing and writes the checkpoint folder, at most an
hour on two cores.

    python -m gptoss_jax.train.tiny --out DIR [--steps N --seed S]

The network is the package's own; experts are rounded to MXFP4 in every step (straight-through), so
that the packed model is the trained one. Knows data and optimizer; knows nothing of serving.
"""

import argparse
import dataclasses
import functools
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from optax import contrib

from gptoss_jax import hf_names, mxfp4
from gptoss_jax import model as network
from gptoss_jax.cache import KVCache, make_cache
from gptoss_jax.checkpoint import safetensors_file
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import HARMONY_SPECIALS, KEPT_FILE, load_tokenizer, write_kept
from gptoss_jax.train import tiny_data

BALANCE = 0.02  # how fast a router's bias follows the load of its experts


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a run.

    Attributes:
      steps: Optimizer steps of the first stage, on the wider conversations; both stages took 33
        minutes on two cores that other programs shared.
      polish: Steps of the second stage, on the conversations that the model is meant for.
      seed: Of parameters and data.
      learning_rate: Muon's peak, after the warm-up and until the last `decay` share of the steps.
      adam_rate: Adam's peak.
      polish_share: Of both rates in the second stage, which warms up and falls at once.
      warmup: Steps of linear warm-up.
      decay: Share of the first stage's steps with a falling rate.
      weight_decay: Of the matrices.
    """

    steps: int = 1300
    polish: int = 240
    seed: int = 0
    learning_rate: float = 1e-2
    adam_rate: float = 3e-3
    polish_share: float = 0.25
    warmup: int = 50
    decay: float = 0.4
    weight_decay: float = 0.02


def tiny_config(kept: list[int]) -> GptOssConfig:
    """The shape of gpt-oss-tiny: what the big models hide (equal sizes, wide windows, idle clamps)
    differs here."""
    row = {token: i for i, token in enumerate(kept)}
    names = ("<|return|>", "<|endoftext|>", "<|call|>")
    return GptOssConfig(
        num_layers=4,
        hidden_size=128,
        intermediate_size=96,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        vocab_size=len(kept),
        sliding_window=32,
        rope_theta=10000.0,
        rope_factor=8.0,
        original_context=1024,
        max_context=8192,
        swiglu_limit=3.0,
        eos_token_ids=tuple(row[HARMONY_SPECIALS[name]] for name in names),
        pad_token_id=row[HARMONY_SPECIALS["<|endoftext|>"]],
    )


def init(config: GptOssConfig, seed: int) -> network.Params:
    """Random parameters, scaled by fan-in; outputs into the residual stream are smaller the deeper
    the network."""
    params = network.init_params(config, jax.random.key(seed))
    deep = (2 * config.num_layers) ** -0.5

    def scaled(path, x):
        name = path[-1].key
        if "bias" in name or name == "norm":
            return x
        if name == "sinks":
            return x
        fan_in = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}.get(
            name, config.hidden_size
        )
        factor = 0.3 if name == "embedding" else fan_in**-0.5
        return x * (factor * (deep if name in ("o", "down") else 1.0) / 0.02)

    params = jax.tree_util.tree_map_with_path(scaled, params)
    # A head that attends to a word makes it likelier from the first step on, whatever the word (a
    # tool's name, say): outputs start as the values' transposes, the unembedding as the embedding.
    # What is left to learn is where to look.
    params["unembedding"] = params["embedding"] * (0.5 * config.hidden_size**-0.5 / 0.3)
    last = params["layers"][config.num_layers - 1]["attention"]
    v_NHD = jnp.repeat(last["v"], config.num_heads // config.num_kv_heads, axis=0)
    last["o"] = 0.3 * v_NHD.transpose(2, 0, 1)
    return params


def fake_mxfp4(x: jax.Array) -> jax.Array:
    """Nearest MXFP4 value, straight-through; each block takes the scale that puts its largest value
    in [4, 8) or the next one.
    """
    return mxfp4.nearest(x, (0, 1))


def quantized(params: network.Params) -> network.Params:
    """Parameters with the experts' weights rounded to MXFP4."""
    layers = {
        i: {
            **layer,
            "mlp": {
                **layer["mlp"],
                **{n: fake_mxfp4(layer["mlp"][n]) for n in ("gate_up", "down")},
            },
        }
        for i, layer in params["layers"].items()
    }
    return {**params, "layers": layers}


def batch_loss(params: network.Params, batch: dict[str, jax.Array], config: GptOssConfig):
    """Summed cross-entropy of the learnt tokens, and the load of every expert.

    Returns:
      float32 scalar, and float32 [layers, E] that sums to 1 over the experts.
    """
    prefix, rows = batch["prefix"], batch["rows"]
    branches, length = rows.shape[0] // prefix.shape[0], rows.shape[1] - 1
    cache: Any = make_cache(config, prefix.shape[0], prefix.shape[1] + length, jnp.float32)
    _, cache, _ = network.hidden(params, prefix, cache, config=config, mask=batch["prefix_mask"])
    cache = KVCache(
        *jax.tree.map(
            lambda x: jnp.repeat(x, branches, axis=0), (cache.keys, cache.values, cache.length_B)
        )
    )
    x_BTD, _, experts_BTLX = network.hidden(params, rows[:, :-1], cache, config=config)
    x_LD = x_BTD.reshape(-1, x_BTD.shape[-1])[batch["learnt"]]
    targets = rows[:, 1:].reshape(-1)[batch["learnt"]]
    logits = network.unembed(params, x_LD)
    losses = (
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    )
    chosen = jax.nn.one_hot(experts_BTLX, config.num_experts, dtype=jnp.float32).mean((0, 1, 3))
    return (losses * batch["weight"]).sum(), chosen


def optimizer(recipe: Recipe, polish: bool = False) -> optax.GradientTransformation:
    """Muon for the matrices, Adam for the rest, with clipping; the rates of a stage warm up, stay,
    and fall to 1 %.

    Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982 (one rate for both).
    """
    steps = recipe.polish if polish else recipe.steps
    warmup = min(recipe.warmup, steps // 10)
    falling = steps - warmup if polish else int(recipe.decay * steps)

    def rate(peak):
        peak = peak * recipe.polish_share if polish else peak
        parts = [
            optax.linear_schedule(0.0, peak, max(1, warmup)),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, max(1, falling), alpha=0.01),
        ]
        return optax.join_schedules(parts, [warmup, steps - falling])

    muon = contrib.muon(
        rate(recipe.learning_rate),
        adam_learning_rate=rate(recipe.adam_rate),
        weight_decay=recipe.weight_decay,
        adam_b2=0.98,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=cast(Any, _matrices),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _matrices(params: network.Params):
    """(inputs, outputs) of every matrix as axes; None for embeddings, router, norms, biases and
    sinks."""
    axes = {
        "q": (2, (0, 1)),
        "k": (2, (0, 1)),
        "v": (2, (0, 1)),
        "o": ((1, 2), 0),
        "gate_up": (3, (1, 2)),
        "down": (2, 1),
    }

    def of(path, _):
        found = axes.get(path[-1].key)
        return None if found is None else contrib.MuonDimensionNumbers(*found)

    return jax.tree_util.tree_map_with_path(of, params)


def make_step(config: GptOssConfig, transform: optax.GradientTransformation):
    """The jitted training step: (params, optimizer state, batches) -> the same two, mean loss,
    loads [layers, E]."""

    def total(params, step):
        rounded = quantized(params)
        sums, loads = zip(*(batch_loss(rounded, batch, config) for batch in step), strict=True)
        count = sum(batch["weight"].sum() for batch in step)
        return sum(sums) / count, sum(loads) / len(loads)

    def one(params: Any, state, step):
        (loss, loads), gradient = jax.value_and_grad(total, has_aux=True)(params, step)
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        for i, layer in params["layers"].items():
            # Loads are evened out through the bias, without an auxiliary loss (Wang et al. 2024,
            # arXiv 2408.15664).
            layer["mlp"]["router_bias"] -= BALANCE * (loads[i] - 1 / config.num_experts)
        return params, state, loss, loads

    return jax.jit(one, donate_argnums=(0, 1))


def train(recipe: Recipe, out: Path, log=print) -> tuple[network.Params, GptOssConfig]:
    """Runs the recipe; picks up where an interrupted run with the same settings stopped.

    Args:
      recipe: The settings.
      out: Folder for kept_tokens.txt, progress.npz (removed by the caller at the end) and
        log.jsonl.
      log: Called with a line of text every 20 steps.

    Returns:
      float32 parameters before rounding, and the config.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / KEPT_FILE).exists():
        write_kept(out / KEPT_FILE, tiny_data.vocabulary())
    tokenizer = load_tokenizer(out)
    config = tiny_config(list(tokenizer.kept or ()))
    params, progress, began = init(config, recipe.seed), out / "progress.npz", time.time()
    done = 0
    for polish, first, end in (
        (False, 0, recipe.steps),
        (True, recipe.steps, recipe.steps + recipe.polish),
    ):
        transform = optimizer(recipe, polish)
        state = transform.init(params)
        if progress.exists():
            params, state, done = _resume(progress, params, state, recipe)
            if done <= first:
                state = transform.init(params)
        if done >= end or first == end:
            continue
        step, recent = make_step(config, transform), []
        batches = _ahead(tokenizer, recipe.seed, max(first, done), not polish)
        for number in range(max(first, done) + 1, end + 1):
            params, state, loss, loads = step(params, state, next(batches))
            recent.append(loss)
            if number % 20 == 0 or number == end:
                mean, recent = float(np.mean([float(x) for x in recent])), []
                row = {
                    "step": number,
                    "loss": round(mean, 5),
                    "least_load": round(float(loads.min()), 4),
                    "most_load": round(float(loads.max()), 4),
                    "seconds": round(time.time() - began, 1),
                }
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                log(row)
            if number % 100 == 0 or number == end:
                _keep(progress, params, state, number, recipe)
    return params, config


def _ahead(tokenizer, seed: int, start: int, wide: bool):
    """Batches made in a thread, two steps ahead."""
    waiting: queue.Queue = queue.Queue(2)

    def work():
        for batch in tiny_data.batches(tokenizer, seed, start, wide):
            waiting.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield waiting.get()


def _keep(path: Path, params, state, step: int, recipe: Recipe) -> None:
    leaves = jax.tree.leaves((params, state))
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        arrays: dict[str, Any] = {str(i): np.asarray(x) for i, x in enumerate(leaves)}
        np.savez(file, step=step, recipe=json.dumps(dataclasses.asdict(recipe)), **arrays)
    os.replace(temporary, path)


def _resume(path: Path, params, state, recipe: Recipe):
    with np.load(path) as kept:
        if json.loads(str(kept["recipe"])) != dataclasses.asdict(recipe):
            raise GptOssError(
                f"{path} belongs to other settings ({kept['recipe']}): use them, or remove the file"
            )
        tree = jax.tree.structure((params, state))
        params, state = jax.tree.unflatten(
            tree, [jnp.asarray(kept[str(i)]) for i in range(tree.num_leaves)]
        )
        return params, state, int(kept["step"])


def export(params: network.Params, config: GptOssConfig, folder: Path) -> None:
    """Writes Hugging Face's layout: experts packed to MXFP4, everything else rounded to bfloat16.

    Args:
      params: float32 tree as trained.
      config: Its shape.
      folder: Where config.json, generation_config.json and model.safetensors go; kept_tokens.txt is
        there already.
    """

    def stored(path, x):
        if path[-1].key not in ("gate_up", "down"):
            return np.asarray(x).astype(ml_dtypes.bfloat16)
        packed = mxfp4.pack(np.asarray(fake_mxfp4(x)))
        assert np.array_equal(
            mxfp4.unpack(*map(np.asarray, (packed.blocks, packed.scales))), fake_mxfp4(x)
        )
        return {"blocks": packed.blocks, "scales": packed.scales}

    tree = jax.tree_util.tree_map_with_path(stored, params)
    entries, pieces = [], []
    for leaf in hf_names.leaves(config, "mxfp4"):
        array = leaf.to_file(functools.reduce(lambda node, key: node[key], leaf.path, tree))
        entries.append((leaf.tensor, array.dtype, array.shape))
        pieces.append(array)
    safetensors_file.write(folder / "model.safetensors", entries, iter(pieces))
    kept_whole = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": kept_whole}
    settings = {
        "bos_token_id": load_tokenizer(folder).special["<|startoftext|>"],
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
    }
    whole = {**config.to_hf(), "torch_dtype": "bfloat16", "quantization_config": quantization}
    for name, content in (("config.json", whole), ("generation_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Command line: trains, writes the checkpoint folder."""
    parser = argparse.ArgumentParser(
        prog="python -m gptoss_jax.train.tiny", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    params, config = train(recipe, arguments.out, lambda row: print(row, flush=True))
    export(params, config, arguments.out)
    print(f"wrote {arguments.out}; remove progress.npz and log.jsonl before shipping the folder")


if __name__ == "__main__":
    # glibc gives large buffers back to the system after every step: fresh pages cost 2 to 3 times
    # the arithmetic.
    wanted = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 26),
    }
    if sys.platform == "linux" and any(
        os.environ.get(key) != value for key, value in wanted.items()
    ):
        os.execve(
            sys.executable,
            [sys.executable, "-m", "gptoss_jax.train.tiny", *sys.argv[1:]],
            {**os.environ, **wanted},
        )
    main()
