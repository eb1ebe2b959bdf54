"""From logits to a token: penalties, bias, temperature, top-k, top-p, min-p, and a draw that
depends on the seed alone.

Settings travel as arrays, one entry a row, so that a batch can mix them and a change never
recompiles. Filters find their threshold by bisection on the bits of float32, without sorting the
vocabulary. Knows no text and no model.
"""

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from gptoss_jax import hosts, sharding
from gptoss_jax.errors import GptOssError
from gptoss_jax.kernels import cpu
from gptoss_jax.ops import between

BIAS_SLOTS = (
    0,
    16,
    1024,
)  # entries of logit_bias, padded to one of these so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are what OpenAI recommends for gpt-oss.

    Attributes:
      temperature: Divides the logits; 0 takes the likeliest token.
      top_k: Only the k likeliest tokens (and those tied with the k-th); 0 for all.
      top_p: Only the likeliest tokens that together reach this probability; 1 for all.
      min_p: Only tokens at least this probable relative to the likeliest; 0 for all.
      repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or
        output; 1 for none.
      presence_penalty: Subtracted from logits of tokens already in the output.
      frequency_penalty: Subtracted from logits once for every occurrence in the output.
      logit_bias: Added to logits, {token id: bias}.
      seed: Same seed, same tokens, whatever else is in the batch; None draws one.
      n: Completions of each prompt.
      stop_token_ids: Ids that end a completion, besides the model's own.
      ignore_eos: Do not stop at the model's own end tokens.
      logprobs: Report each token's log probability (of the unfiltered distribution).
      top_logprobs: Also report this many likeliest tokens, at most 20.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self):
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 2**31 - 1, integer=True)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _within("n", self.n, 1, 1024, integer=True)
        _within("top_logprobs", self.top_logprobs, 0, 20, integer=True)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**64 - 1, integer=True)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -1000.0, 1000.0)
        if len(self.logit_bias) > BIAS_SLOTS[-1]:
            raise GptOssError(
                f"logit_bias has {len(self.logit_bias)} entries: "
                f"at most {BIAS_SLOTS[-1]} are supported"
            )


def _within(name, value, low, high, *, above=False, integer=False):
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (above and value == low):
        kind = "an integer" if integer else "a number"
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise GptOssError(f"{name} is {value!r}: expected {kind} {bounds}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`Sampling` for a batch: one entry a row."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    bias_ids_BJ: jax.Array  # the vocabulary's size where there is none
    bias_BJ: jax.Array
    keys_B2: jax.Array


def to_arrays(rows: Sequence[Sampling], choices: Sequence[int], vocab_size: int) -> SamplingArrays:
    """Settings of each row as device arrays.

    Args:
      rows: One a row.
      choices: Which of a prompt's n completions each row is: it is part of the row's key.
      vocab_size: Ids of logit_bias must be below it.

    Returns:
      The arrays; a seed of None has been drawn.

    Raises:
      GptOssError: logit_bias names an id outside the vocabulary.
    """
    slots = next(size for size in BIAS_SLOTS if all(len(row.logit_bias) <= size for row in rows))
    ids = np.full((len(rows), slots), vocab_size, np.int32)
    bias = np.zeros((len(rows), slots), np.float32)
    for i, row in enumerate(rows):
        for j, (token, value) in enumerate(row.logit_bias.items()):
            _within("token id of logit_bias", token, 0, vocab_size - 1, integer=True)
            ids[i, j], bias[i, j] = token, value

    def column(name, dtype: type = np.float32):
        return jnp.asarray(np.array([getattr(row, name) for row in rows], dtype))

    seeds = [secrets.randbits(64) if row.seed is None else row.seed % 2**64 for row in rows]
    if any(row.seed is None for row in rows):
        seeds = hosts.same(seeds)
    keys = np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)
    return SamplingArrays(
        column("temperature"),
        column("top_k", np.int32),
        column("top_p"),
        column("min_p"),
        column("repetition_penalty"),
        column("presence_penalty"),
        column("frequency_penalty"),
        jnp.asarray(ids),
        jnp.asarray(bias),
        _fold_choices(jnp.asarray(keys), jnp.asarray(choices, jnp.uint32)),
    )


@jax.jit
def _fold_choices(keys_B2, choices_B):
    folded = jax.vmap(lambda key, choice: jax.random.fold_in(jax.random.wrap_key_data(key), choice))
    return jax.random.key_data(folded(keys_B2, choices_B))


def sample(
    logits_BV: Float[Array, "B V"],
    settings: SamplingArrays,
    seen_BV: Int[Array, "B V"],
    counts_BV: Int[Array, "B V"],
    positions_B: Int[Array, " B"],
    allowed_BW: UInt32[Array, "B W"] | None = None,
) -> Int[Array, " B"]:
    """Chooses a token for each row.

    Penalties and bias come first, then temperature, top-k, top-p of what is left, min-p, what is
    allowed, and Gumbel-max with the key folded from (seed, choice, position). So a choice made
    without `allowed` is, if it is allowed, the choice with it. Parts that no row asks for are
    skipped at run time.

    Args:
      logits_BV: float32.
      settings: Of each row.
      seen_BV: int8, 1 where the prompt holds the token.
      counts_BV: int32, occurrences in the output.
      positions_B: Position of the token to be chosen.
      allowed_BW: Bit t % 32 of word t // 32 says whether token t may be chosen; if none of those
        that the filters keep may, the filters do not count. None allows all.

    Returns:
      int32 [B].
    """
    with jax.named_scope("sample"):
        s = settings
        adjusted = (s.repetition_B != 1) | (s.presence_B != 0) | (s.frequency_B != 0)
        adjusted |= (s.bias_ids_BJ < logits_BV.shape[1]).any(1)
        logits_BV = jax.lax.cond(
            adjusted.any(), lambda: _adjust(logits_BV, s, seen_BV, counts_BV), lambda: logits_BV
        )
        allowed_BV = None if allowed_BW is None else _bits(allowed_BW, logits_BV.shape[1])
        best_BV = logits_BV if allowed_BV is None else jnp.where(allowed_BV, logits_BV, -jnp.inf)
        greedy_B = _argmax(best_BV)

        def draw():
            warm = s.temperature_B > 0
            scaled_BV = logits_BV / jnp.where(warm, s.temperature_B, 1.0)[:, None]
            filtered = warm & ((s.top_k_B > 0) | (s.top_p_B < 1) | (s.min_p_B > 0))
            kept_BV = jax.lax.cond(filtered.any(), lambda: _filter(scaled_BV, s), lambda: scaled_BV)
            if allowed_BV is not None:
                some_B = (allowed_BV & (kept_BV > -jnp.inf)).any(1)
                kept_BV = jnp.where(some_B[:, None], kept_BV, scaled_BV)
                kept_BV = jnp.where(allowed_BV, kept_BV, -jnp.inf)
            drawn_B = _argmax(kept_BV + _gumbel(s.keys_B2, positions_B, logits_BV.shape[1]))
            return jnp.where(warm, drawn_B, greedy_B)

        return jax.lax.cond((s.temperature_B > 0).any(), draw, lambda: greedy_B)


def _argmax(x_BV):
    """First place of the largest, int32; two reductions, which CPUs vectorise: four times as fast
    as argmax there (1670 values, 32 rows).
    """
    V = x_BV.shape[1]

    def reference(x):
        places = jnp.where(
            x == x.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32)[None], V - 1
        )
        return places.min(-1)

    def kernel(x):
        return cpu.training.first_largest(x), None

    return between.run("product", reference, kernel, None, x_BV, width=V)


def _bits(words_BW, size):
    """bool [B, size]: bit t % 32 of word t // 32."""
    bits = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return bits.reshape(words_BW.shape[0], -1)[:, :size] > 0


def _gumbel(keys_B2: UInt32[Array, "B two"], positions_B, size):
    def row(key, position):
        return jax.random.gumbel(
            jax.random.fold_in(jax.random.wrap_key_data(key), position), (size,), jnp.float32
        )

    return jax.vmap(row)(keys_B2, positions_B.astype(jnp.uint32))


def _adjust(logits_BV, s, seen_BV, counts_BV):
    present = counts_BV > 0
    repeated = present | (seen_BV > 0)
    penalty = s.repetition_B[:, None]
    logits = jnp.where(
        repeated, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV
    )
    logits -= s.frequency_B[:, None] * counts_BV.astype(jnp.float32)
    logits -= s.presence_B[:, None] * present.astype(jnp.float32)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, s.bias_ids_BJ].add(s.bias_BJ, mode="drop")


def _filter(scaled_BV, s):
    """Sets logits of tokens outside top-k, top-p and min-p to -inf."""
    V = scaled_BV.shape[1]
    keys_BV = _sortable(scaled_BV)
    k_B = jnp.where(s.top_k_B > 0, jnp.minimum(s.top_k_B, V), V)
    kth_B = _largest(
        lambda t: (keys_BV >= t[:, None]).sum(1, dtype=jnp.int32) >= k_B, scaled_BV.shape[0]
    )
    kept = keys_BV >= kth_B[:, None]
    p_BV = jax.nn.softmax(jnp.where(kept, scaled_BV, -jnp.inf), axis=-1)
    p_keys_BV = _sortable(p_BV)
    nucleus_B = _largest(
        lambda t: jnp.where(p_keys_BV >= t[:, None], p_BV, 0.0).sum(1) >= s.top_p_B,
        scaled_BV.shape[0],
    )
    kept &= (p_keys_BV >= nucleus_B[:, None]) | (s.top_p_B >= 1)[:, None]
    kept &= p_BV >= s.min_p_B[:, None] * p_BV.max(1, keepdims=True)
    # The likeliest token always stays, also when rounding lets no threshold reach top_p.
    kept |= scaled_BV == scaled_BV.max(1, keepdims=True)
    return jnp.where(kept, scaled_BV, -jnp.inf)


def _sortable(x):
    """uint32 keys in the order of float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds, rows):
    """Largest uint32 threshold of each row for which `holds` (true for 0, and monotone) is true,
    bit by bit.
    """

    def body(i, threshold):
        candidate = threshold | (jnp.uint32(0x80000000) >> i.astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(rows, jnp.uint32))


def logprobs(logits_BV: Float[Array, "B V"], tokens_B: Int[Array, " B"], top: int):
    """Log probabilities of chosen tokens and of the `top` likeliest.

    Args:
      logits_BV: float32, before penalties and temperature.
      tokens_B: Chosen ids.
      top: How many of the likeliest, a static number.

    Returns:
      float32 [B], int32 [B, top], float32 [B, top].
    """
    total_B = jax.nn.logsumexp(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0] - total_B
    values_Bn, ids_Bn = _likeliest(logits_BV, top)
    return chosen_B, ids_Bn.astype(jnp.int32), values_Bn - total_B[:, None]


def _likeliest(logits_BV, top):
    """lax.top_k; on a mesh every device searches its part of the vocabulary and sends `top` pairs,
    where the partitioner would gather the logits.
    """
    if sharding.current() is None or top == 0:
        return jax.lax.top_k(logits_BV, top)

    def part(logits_BV):
        size = logits_BV.shape[1]
        values, ids = jax.lax.top_k(logits_BV, min(top, size))
        return values, ids + size * jax.lax.axis_index("tensor")

    spec = PartitionSpec(sharding.batch_axes(logits_BV.shape[0]) or None, "tensor")
    values, ids = jax.shard_map(part, in_specs=spec, out_specs=spec)(logits_BV)
    values_Bn, places = jax.lax.top_k(values, top)
    return values_Bn, jnp.take_along_axis(ids, places, axis=1)
