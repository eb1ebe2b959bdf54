"""The network: Flax NNX modules declare the parameters and the computation, plain dicts of arrays
travel.

Outside this file a model is (config, params): a frozen dataclass and a nested dict. They meet at
trace time in `apply`; no NNX object crosses a jit boundary. Knows no files, no text, no sampling.

The parameter tree is a reshape of the released Hugging Face layout (outputs first, gate and up
interleaved):

    embedding VD, norm D, unembedding VD, layers.i.attention {norm D, q NHD, k KHD, v KHD, o DNH,
    *_bias, sinks N}, layers.i.mlp {norm D, router ED, router_bias E, gate_up EFPD, gate_up_bias
    EFP, down EDF, down_bias ED}
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import cache as kv
from gptoss_jax import dims, ops
from gptoss_jax.cache import KVCache
from gptoss_jax.config import SLIDING, GptOssConfig
from gptoss_jax.ops.attention import banded
from gptoss_jax.ops.rope import frequencies
from gptoss_jax.sharding import batch_axes, constrain

Params = dict[str, Any]


class _Declared(nnx.Module):
    """A module whose parameters are declared by letters."""

    def declare(self, config: GptOssConfig, rngs: nnx.Rngs, dtype, **letters: str) -> None:
        """Adds one parameter for each name: norms start at one, biases at zero, the rest normal
        with deviation 0.02.
        """
        for name, axes in letters.items():
            shape = dims.shape(axes, config)
            if name == "norm":
                value = jnp.ones(shape, dtype)
            elif name.endswith("bias"):
                value = jnp.zeros(shape, dtype)
            else:
                value = (0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
            setattr(self, name, nnx.Param(value, dims=axes))


class Attention(_Declared):
    """Grouped-query attention with sinks, sliding or full."""

    norm: nnx.Param
    q: nnx.Param
    q_bias: nnx.Param
    k: nnx.Param
    k_bias: nnx.Param
    v: nnx.Param
    v_bias: nnx.Param
    sinks: nnx.Param
    o: nnx.Param
    o_bias: nnx.Param

    def __init__(self, config: GptOssConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        self.declare(
            config,
            rngs,
            dtype,
            norm="D",
            q="NHD",
            q_bias="NH",
            k="KHD",
            k_bias="KH",
            v="KHD",
            v_bias="KH",
        )
        self.declare(config, rngs, dtype, sinks="N", o="DNH", o_bias="D")

    def __call__(self, x_BTD, span, stored, added):
        """Adds the attention's output to x; returns x and the layer's new (keys, values)."""
        scale, eps = self.norm.get_value(), self.config.rms_norm_eps
        weights, biases = (
            [getattr(self, n + s).get_value() for n in "qkvo"] for s in ("", "_bias")
        )
        letters = "BTD,NHD->BTNH", "BTD,KHD->BTKH", "BTD,KHD->BTKH"
        with jax.named_scope("qkv"):
            if added.keys() & {"q", "k", "v"}:
                norm = ops.rms_norm(x_BTD, scale, eps)
                each = zip(letters, "qkv", weights, biases, strict=False)
                q, k, v = (ops.linear(text, norm, w, b, added.get(n)) for text, n, w, b in each)
            else:
                q, k, v = ops.norm_linears(x_BTD, scale, eps, letters, weights[:3], biases[:3])
        if stored is not None and k.shape[1] == 1:
            out, stored = self._attend_one(q, k, v, span, stored)
        else:
            q, k = ops.rotate(q, *span.rotation), ops.rotate(k, *span.rotation)
            out, stored = self._attend(q, k, v, span, stored)
        with jax.named_scope("o"):
            o = weights[3], biases[3]
            if "o" in added:
                return x_BTD + ops.linear("BTNH,DNH->BTD", out, *o, added["o"]), stored
            return ops.add_linear(x_BTD, out, *o), stored

    def _attend(self, q, k, v, span, stored):
        sinks, window = self.sinks.get_value(), self.window
        positions = span.positions_BT
        if stored is None:
            if window is None or k.shape[1] <= window:
                return ops.attention(
                    q, k, v, sinks, positions, span.known_BT, window, span.segments
                ), None
            return self._band(q, k, v, None, span), None
        keys, values = stored
        size = keys.shape[1]
        if window is None:
            slots = kv.full_slots(span.known_BT, size)
        else:
            slots = kv.ring_slots(span.known_BT, span.length_B, size)
        new = kv.write(keys, k, slots), kv.write(values, v, slots)
        if window is None:
            known = kv.full_positions(span.length_B, size)
            return ops.attention(q, *new, sinks, positions, known, extent_B=span.extent_B), new
        return self._band(q, k, v, stored, span), new

    def _attend_one(self, q, k, v, span, stored):
        """One token: the ring then holds all that the query sees."""
        size, window = stored[0].shape[1], self.window
        if window is None:
            slots, extent = span.before_B, span.extent_B
            known = kv.full_positions(span.length_B, size)
        else:
            slots, extent = span.before_B % size, None
            known = kv.ring_positions(span.length_B, size)
        where = self.sinks.get_value(), span.positions_BT, known, window, extent
        return ops.attend_one(q, k, v, span.rotation, stored, slots, *where, kv.append)

    def _band(self, q, k, v, stored, span):
        """A window over the keys before this call (the ring, or nothing) and this call's own."""
        window, segments = self.window, span.segments
        assert window is not None
        if stored is None:
            pad = [(0, 0), (window, 0)]
            before, keys, values = (
                jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2)) for x in (span.known_BT, k, v)
            )
            before = before.at[:, :window].set(-1)
            if segments is not None:
                segments = segments[0], jnp.pad(segments[1], pad)
        else:
            ring = kv.ring_positions(span.before_B, window)
            if stored[0].shape[1] > window:  # the other slots are for rows that are taken back
                ring = jnp.maximum(kv.last_positions(span.before_B, window), -1)
                stored = tuple(kv.last_of_ring(x, span.before_B, window) for x in stored)
            before = jnp.concatenate([ring, span.known_BT], axis=1)
            keys, values = (
                jnp.concatenate(pair, axis=1) for pair in zip(stored, (k, v), strict=True)
            )
        return banded(
            q, keys, values, self.sinks.get_value(), span.positions_BT, before, window, segments
        )


class Mlp(_Declared):
    """Router and experts."""

    norm: nnx.Param
    router: nnx.Param
    router_bias: nnx.Param
    gate_up: nnx.Param
    gate_up_bias: nnx.Param
    down: nnx.Param
    down_bias: nnx.Param

    def __init__(self, config: GptOssConfig, *, rngs: nnx.Rngs, dtype):
        self.config = config
        self.declare(config, rngs, dtype, norm="D", router="ED", router_bias="E")
        self.declare(
            config, rngs, dtype, gate_up="EFPD", gate_up_bias="EFP", down="EDF", down_bias="ED"
        )

    def __call__(self, x_BTD, added, shares, counted):
        """Adds the experts' output to x, of the `counted` rows; also returns the chosen experts
        int32 [B, T, X], and the router's share of every expert, float32 [B, T, E], if `shares`.
        """
        config, T = self.config, x_BTD.shape[1]
        # a row of the batch is T rows here
        added = {
            name: pair
            if len(pair.gain_BR) == 1
            else pair._replace(gain_BR=jnp.repeat(pair.gain_BR, T, axis=0))
            for name, pair in added.items()
        }
        rows = batch_axes(x_BTD.shape[0])
        norm, weights, experts = ops.norm_route(
            x_BTD.reshape(-1, config.hidden_size),
            self.norm.get_value(),
            config.rms_norm_eps,
            self.router.get_value(),
            self.router_bias.get_value(),
            config.experts_per_token,
            rows,
        )
        out = ops.expert_mlp(
            norm,
            weights,
            experts,
            self.gate_up.get_value(),
            self.gate_up_bias.get_value(),
            self.down.get_value(),
            self.down_bias.get_value(),
            alpha=config.swiglu_alpha,
            limit=config.swiglu_limit,
            rows=rows,
            low_rank=added,
            counted_M=counted,
        )
        routed = experts.reshape(*x_BTD.shape[:2], -1)
        if shares:
            logits = ops.linear(
                "BTD,ED->BTE",
                norm.reshape(x_BTD.shape),
                self.router.get_value(),
                self.router_bias.get_value(),
            )
            routed = routed, jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return x_BTD + out.reshape(x_BTD.shape), routed


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: GptOssConfig, layer: int, *, rngs: nnx.Rngs, dtype):
        self.attention = Attention(config, layer, rngs=rngs, dtype=dtype)
        self.mlp = Mlp(config, rngs=rngs, dtype=dtype)

    def __call__(self, x_BTD, span, stored, added, shares):
        x_BTD, stored = self.attention(x_BTD, span, stored, added.get("attention", {}))
        x_BTD = constrain(x_BTD, "BTD")
        x_BTD, routed = self.mlp(x_BTD, added.get("mlp", {}), shares, span.counted_M)
        return constrain(x_BTD, "BTD"), stored, routed


def _call(layer, span, shares, x_BTD, stored, added):
    return layer(x_BTD, span, stored, added, shares)


class GptOss(_Declared):
    """The whole network; `dims` of every parameter say its axes."""

    embedding: nnx.Param
    norm: nnx.Param
    unembedding: nnx.Param

    def __init__(self, config: GptOssConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.declare(config, rngs, dtype, embedding="VD", norm="D", unembedding="VD")
        self.layers = nnx.List(
            [Block(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_layers)]
        )

    def __call__(self, tokens_BT, span, stored, added, remat, shares):
        """Hidden states [B, T, D] before the unembedding, new (keys, values) a layer, and what
        `Mlp` says of routing a layer.
        """
        x_BTD = ops.embed(tokens_BT, self.embedding.get_value())
        if "embedding" in added:
            x_BTD = _embedded(x_BTD, tokens_BT, added["embedding"])
        x_BTD = constrain(x_BTD, "BTD")
        kept, routed = [], []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                call = functools.partial(_call, layer, span, shares)
                x_BTD, pair, choice = (jax.checkpoint(call) if remat else call)(
                    x_BTD,
                    None if stored is None else stored[i],
                    added.get("layers", {}).get(i, {}),
                )
            kept.append(pair)
            routed.append(choice)
        return ops.rms_norm(x_BTD, self.norm.get_value(), self.config.rms_norm_eps), kept, routed


def _embedded(x_BTD, tokens_BT, low_rank):
    """Embeddings with a low-rank addition: a [R, V], b [D, R]."""
    a, b, gain_BR = low_rank
    h_BTR = (a.T[tokens_BT].astype(jnp.float32) * gain_BR[:, None]).astype(x_BTD.dtype)
    added = jnp.einsum(
        "BTR,DR->BTD", h_BTR, b.astype(x_BTD.dtype), preferred_element_type=jnp.float32
    )
    return (x_BTD.astype(jnp.float32) + added).astype(x_BTD.dtype)


class _Span:
    """Where the tokens of one call stand: positions, lengths before and after, segments,
    rotation.
    """

    def __init__(self, tokens_BT, mask_BT, before_B, config, segments_BT, sparse):
        B, T = tokens_BT.shape
        steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        self.segments = None if segments_BT is None else (segments_BT, segments_BT)
        if segments_BT is not None:
            first = jnp.argmax(segments_BT[:, :, None] == segments_BT[:, None, :], axis=-1).astype(
                jnp.int32
            )
            steps, mask_BT = steps - first, segments_BT > 0
        self.before_B = jnp.zeros(B, jnp.int32) if before_B is None else before_B
        self.positions_BT = self.before_B[:, None] + steps
        count_B = jnp.full(B, T, jnp.int32) if mask_BT is None else mask_BT.sum(1, dtype=jnp.int32)
        self.length_B = self.before_B + count_B
        self.known_BT = (
            self.positions_BT if mask_BT is None else jnp.where(mask_BT, self.positions_BT, -1)
        )
        self.extent_B = self.counted_M = None
        if sparse:
            self.extent_B = jnp.where(count_B > 0, self.length_B, 0)
            self.counted_M = (self.known_BT >= 0).reshape(-1)
        inverse, concentration = frequencies(
            config.head_dim,
            config.rope_theta,
            config.rope_factor,
            config.rope_beta_fast,
            config.rope_beta_slow,
            config.original_context,
        )
        self.rotation = ops.rotation(self.positions_BT, inverse, concentration)


@functools.lru_cache
def skeleton(config: GptOssConfig) -> tuple[Any, Any]:
    """(graphdef, abstract state with `dims`); no arrays, once per config."""
    return nnx.split(nnx.eval_shape(lambda: GptOss(config, rngs=nnx.Rngs(0))), nnx.Param)


def letters(config: GptOssConfig) -> Params:
    """Tree of the parameters' letters, for example ["layers"][0]["attention"]["q"] == "NHD"."""
    state = skeleton(config)[1]
    tree = jax.tree.map(lambda v: v.dims, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(tree)


def init_params(config: GptOssConfig, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters, experts as plain arrays of `dtype`."""
    return nnx.to_pure_dict(
        nnx.state(GptOss(config, rngs=nnx.Rngs(params=key), dtype=dtype), nnx.Param)
    )


def hidden(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    cache: KVCache | None = None,
    *,
    config: GptOssConfig,
    mask: Bool[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    added: Params | None = None,
    remat: bool = False,
    shares: bool = False,
    sparse: bool = False,
) -> tuple[Float[Array, "B T D"], KVCache | None, Any]:
    """Hidden states before the unembedding; arguments as `apply`, and

    Args:
      remat: Keep only the layers' inputs for the backward pass, and compute the rest again.
      shares: Also return the routers' softmax over all experts.
      sparse: Padding and what lies beyond the longest row of the cache cost little, and a token's
        result does not depend on them: for batches of rows that come and go (no gradient).

    Returns:
      [B, T, D], the new cache, and the chosen experts int32 [B, T, layers, X]; with `shares` a pair
      of them and float32 [B, T, layers, E].
    """
    order = None
    if mask is not None and mask.shape[1] > 1:
        # Rows are moved so that their tokens come first: after that every kind of padding is
        # right-padding.
        order = jnp.argsort(~mask, axis=1, stable=True)
        tokens_BT, mask = (jnp.take_along_axis(x, order, axis=1) for x in (tokens_BT, mask))
    before = None if cache is None else cache.length_B
    span = _Span(tokens_BT, mask, before, config, segments, sparse)
    network = nnx.merge(skeleton(config)[0], params)
    stored = None if cache is None else list(zip(cache.keys, cache.values, strict=True))
    x_BTD, kept, routed = network(tokens_BT, span, stored, added or {}, remat, shares)
    if cache is not None:
        cache = kv.constrain(
            KVCache(tuple(k for k, _ in kept), tuple(v for _, v in kept), span.length_B)
        )
    experts = jax.tree.map(lambda *layers: jnp.stack(layers, axis=2), *routed)
    if order is not None:
        back = jnp.argsort(order, axis=1)
        x_BTD = jnp.take_along_axis(x_BTD, back[..., None], axis=1)
        experts = jax.tree.map(
            lambda x: jnp.take_along_axis(x, back[..., None, None], axis=1), experts
        )
    return x_BTD, cache, experts


def unembed(
    params: Params, x: Float[Array, "*batch D"], added: Params | None = None
) -> Float[Array, "*batch V"]:
    """Float32 logits of hidden states; `added` as in `apply`."""
    with jax.named_scope("unembed"):
        rows = "BT"[: x.ndim - 1]
        subscripts = f"{rows}D,VD->{rows}V"
        logits = ops.product(subscripts, x, params["unembedding"])
        if added and "unembedding" in added:
            logits += ops.low_rank_product(subscripts, x, added["unembedding"])
        return constrain(logits, "BTV" if logits.ndim == 3 else "BV")


def apply(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    cache: KVCache | None = None,
    *,
    config: GptOssConfig,
    mask: Bool[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    added: Params | None = None,
) -> tuple[Float[Array, "B T V"], KVCache | None]:
    """The network as a pure function, to be called inside jax.jit.

    Args:
      params: Nested dict of arrays and MxTensors.
      tokens_BT: int32 ids; must be in range (the host checks: JAX would clamp them).
      cache: What came before, or None for whole sequences.
      config: The model.
      mask: False where a token is padding, left or right or anywhere; None for none.
      segments: Segment ids for packed sequences, 0 for padding; only without a cache.
      added: Low-rank additions (`ops.LowRank`) at the paths of the weights they add to, as
        `lora.additions` makes them; None for none.

    Returns:
      float32 logits [B, T, V] (meaningless where the mask is False), and the new cache or None.
    """
    x_BTD, cache, _ = hidden(
        params, tokens_BT, cache, config=config, mask=mask, segments=segments, added=added
    )
    return unembed(params, x_BTD, added), cache


forward = jax.jit(apply, static_argnames=("config",))
