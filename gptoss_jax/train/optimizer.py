"""The rate of every step, and AdamW over adapters or parameters.

Knows trees of arrays; knows no model and no data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptoss_jax.errors import GptOssError
from gptoss_jax.model import Params
from gptoss_jax.train.settings import OptimizerSettings

_NO_DECAY = ("norm", "sinks")


def rate(
    settings: OptimizerSettings, steps: int
) -> Callable[[Int[Array, ""] | int], Float[Array, ""]]:
    """The learning rate of update 0, 1, ...: warm-up from 0, then the schedule, which reaches its
    end at the last update.

    Args:
      settings: Peak, schedule, warm-up.
      steps: Updates of the whole run.

    Raises:
      GptOssError: The warm-up leaves no step.
    """
    share = settings.warmup < 1
    warmup = round(settings.warmup * steps) if share else round(settings.warmup)
    if warmup >= steps and steps > 1:
        raise GptOssError(
            f"warmup takes {warmup} of {steps} steps: expected fewer, or a share such as 0.03"
        )
    peak, left = settings.learning_rate, max(1, steps - 1 - warmup)
    parts = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, left, settings.final_share),
        "linear": lambda: optax.linear_schedule(peak, peak * settings.final_share, left),
        "constant": lambda: optax.constant_schedule(peak),
    }
    after = parts[settings.schedule]()
    if not warmup:
        chosen = after
    else:
        # the first update is not of rate 0: step i of w has (i + 1) / (w + 1)
        before = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
        chosen = optax.join_schedules([before, after], [warmup])
    return lambda step: jnp.asarray(chosen(step), jnp.float32)


def transform(settings: OptimizerSettings) -> optax.GradientTransformation:
    """AdamW but for the rate: a gradient becomes the step to be multiplied by -rate."""
    clip = optax.clip_by_global_norm(settings.clip) if settings.clip else optax.identity()
    rule = optax.chain(
        clip,
        optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(settings.weight_decay, mask=decayed),
    )

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax 0.2.8 raises floats to integer powers
            return rule.update(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


def decayed(tree: Params) -> Params:
    """Which leaves weight decay is for: matrices."""

    def one(keys, _):
        name = str(getattr(keys[-1], "key", keys[-1]))
        return not (name.endswith("bias") or name in _NO_DECAY)

    return jax.tree_util.tree_map_with_path(one, tree)


def state_shardings(
    rule: optax.GradientTransformation, shapes: Params, shardings: Params, everywhere: Any
) -> Any:
    """Where the optimizer's state lies: moments as what they are of, counts everywhere.

    Args:
      rule: Of `transform`.
      shapes: Tree of what is trained.
      shardings: Of it.
      everywhere: Sharding of a replicated array.
    """
    state = jax.eval_shape(rule.init, shapes)
    return optax.tree.map_params(
        rule,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: everywhere,
    )
