"""Do this device's kernels compute what the definition does? Logits of a few real-size layers of
random parameters in bfloat16, by the kernels and by plain jnp, both beside plain jnp in float32.

    python -m gptoss_jax.bench.agreement --model gpt-oss-20b --layers 2

Prints one line of JSON; `error_ratio` is the kernels' error by plain jnp's own in bfloat16.
"""

import argparse
import functools
import importlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import model
from gptoss_jax.bench import machine
from gptoss_jax.bench.model import open_model
from gptoss_jax.engine import Model
from gptoss_jax.ops import backends

SHAPES = ((1, 1), (5, 1), (2, 70), (1, 300))  # rows, tokens


def agreement(opened: Model, shapes: tuple[tuple[int, int], ...] = SHAPES) -> dict[str, Any]:
    """Compares the last tokens' logits, which have gone through prefill's or decode's operations.

    Args:
      opened: A model whose parameters lie as released.
      shapes: (rows, tokens) of the prompts.

    Returns:
      `kernels`, `plain`: largest difference from float32 over the logits' deviation; `error_ratio`
      of the two; all the worst of the shapes.
    """
    exact = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, opened.params
    )
    generator = np.random.default_rng(0)
    found = {"kernels": 0.0, "plain": 0.0}
    for rows, length in shapes:
        tokens = generator.integers(0, opened.config.vocab_size, (rows, length), np.int32)
        # A program of its own for each: the choice of a back end is made while it is traced.
        logits = {
            "kernels": _logits(opened.params, tokens, opened.config),
            "plain": _logits(opened.params, tokens, opened.config, "xla"),
        }
        truth = _logits(exact, tokens, opened.config, "xla")
        for name, values in logits.items():
            error = float(np.abs(values - truth).max() / truth.std())
            found[name] = max(found[name], error)
    return found | {"error_ratio": found["kernels"] / found["plain"]}


def _logits(params, tokens, config, backend: str | None = None) -> np.ndarray:
    @functools.partial(jax.jit, static_argnames="config")
    def last(params, tokens_BT, config):
        x_BTD, _, _ = model.hidden(params, tokens_BT, config=config)
        return model.unembed(params, x_BTD[:, -1])

    if backend is None:
        return np.asarray(last(params, tokens, config))
    with backends.use(backend):
        return np.asarray(last(params, tokens, config))


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    opened = open_model(given.model, random_weights=True, layers=given.layers)
    found = agreement(opened) | machine.describe()
    if jax.default_backend() == "gpu":  # what a program can be compiled for where no device is
        client: Any = importlib.import_module("jax._src.lib").xla_client  # nothing public has it
        topology = client.get_topology_for_devices(jax.devices())
        found["target_config"] = str(getattr(topology, "target_config", ""))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
