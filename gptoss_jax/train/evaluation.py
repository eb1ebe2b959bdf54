"""Looking at a model while it is trained: loss on held-out data, and what it says.

Knows batches and prompts; knows no optimizer.
"""

from typing import Any

import jax
import numpy as np

from gptoss_jax import sharding
from gptoss_jax.engine import Model
from gptoss_jax.loading import with_stack
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import Params
from gptoss_jax.sampling import Sampling
from gptoss_jax.train.pipeline import Batches
from gptoss_jax.train.samples import Samples
from gptoss_jax.train.step import Compiled, on

NAME = "trained"


def put(batch: dict[str, np.ndarray], mesh: Any, parts: int | None = None) -> dict[str, jax.Array]:
    """A batch on the devices, rows over the mesh's batch axes.

    Args:
      batch: Arrays [rows, T].
      mesh: None for one device.
      parts: Micro-batches, which become a first axis: [parts, rows / parts, T].
    """
    found = {}
    for name, x in batch.items():
        x = x if parts is None else x.reshape(parts, -1, x.shape[-1])
        letters = "BT" if parts is None else "ABT"
        found[name] = jax.device_put(x) if mesh is None else sharding.put(x, letters, mesh)
    return found


def mean_loss(
    evaluate: Compiled, trained: Params, frozen: Params, batches: Batches, mesh: Any
) -> float:
    """Loss a token over all batches of an epoch, each token by its weight.

    Args:
      evaluate: Of `step.make_evaluate`.
      trained: What is trained.
      frozen: What is not.
      batches: The held-out data.
      mesh: None for one device.
    """
    sums = [
        evaluate(trained, frozen, put(batches[number], mesh)) for number in range(batches.per_epoch)
    ]
    found = jax.device_get(sums)
    total = sum(float(s["loss"]) for s in found)
    return total / sum(float(s["weight"]) for s in found)


def with_adapter(model: Model, trained: Params, lora: LoraConfig) -> Model:
    """The model with what is being trained, under the name "trained"; the base is not copied."""
    if model.mesh is not None:
        with on(model.mesh):  # every process reads all of it
            trained = jax.jit(sharding.replicate)(trained)
    return with_stack(model, {NAME: (jax.device_get(trained), lora)})


def prompts(samples: Samples, count: int, longest: int) -> list[list[int]]:
    """What comes before the first learnt token, of the first samples that have something there.

    Args:
      samples: Held-out ones, or else those that are learnt.
      count: How many.
      longest: Prompts of more tokens are left out.
    """
    found: list[list[int]] = []
    for sample in samples.samples:
        start = int(np.flatnonzero(sample.weights)[0])
        ids = [int(t) for t in sample.tokens[:start]]
        if 1 < len(ids) <= longest and ids not in found:
            found.append(ids)
        if len(found) == count:
            break
    return found


def sample(
    model: Model, trained: Params, lora: LoraConfig | None, ids: list[list[int]], tokens: int
) -> list[dict[str, str]]:
    """What the model answers greedily: [{"prompt", "text"}].

    Args:
      model: The base; for full fine-tuning the model as it is now.
      trained: The adapter.
      lora: Its config; None for full fine-tuning.
      ids: Prompts.
      tokens: Most tokens of an answer.
    """
    named: dict[str, Any] = {}
    if lora is not None:
        model, named = with_adapter(model, trained, lora), {"adapter": NAME}
    done = model.generate(ids, Sampling(temperature=0), tokens, **named)
    decode = model.tokenizer.decode
    rows = []
    for prompt, answer in zip(ids, done, strict=True):
        stop = decode([answer.stop]) if isinstance(answer.stop, int) else ""
        rows.append({"prompt": decode(prompt), "text": decode(answer.tokens) + stop})
    return rows
