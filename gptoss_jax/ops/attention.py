"""Grouped-query attention with sinks: causal, with or without a sliding window, over any keys whose
positions are known.

One definition serves training, prefill and decode: a key is visible if its position is known, not
later than the query's, within the window, and in the query's segment. Masked or never written slots
carry position -1.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import sharding
from gptoss_jax.kernels import cpu, gpu
from gptoss_jax.ops import backends
from gptoss_jax.ops.backends import Backend

KEY_BLOCK, KEY_BLOCKS = 128, 64  # keys read at once up to `extent_B`, and at most so many blocks
SCORES_LIMIT = 1 << 26  # float32 scores held at once (256 MB): above it queries go block by block
QUERY_BLOCK = 128


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, " N"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    window: int | None = None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    extent_B: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax over the visible keys and one sink per head, whose share is dropped.

    out = sum_j exp(q.k_j / sqrt(H)) v_j / (exp(sink) + sum_j exp(q.k_j / sqrt(H))); query head n
    uses kv head n // G. The sink is neither scaled nor rotated. A query that sees no key gives
    zeros.

    Args:
      q_BTNH: Rotated queries.
      k_BSKH: Rotated keys.
      v_BSKH: Values.
      sinks_N: One logit a query head.
      q_positions_BT: int32.
      k_positions_BS: int32, -1 where the slot holds nothing.
      window: Keys a query sees, itself included: positions p - window + 1 .. p; None for all.
      segments: Segment ids of queries and keys (packed training); None for one segment.
      extent_B: int32; keys from this one on are visible to no query of the row that matters, and
        only the blocks before it are read, one after another (no gradient). What lies in a block
        that a query does not see changes no bit of its result. None reads all at once.

    Returns:
      [B, T, N, H] in q's dtype; scores, softmax and sums in float32.

    Source: openai/gpt-oss gpt_oss/triton/attention.py attention_ref, and gpt_oss/torch/model.py
    sdpa.
    """
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS
    reference = functools.partial(_attention, window=window, segments=segments, extent_B=extent_B)
    return _by_back_end(reference, parts, window, segments)


def _by_back_end(reference, parts, window, segments):
    def why_not_cpu():
        if parts[0].shape[-1] % cpu.HEAD_BLOCK:
            return f"heads are no multiple of {cpu.HEAD_BLOCK}"
        if sharding.current() is not None:
            return "the mesh's partitioner knows einsums only"
        return cpu.why_not()

    def on_cpu(*parts):
        return _on_cpu(window, *parts, segments)

    def on_tpu(*parts):
        from gptoss_jax.kernels.tpu.attention import attention  # Pallas takes 0.2 s to import

        call = functools.partial(attention, window=window)
        if sharding.current() is None:
            return call(*parts)
        letters = "BTNH", "BSKH", "BSKH", "N", "BT", "BS"
        specs = tuple(map(sharding.activation_spec, letters, [x.shape for x in parts]))
        return jax.shard_map(call, in_specs=specs, out_specs=specs[0])(*parts)

    def backward(parts, gradient):
        arrays, positions = parts[:4], parts[4:]
        _, pull = jax.vjp(lambda *arrays: reference(*arrays, *positions), *arrays)
        return *pull(gradient), None, None

    def with_gradient(call):
        kernel = jax.custom_vjp(call)
        kernel.defvjp(lambda *parts: (kernel(*parts), parts), backward)
        return kernel

    others = {
        "cpu": Backend(on_cpu, why_not_cpu()),
        "tpu": Backend(
            with_gradient(on_tpu), None if segments is None else "the kernel knows no segments"
        ),
        "gpu": Backend(functools.partial(_on_gpu, window, segments), why_not_gpu(*parts[:2])),
    }
    with jax.named_scope("attention"):
        return backends.run("attention", reference, others, *parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_cpu(window, q, k, v, sinks, q_positions, k_positions, segments):
    return _on_cpu_forward(window, q, k, v, sinks, q_positions, k_positions, segments)[0]


def _on_cpu_forward(window, q, k, v, sinks, q_positions, k_positions, segments):
    wide = sinks.astype(jnp.float32)
    found = cpu.attention_and_norm(q, k, v, wide, q_positions, k_positions, window, segments)
    return found[0], ((q, k, v, sinks, q_positions, k_positions, segments), found)


def _on_cpu_backward(window, kept, gradient):
    (q, k, v, sinks, q_positions, k_positions, segments), (out, norm) = kept
    parts = q, k, v, sinks.astype(jnp.float32), q_positions, k_positions, window, segments
    *to_arrays, to_sinks = cpu.attention_gradient(*parts, out, norm, gradient)
    return *to_arrays, to_sinks.astype(sinks.dtype), None, None, None


_on_cpu.defvjp(_on_cpu_forward, _on_cpu_backward)


WIDEST_HEAD, LARGEST_GROUP = 256, 64  # of the GPU's kernel: what registers hold


def why_not_gpu(q_BTNH: jax.Array, k_BSKH: jax.Array) -> str | None:
    """Why kernels/gpu does not take these; None if it does."""
    if k_BSKH.dtype != q_BTNH.dtype:
        return f"queries are {q_BTNH.dtype}, keys {k_BSKH.dtype}"
    if q_BTNH.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the kernel takes float32, bfloat16 and float16, not {q_BTNH.dtype}"
    if q_BTNH.shape[-1] > WIDEST_HEAD:
        return f"heads are wider than {WIDEST_HEAD}"
    if q_BTNH.shape[2] > LARGEST_GROUP * k_BSKH.shape[2]:
        return f"more than {LARGEST_GROUP} query heads share a kv head"
    return gpu.why_not()


def _on_gpu(window, segments, *parts):
    """The kernel with its own gradient; on a mesh each device computes its rows and heads."""
    from gptoss_jax.kernels.gpu import attention as kernel  # Pallas takes 0.2 s to import
    from gptoss_jax.kernels.gpu import attention_gradient

    letters = ("BTNH", "BSKH", "BSKH", "N", "BT", "BS", "BT", "BS")

    def spread(call, arrays, names, results):
        """call(*arrays), `names` and `results` the letters of its arguments and results."""
        if sharding.current() is None:
            return call(*arrays)
        axes = "".join(names), (n for x in arrays for n in x.shape)
        size = dict(zip(*axes, strict=True))
        shapes = [[size[letter] for letter in name] for name in (*names, *results)]
        specs = tuple(map(sharding.activation_spec, (*names, *results), shapes))
        n = len(names)
        return jax.shard_map(call, in_specs=specs[:n], out_specs=specs[n:])(*arrays)

    def taken(q, k, v, sinks, q_positions, k_positions, *segments):
        return q, k, v, sinks, q_positions, k_positions, segments or None

    def result(*arrays):
        return (kernel.attention(*taken(*arrays), window),)

    def results(*arrays):
        return kernel.forward(*taken(*arrays), window=window)

    @jax.custom_vjp
    def attend(*arrays):
        return spread(result, arrays, letters[: len(arrays)], ("BTNH",))[0]

    def forward(*arrays):
        out, norm = spread(results, arrays, letters[: len(arrays)], ("BTNH", "BTN"))
        return out, (arrays, out, norm)

    def backward(kept, gradient):
        arrays, out, norm = kept

        def call(out, norm, gradient, *arrays):
            return attention_gradient.backward(*taken(*arrays), out, norm, gradient, window=window)

        names = ("BTNH", "BTN", "BTNH", *letters[: len(arrays)])
        *found, sinks_BN = spread(
            call, (out, norm, gradient, *arrays), names, ("BTNH", "BSKH", "BSKH", "BN")
        )
        d_sinks = sinks_BN.sum(0).astype(arrays[3].dtype)
        return *found, d_sinks, *(None for _ in arrays[4:])

    attend.defvjp(forward, backward)
    return attend(*parts, *(segments or ()))


def _attention(
    q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS, *, window, segments, extent_B
):
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    sinks_KG = sinks_N.reshape(K, N // K).astype(jnp.float32)
    if extent_B is not None:
        assert segments is None
        parts = q_BTKGH, k_BSKH, v_BSKH, q_positions_BT, k_positions_BS, extent_B
        return _bounded(sinks_KG, window, *parts).reshape(B, T, N, H)

    def some(q, q_positions, q_segments):
        visible_BTS = _visible(q_positions, k_positions_BS, window)
        if segments is not None:
            visible_BTS &= q_segments[:, :, None] == segments[1][:, None, :]
        return _softmax_average(q, k_BSKH, v_BSKH, sinks_KG, visible_BTS)

    q_segments_BT = q_positions_BT if segments is None else segments[0]
    if B * N * T * S <= SCORES_LIMIT or T <= QUERY_BLOCK:
        out = some(q_BTKGH, q_positions_BT, q_segments_BT)
    else:
        out = _by_blocks(some, q_BTKGH, q_positions_BT, q_segments_BT)
    return out.reshape(B, T, N, H)


def banded(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, " N"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    window: int,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B T N H"]:
    """`attention` with a window over S = window + T keys, in time T * window instead of T * S.

    The first `window` keys are those before the queries (a ring's, in any order; position -1 for
    none), the others are the queries' own, in order. A block of `window` queries sees two blocks of
    keys.

    Args: As `attention`; k and v have window + T rows.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    parts = q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS
    reference = functools.partial(_banded, window=window, segments=segments)
    return _by_back_end(reference, parts, window, segments)


def _banded(q_BTNH, k_BSKH, v_BSKH, sinks_N, q_positions_BT, k_positions_BS, *, window, segments):
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    count = -(-T // window)
    pad = count * window - T

    def blocks(x, fill=0):
        """[B, n * window, ...] -> [B, n, window, ...], padded at the end."""
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return x.reshape(B, -1, window, *x.shape[2:])

    def pairs(x, fill=0):
        """Keys that each block of queries sees: [B * count, 2 * window, ...]."""
        x = blocks(x, fill)
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2).reshape(
            B * count, 2 * window, *x.shape[3:]
        )

    def fold(x, fill=0):
        return blocks(x, fill).reshape(B * count, window, *x.shape[2:])

    q_positions, k_positions = fold(q_positions_BT, -1), pairs(k_positions_BS, -1)
    visible = _visible(q_positions, k_positions, window)
    if segments is not None:
        visible &= fold(segments[0])[:, :, None] == pairs(segments[1])[:, None, :]
    out = _softmax_average(
        fold(q_BTNH).reshape(B * count, window, K, N // K, H),
        pairs(k_BSKH),
        pairs(v_BSKH),
        sinks_N.reshape(K, N // K).astype(jnp.float32),
        visible,
    )
    return out.reshape(B, count * window, N, H)[:, :T]


def _visible(q_positions, k_positions, window):
    """bool [B, T, S]: written, causal, inside the window."""
    q, k = q_positions[:, :, None], k_positions[:, None, :]
    visible = (k >= 0) & (k <= q)
    return visible if window is None else visible & (k > q - window)


def _softmax_average(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, visible_BTS):
    B, T, K, G, H = q_BTKGH.shape
    # Heads of a group are rows of one product: 2 to 3 times as fast on CPUs as five axes.
    q_BKRH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    out = _average(q_BKRH, keys, values, sinks_KG, visible_BTS)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def _average(q_BKRH, k_BKSH, v_BKSH, sinks_KG, visible_BTS):
    """Rows R are (group, query) pairs; the weights are made again for the gradient instead of being
    kept.
    """
    return _average_forward(q_BKRH, k_BKSH, v_BKSH, sinks_KG, visible_BTS)[0]


def _scores(q_BKRH, k_BKSH, visible_BTS):
    """float32 [B, K, G, T, S], -inf where a key is not visible."""
    B, K, R, H = q_BKRH.shape
    T, S = visible_BTS.shape[1:]
    scores = (
        jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
    )
    return jnp.where(visible_BTS[:, None, None], scores.reshape(B, K, R // T, T, S), -jnp.inf)


def _average_forward(q_BKRH, k_BKSH, v_BKSH, sinks_KG, visible_BTS):
    scores = _scores(q_BKRH, k_BKSH, visible_BTS)
    sinks = sinks_KG[None, :, :, None, None]
    # The sink is finite, so that the largest is finite and rows without a key give 0, not NaN.
    largest = jnp.maximum(scores.max(-1, keepdims=True), sinks)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sinks - largest)
    weights = (weights / total).astype(v_BKSH.dtype).reshape(*q_BKRH.shape[:3], -1)
    out = jnp.einsum("BKRS,BKSH->BKRH", weights, v_BKSH, preferred_element_type=jnp.float32).astype(
        q_BKRH.dtype
    )
    return out, (q_BKRH, k_BKSH, v_BKSH, sinks_KG, visible_BTS, largest + jnp.log(total), out)


def _average_backward(kept, d_out):
    q, k, v, sinks_KG, visible_BTS, norm, out = kept
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    weights = jnp.exp(_scores(q, k, visible_BTS) - norm).reshape(*q.shape[:3], -1)
    d_v = jnp.einsum(
        "BKRS,BKRH->BKSH", weights.astype(dtype), d_out, preferred_element_type=jnp.float32
    )
    d_weights = jnp.einsum("BKRH,BKSH->BKRS", d_out, v, preferred_element_type=jnp.float32)
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (weights * (d_weights - mean) * scale).astype(dtype)
    d_q = jnp.einsum("BKRS,BKSH->BKRH", d_scores, k, preferred_element_type=jnp.float32)
    d_k = jnp.einsum("BKRS,BKRH->BKSH", d_scores, q, preferred_element_type=jnp.float32)
    share = jnp.exp(sinks_KG[None, :, :, None, None] - norm)
    d_sinks = -(share * mean.reshape(norm.shape)).sum((0, 3, 4))
    return (
        d_q.astype(dtype),
        d_k.astype(k.dtype),
        d_v.astype(v.dtype),
        d_sinks.astype(sinks_KG.dtype),
        None,
    )


_average.defvjp(_average_forward, _average_backward)


def _bounded(sinks_KG, window, q, k, v, q_positions, k_positions, extent_B):
    """Attention up to each row's extent. CPUs take one row after another, each no further than it
    reaches; others all rows together, as far as the longest.
    """

    def together(q, k, v, q_positions, k_positions, extent_B):
        return _by_keys(sinks_KG, window, q, k, v, q_positions, k_positions, extent_B.max())

    def apart(q, k, v, q_positions, k_positions, extent_B):
        def one(b, out):
            own = [jax.lax.dynamic_slice_in_dim(x, b, 1) for x in (q, q_positions, k_positions)]
            part = _by_keys(sinks_KG, window, own[0], k, v, own[1], own[2], extent_B[b], b)
            return jax.lax.dynamic_update_slice_in_dim(out, part, b, 0)

        return jax.lax.fori_loop(0, q.shape[0], one, jnp.zeros_like(q))

    rows = q, k, v, q_positions, k_positions, extent_B
    if sharding.current() is not None or q.shape[0] == 1:
        return together(*rows)
    return jax.lax.platform_dependent(*rows, cpu=apart, default=together)


def _by_keys(sinks_KG, window, q_BTKGH, k_BSKH, v_BSKH, q_positions, k_positions, extent, row=None):
    """`_softmax_average` over the blocks of keys before `extent`: sums are scaled as the largest
    score grows (Milakov and Gimelshein 2018, algorithm 3). With `row` the queries are those of this
    row of the keys.
    """
    B, T, K, G, H = q_BTKGH.shape
    S = k_BSKH.shape[1]
    block = min(S, max(KEY_BLOCK, -(-S // KEY_BLOCKS)))
    q_BKRH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    sinks = jnp.broadcast_to(sinks_KG[None, :, :, None, None], (B, K, G, T, 1))

    def body(carry):
        i, largest, total, out = carry
        start = jnp.minimum(i * block, S - block)  # the last block may begin within the one before

        def part(x):
            at = (jnp.int32(0) if row is None else row, start, jnp.int32(0), jnp.int32(0))
            return jax.lax.dynamic_slice(x, at, (B, block, K, H)).transpose(0, 2, 1, 3)

        slots = start + jnp.arange(block, dtype=jnp.int32)
        k_here = jax.lax.dynamic_slice_in_dim(k_positions, start, block, axis=1)
        visible = _visible(q_positions, k_here, window) & (slots >= i * block)[None, None]
        keys, values = part(k_BSKH), part(v_BSKH)
        scores = _scores(q_BKRH, keys, visible)
        new = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights, scale = jnp.exp(scores - new), jnp.exp(largest - new)
        total = total * scale + weights.sum(-1, keepdims=True)
        weights = weights.astype(values.dtype).reshape(B, K, G * T, block)
        added = jnp.einsum("BKRS,BKSH->BKRH", weights, values, preferred_element_type=jnp.float32)
        return i + 1, new, total, out * scale.reshape(B, K, G * T, 1) + added

    # The sink is the first score; it has no value.
    empty = jnp.zeros((B, K, G * T, H), jnp.float32)
    first = jnp.int32(0), sinks, jnp.ones_like(sinks), empty
    _, _, total, out = jax.lax.while_loop(lambda carry: carry[0] * block < extent, body, first)
    out = (out / total.reshape(B, K, G * T, 1)).astype(q_BTKGH.dtype)
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


def _by_blocks(some, q_BTKGH, positions_BT, segments_BT):
    """Runs `some` on blocks of queries one after another, so that only a block's scores are
    held.
    """
    B, T = positions_BT.shape
    count = -(-T // QUERY_BLOCK)

    def split(x, fill):
        pad = [(0, 0), (0, count * QUERY_BLOCK - T)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill).reshape(B, count, QUERY_BLOCK, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    parts = (split(q_BTKGH, 0), split(positions_BT, -1), split(segments_BT, -1))
    out = jax.lax.map(jax.checkpoint(lambda part: some(*part)), parts)
    return jnp.moveaxis(out, 0, 1).reshape(B, count * QUERY_BLOCK, *out.shape[3:])[:, :T]
