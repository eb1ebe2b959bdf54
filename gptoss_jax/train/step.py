"""One update, jitted: gradients of all micro-batches, their sum over the sum of weights, AdamW, or
nothing where that is not finite.

Knows arrays; knows no files and no loop.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax import sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import Params
from gptoss_jax.train.objective import objective
from gptoss_jax.train.optimizer import rate, transform
from gptoss_jax.train.settings import Settings

State = dict[str, Any]


def new_state(trained: Params, settings: Settings) -> State:
    """State before the first update.

    Returns:
      "trained" (float32), "optimizer" (moments in float32), and int32 scalars: "step", updates
      tried; "skipped", those that changed nothing; "in_a_row", skipped since the last that did.
    """
    optimizer = transform(settings.optimizer).init(trained)
    # each an array of its own: a buffer cannot be donated twice
    counts = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "in_a_row")}
    return {"trained": trained, "optimizer": optimizer, **counts}


def make_loss(config: GptOssConfig, settings: Settings, dtype: Any) -> Callable[..., Any]:
    """(trained, frozen, batch) -> what `objective` returns.

    Args:
      config: The model.
      settings: Of the run.
      dtype: That a full fine-tuning computes in; adapters are cast where they are used.
    """

    def loss(trained, frozen, batch):
        keywords = {"config": config, "remat": settings.remat, "router_loss": settings.router_loss}
        if settings.lora is not None:
            return objective(trained, frozen, batch, lora=settings.lora, **keywords)
        params = merge(frozen, jax.tree.map(lambda x: x.astype(dtype), trained))
        return objective(params, None, batch, lora=None, **keywords)

    return loss


def make_step(
    config: GptOssConfig,
    settings: Settings,
    steps: int,
    dtype: Any,
    shardings: Params | None = None,
) -> Callable[[State, Params, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """The update as a pure function (state, frozen, batch) -> (state, metrics).

    Gradient and loss are sums over all micro-batches, divided by the sum of weights: K of
    them are one batch. An update whose loss or gradient is not finite changes neither
    parameters nor moments, and is counted.

    Args:
      config: The model.
      settings: Of the run.
      steps: Updates of the whole run, for the rate.
      dtype: As in `make_loss`.
      shardings: Of what is trained, None for one device.

    Returns:
      A function of `new_state`'s state, the base (or what full fine-tuning leaves as it is), and
      "tokens", "segments", "weights" [A, B, T]. Metrics are scalars: "loss", "grad_norm",
      "learning_rate", "tokens", "supervised", "weight", "skipped", "in_a_row", "load_max" and
      "load_min" (of an expert over the mean of its layer), "dead_experts", "load_entropy" (1: all
      experts alike).
    """
    gradient = jax.value_and_grad(make_loss(config, settings, dtype), has_aux=True)
    rule, rate_of = transform(settings.optimizer), rate(settings.optimizer, steps)

    def held(tree):
        return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)

    def total(trained, frozen, batch):
        """Sums over the micro-batches: gradient, {"loss", "weight", "load"}."""

        def one(number):
            micro = {name: x[number] for name, x in batch.items()}
            (_, sums), found = gradient(trained, frozen, micro)
            return held(found), sums

        count = batch["tokens"].shape[0]
        if count == 1:
            return one(0)

        def add(sums, number):
            return jax.tree.map(jnp.add, sums, one(number)), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
        zeros = held(zeros[0]), zeros[1]
        return jax.lax.scan(add, zeros, jnp.arange(count, dtype=jnp.int32))[0]

    def step(state, frozen, batch):
        trained = state["trained"]
        with jax.named_scope("gradient"):
            gradients, sums = total(trained, frozen, batch)
        weight = sums["weight"]
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        loss, norm = sums["loss"] / weight, _norm(gradients)
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            moves, moments = rule.update(gradients, state["optimizer"], trained)
            now = rate_of(state["step"])
            moved = jax.tree.map(lambda x, move: x - now * move, trained, moves)

        def chosen(new, old):
            return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)

        bad = (~fine).astype(jnp.int32)
        state = {
            "trained": chosen(moved, trained),
            "optimizer": chosen(moments, state["optimizer"]),
            "step": state["step"] + 1,
            "skipped": state["skipped"] + bad,
            "in_a_row": jnp.where(fine, 0, state["in_a_row"] + 1),
        }
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": now,
            "tokens": (batch["segments"] > 0).sum(dtype=jnp.int32),
            "supervised": (batch["weights"] > 0).sum(dtype=jnp.int32),
            "weight": weight,
            "skipped": state["skipped"],
            "in_a_row": state["in_a_row"],
            **_load(sums["load"]),
        }
        return state, sharding.replicate(metrics)

    return step


def _norm(tree: Params) -> jax.Array:
    """Root of the sum of all squares (optax has renamed its own)."""
    return jnp.sqrt(sum(((x**2).sum() for x in jax.tree.leaves(tree)), jnp.float32(0)))


def _load(load_LE: jax.Array) -> dict[str, jax.Array]:
    """How evenly a batch's tokens went to the experts."""
    E = load_LE.shape[1]
    share_LE = load_LE / jnp.maximum(load_LE.sum(1, keepdims=True), 1)
    entropy_L = -(share_LE * jnp.log(jnp.maximum(share_LE, 1e-30))).sum(1)
    return {
        "load_max": share_LE.max() * E,
        "load_min": share_LE.min() * E,
        "dead_experts": (load_LE == 0).sum(dtype=jnp.int32),
        "load_entropy": entropy_L.mean() / jnp.log(jnp.float32(E)),
    }


def make_evaluate(
    config: GptOssConfig, settings: Settings, dtype: Any
) -> Callable[[Params, Params, dict[str, jax.Array]], dict[str, jax.Array]]:
    """(trained, frozen, batch [B, T]) -> "loss" and "weight", the sums."""
    loss = make_loss(config, dataclasses.replace(settings, router_loss=0.0, remat=False), dtype)

    def evaluate(trained, frozen, batch):
        _, sums = loss(trained, frozen, batch)
        return sharding.replicate({"loss": sums["loss"], "weight": sums["weight"]})

    return evaluate


class Compiled:
    """A function of (..., batch), compiled once for every shape of batch, ahead of time.

    A compiled program refuses arrays of another type or place, so that nothing compiles again in
    silence. `seconds` is what compiling has taken; `shapes` what is there.
    """

    def __init__(self, function: Callable[..., Any], mesh: Any, **keywords: Any):
        self._function, self._mesh = jax.jit(function, **keywords), mesh
        self._programs: dict[tuple[int, ...], Any] = {}
        self.seconds = 0.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self._programs)

    def __call__(self, *arguments: Any) -> Any:
        shape = arguments[-1]["tokens"].shape
        if shape not in self._programs:
            started = time.perf_counter()
            with on(self._mesh):
                self._programs[shape] = self._function.lower(*arguments).compile()
            self.seconds += time.perf_counter() - started
        return self._programs[shape](*arguments)


def on(mesh: Any):
    """The mesh's context; none for one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def merge(base: Params, part: Params) -> Params:
    """One tree of two that share no leaf."""
    merged = dict(base)
    for key, child in part.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return merged
