"""README's comparison of a LoRA step with transformers and peft, in turn, in one run:

    python tests/measure_finetune.py             gpt-oss-tiny, float32, 4 rows of 256 tokens
    python tests/measure_finetune.py --wide      4 layers of gpt-oss-20b's width, bfloat16, 1 row of 256

Both sides train rank 8 on attention and all experts with AdamW on the same number of random tokens, with
the layers computed again in the backward pass where the model is wide. They take turns; a turn is four steps
one after the other, as in training, of which the first is not counted: it finds the other's threads and data.
Medians of the others.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import checkpoint, hub, loading, lora
from gptoss_jax.bounds import leaves
from gptoss_jax.config import GptOssConfig
from gptoss_jax.train import OptimizerSettings, Settings
from gptoss_jax.train.memory import keep_freed
from gptoss_jax.train.step import make_step, new_state

LORA = lora.LoraConfig(rank=8, alpha=16)
TINY = hub.resolve(hub.TINY)


def ours(wide: bool, rows: int, length: int):
    """A function that does one update and waits for it, and what the first one took."""
    random = np.random.default_rng(0)
    if wide:
        config = dataclasses.replace(
            GptOssConfig.preset("gpt-oss-20b"), num_layers=4, layer_types=()
        )
        flat = {}
        for path, _, shape, dtype in leaves(config, True):
            if dtype == np.uint8:
                value = (
                    random.integers(0, 256, shape, np.uint8)
                    if path[-1] == "blocks"
                    else np.full(shape, 118, np.uint8)
                )
                flat[path] = jnp.asarray(value)
            else:
                flat[path] = jnp.asarray(0.02 * random.standard_normal(shape, np.float32)).astype(
                    jnp.bfloat16
                )
        params = checkpoint.tree(flat)
    else:
        model = loading.load()
        config, params = model.config, model.params
    settings = Settings(lora=LORA, optimizer=OptimizerSettings(), remat=wide)
    keep_freed()  # as the loop does
    state = new_state(lora.init(config, LORA, jax.random.key(0)), settings)
    update = jax.jit(
        make_step(config, settings, 100, jnp.bfloat16 if wide else jnp.float32), donate_argnums=0
    )
    shape = (1, rows, length)
    batch = {
        "tokens": jnp.asarray(random.integers(0, config.vocab_size, shape), jnp.int32),
        "segments": jnp.ones(shape, jnp.int32),
        "weights": jnp.ones(shape, jnp.float32).at[..., 0].set(0),
    }

    def step():
        nonlocal state
        state, metrics = update(state, params, batch)
        return float(metrics["loss"])

    return step


def theirs(wide: bool, rows: int, length: int):
    """The same with transformers and peft."""
    import peft
    import torch
    from transformers import GptOssConfig as Config
    from transformers import GptOssForCausalLM

    if wide:
        config = Config(num_hidden_layers=4, num_local_experts=32)
    else:
        raw = json.loads((TINY / "config.json").read_text())
        raw.pop("quantization_config", None)
        config = Config(**raw)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = GptOssForCausalLM(config).to(torch.bfloat16 if wide else torch.float32)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    if wide:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(0, config.vocab_size, (rows, length))

    def step():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    arguments = parser.parse_args()
    rows, length = (1, 256) if arguments.wide else (4, 256)
    steps = {
        "gptoss_jax": ours(arguments.wide, rows, length),
        "peft": theirs(arguments.wide, rows, length),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        print(f"{name}: first step {time.perf_counter() - started:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            for count in range(4):
                started = time.perf_counter()
                step()
                if count:
                    times[name].append(time.perf_counter() - started)
    for name, found in times.items():
        print(
            f"{name}: {rows * length / statistics.median(found):,.1f} tokens/s, steps of {1e3 * min(found):,.1f} to {1e3 * max(found):,.1f} ms"
        )
    ratio = statistics.median(times["peft"]) / statistics.median(times["gptoss_jax"])
    print(f"gptoss_jax is {ratio:.2f} times as fast")


main()
