"""The next tokens of all rows on the device: the jitted programs that advance and choose.

`advance` reads each row's last token, `choose` takes the next one, `redo` takes back rows whose
choice a grammar refuses; the same for several drafted tokens at once. Rows are donated. Knows no
requests, no grammars (it gets masks) and no text.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gptoss_jax.batching.slots import Slots, added, settle
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import Params, hidden, unembed
from gptoss_jax.sampling import logprobs, sample
from gptoss_jax.sharding import constrain, replicate

BROKEN = -2  # in the place of a token whose logits are not numbers


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def advance(
    params: Params, slots: Slots, adapters: Params | None = None, *, config: GptOssConfig
) -> tuple[Slots, Float[Array, "B V"]]:
    """Reads the last token of every active row.

    Args:
      params: The model.
      slots: Donated.
      adapters: What `tables` made.

    Returns:
      The rows, and the float32 logits of the next tokens.
    """
    additions = added(adapters, slots.adapter_B)
    mask_B1 = slots.active_B[:, None]
    x_B1D, cache, _ = hidden(
        params,
        slots.last_B[:, None],
        slots.cache,
        config=config,
        mask=mask_B1,
        added=additions,
        sparse=True,
    )
    assert cache is not None
    logits_BV = unembed(params, x_B1D[:, 0], additions)
    return settle(dataclasses.replace(slots, cache=cache)), logits_BV


@functools.partial(jax.jit, donate_argnames=("slots",))
def choose(
    slots: Slots, logits_BV: Float[Array, "B V"], allowed_BW: UInt32[Array, "B W"]
) -> tuple[Slots, Int[Array, " B"]]:
    """Chooses the next token of every active row.

    Args:
      slots: After `advance`; donated.
      logits_BV: What `advance` gave.
      allowed_BW: As `sampling.sample` takes it.

    Returns:
      The rows, and int32 tokens; BROKEN where the logits are not numbers.
    """
    return _choose(slots, logits_BV, allowed_BW, slots.active_B, slots.cache.length_B)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def advance_drafts(
    params: Params,
    slots: Slots,
    drafts_BD: Int[Array, "B D"],
    adapters: Params | None = None,
    *,
    config: GptOssConfig,
) -> tuple[Slots, Float[Array, "B T V"]]:
    """`advance` by the last token and those that are drafted to follow it.

    Args:
      params: The model.
      slots: Donated; a row can be taken back by at least D + 1.
      drafts_BD: int32 ids, -1 after a row's last.
      adapters: What `tables` made.

    Returns:
      The rows, and the float32 logits after each of the D + 1 tokens.
    """
    additions = added(adapters, slots.adapter_B)
    tokens_BT = jnp.concatenate([slots.last_B[:, None], jnp.maximum(drafts_BD, 0)], axis=1)
    mask_BT = jnp.concatenate([jnp.ones_like(drafts_BD[:, :1]), drafts_BD], axis=1) >= 0
    mask_BT &= slots.active_B[:, None]
    x_BTD, cache, _ = hidden(
        params, tokens_BT, slots.cache, config=config, mask=mask_BT, added=additions, sparse=True
    )
    assert cache is not None
    return settle(dataclasses.replace(slots, cache=cache)), unembed(params, x_BTD, additions)


@functools.partial(jax.jit, donate_argnames=("slots",))
def choose_drafts(
    slots: Slots,
    logits_BTV: Float[Array, "B T V"],
    drafts_BD: Int[Array, "B D"],
    allowed_BW: UInt32[Array, "B W"],
) -> tuple[Slots, Int[Array, "B T"]]:
    """Chooses after each drafted token as long as the choices before were the drafted ones: each is
    drawn with its position's own noise, so it is the choice that there is without drafts.

    Args:
      slots: After `advance_drafts`; donated.
      logits_BTV: What it gave.
      drafts_BD: What it took.
      allowed_BW: All tokens.

    Returns:
      The rows, and int32 tokens, -1 after the last of a row.
    """
    going_B = slots.active_B
    count_B = jnp.where(going_B, 1 + (drafts_BD >= 0).sum(1, dtype=jnp.int32), 0)
    length_B = slots.cache.length_B - count_B
    columns = []
    for i in range(logits_BTV.shape[1]):
        length_B = length_B + going_B.astype(jnp.int32)
        slots, tokens_B = _choose(slots, logits_BTV[:, i], allowed_BW, going_B, length_B)
        columns.append(jnp.where(going_B, tokens_B, -1))
        if i < drafts_BD.shape[1]:
            going_B = going_B & (tokens_B == drafts_BD[:, i])
    cache = dataclasses.replace(slots.cache, length_B=length_B)
    return settle(dataclasses.replace(slots, cache=cache)), replicate(jnp.stack(columns, axis=1))


@jax.jit
def pick(logits_BTV: Float[Array, "B T V"], at_B: Int[Array, " B"]) -> Float[Array, "B V"]:
    """The logits after one of the tokens of `advance_drafts`, for each row."""
    found = jnp.take_along_axis(logits_BTV, at_B[:, None, None], axis=1)[:, 0]
    return constrain(found, "BV")


@functools.partial(jax.jit, donate_argnames=("slots",))
def redo(
    slots: Slots,
    logits_BV: Float[Array, "B V"],
    allowed_BW: UInt32[Array, "B W"],
    length_B: Int[Array, " B"],
    back_B: Int[Array, " B"],
) -> tuple[Slots, Int[Array, " B"]]:
    """Takes some rows back and chooses again there.

    Args:
      slots: Donated.
      logits_BV: What `advance` gave when it read the last token that stays.
      allowed_BW: As in `choose`.
      length_B: int32, tokens in the cache at that time.
      back_B: int32, choices to take back, at most the width of recent_Bn; 0 leaves a row as it is.

    Returns:
      As `choose`; the tokens of rows that are left alone mean nothing.
    """
    n = slots.recent_Bn.shape[1]
    again_B = back_B > 0
    columns = jnp.arange(n, dtype=jnp.int32)[None]
    gone = (columns >= n - back_B[:, None]) & (slots.recent_Bn >= 0)
    rows = jnp.arange(len(back_B), dtype=jnp.int32)[:, None]
    counts_BV = slots.counts_BV.at[rows, jnp.maximum(slots.recent_Bn, 0)].add(
        -gone.astype(jnp.int32)
    )
    kept = columns - back_B[:, None]
    recent_Bn = jnp.where(
        kept >= 0, jnp.take_along_axis(slots.recent_Bn, jnp.maximum(kept, 0), axis=1), -1
    )
    length_B = jnp.where(again_B, length_B, slots.cache.length_B)
    cache = dataclasses.replace(slots.cache, length_B=length_B)
    slots = dataclasses.replace(slots, cache=cache, counts_BV=counts_BV, recent_Bn=recent_Bn)
    return _choose(slots, logits_BV, allowed_BW, again_B, length_B)


def _choose(slots, logits_BV, allowed_BW, chosen_B, positions_B):
    tokens_B = sample(
        logits_BV, slots.settings, slots.seen_BV, slots.counts_BV, positions_B, allowed_BW
    )
    rows = jnp.arange(tokens_B.shape[0], dtype=jnp.int32)
    counts_BV = slots.counts_BV.at[rows, tokens_B].add(chosen_B.astype(jnp.int32))
    recent_Bn = jnp.concatenate([slots.recent_Bn[:, 1:], tokens_B[:, None]], axis=1)
    slots = dataclasses.replace(
        slots,
        last_B=jnp.where(chosen_B, tokens_B, slots.last_B),
        recent_Bn=jnp.where(chosen_B[:, None], recent_Bn, slots.recent_Bn),
        counts_BV=counts_BV,
    )
    broken_B = jnp.isnan(logits_BV).any(1)
    return settle(slots), replicate(jnp.where(broken_B, BROKEN, tokens_B))


@functools.partial(jax.jit, static_argnames=("top",))
def report(logits_BV: Float[Array, "B V"], tokens_B: Int[Array, " B"], *, top: int):
    """Log probabilities of chosen tokens and of the `top` likeliest, as `sampling.logprobs`."""
    return replicate(logprobs(logits_BV, jnp.maximum(tokens_B, 0), top))
