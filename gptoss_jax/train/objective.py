"""What training minimises: cross-entropy of supervised tokens, without ever holding all logits.

Knows arrays and adapters; knows no data files, no optimiser.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import lora as low_rank
from gptoss_jax.config import GptOssConfig
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import Params, hidden, unembed
from gptoss_jax.ops.loss import cross_entropy as loss_of
from gptoss_jax.sharding import constrain

CHUNK_BYTES = 1 << 27  # float32 logits held at once


def objective(
    trained: Params,
    frozen: Params | None,
    batch: dict[str, jax.Array],
    *,
    config: GptOssConfig,
    lora: LoraConfig | None,
    remat: bool = True,
    router_loss: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Sum of weighted negative log likelihoods, to be divided by the sum of weights.

    Args:
      trained: The adapter, or for full fine-tuning the parameters.
      frozen: The base of an adapter, experts packed or not; None for full fine-tuning.
      batch: "tokens" int32 [B, T], "segments" int32 [B, T] (0 for padding), "weights" float32 [B,
        T]: of each token as a target; those of a segment's first token are zero.
      config: The model.
      lora: The adapter's; None for full fine-tuning.
      remat: Compute layers again in the backward pass instead of keeping them.
      router_loss: Coefficient of the load-balancing loss; 0 for none.

    Returns:
      The sum, and "weight" (sum of weights), "loss" (the sum without the router's part), "load"
      [layers, E] (tokens that chose each expert).
    """
    params = trained if lora is None else frozen
    assert params is not None
    added = None if lora is None else low_rank.additions(trained, lora)
    tokens_BT, segments_BT = batch["tokens"], batch["segments"]
    x_BTD, _, routed = hidden(
        params,
        tokens_BT,
        config=config,
        segments=segments_BT,
        added=added,
        remat=remat,
        shares=bool(router_loss),
    )
    # position t predicts token t + 1
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    weights_BT = jnp.roll(batch["weights"], -1, axis=1).at[:, -1].set(0.0)
    loss = cross_entropy(params, x_BTD, targets_BT, weights_BT, added)
    known_BT = (segments_BT > 0).astype(jnp.float32)
    weight = weights_BT.sum()
    experts_BTLX, shares_BTLE = routed if router_loss else (routed, None)
    load_LE = expert_load(experts_BTLX, known_BT, config.num_experts)
    total = loss
    if shares_BTLE is not None:
        balance = balance_loss(load_LE, shares_BTLE, known_BT)
        total = loss + router_loss * weight * balance
    return total, {"loss": loss, "weight": weight, "load": load_LE}


def expert_load(
    experts_BTLX: Int[Array, "B T L X"], known_BT: Float[Array, "B T"], experts: int
) -> Float[Array, "L E"]:
    """Tokens that chose each expert of each layer, padding not counted."""
    chosen = jax.nn.one_hot(experts_BTLX, experts, dtype=jnp.float32).sum(3)
    return jnp.einsum("BTLE,BT->LE", chosen, known_BT)


def balance_loss(
    load_LE: Float[Array, "L E"],
    shares_BTLE: Float[Array, "B T L E"],
    known_BT: Float[Array, "B T"],
) -> Float[Array, ""]:
    """E sum_e f_e P_e over all layers' tokens together: f_e the choices of expert e a token, P_e
    its mean share in the routers' softmax.

    Source: transformers load_balancing_loss_func (Fedus et al., Switch Transformers, 2021, section
    2.2).
    """
    L, E = load_LE.shape
    tokens = known_BT.sum() * L
    chosen_E = jax.lax.stop_gradient(load_LE.sum(0)) / tokens
    share_E = jnp.einsum("BTLE,BT->E", shares_BTLE, known_BT) / tokens
    return E * (chosen_E * share_E).sum()


def cross_entropy(
    params: Params,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    added: Any = None,
) -> Float[Array, ""]:
    """sum weights (logsumexp(logits) - logits[target]) in float32, chunk by chunk.

    Supervised positions are moved to the front, and chunks without any are skipped. A chunk's
    gradient is taken while its logits are there, so that they are computed once.

    Args:
      params: With "unembedding".
      x_BTD: Hidden states.
      targets_BT: int32.
      weights_BT: float32, 0 where nothing is to be learnt; they have no gradient.
      added: As in `model.apply`.
    """
    head = {"unembedding": params["unembedding"]}, {}
    if added and "unembedding" in added:
        head[1]["unembedding"] = added["unembedding"]
    return _summed(head, x_BTD, targets_BT, weights_BT)


@jax.custom_vjp
def _summed(head, x_BTD, targets_BT, weights_BT):
    def one(*chunk):
        return _loss(head, *chunk), ()

    return _by_chunks(one, len(head[0]["unembedding"]), x_BTD, targets_BT, weights_BT)[0]


def _summed_forward(head, x_BTD, targets_BT, weights_BT):
    """The sum, and its gradients for x and for what of the head is not frozen."""
    leaves, tree = jax.tree.flatten(head, is_leaf=lambda x: hasattr(x, "perturbed"))
    moving = [leaf.value for leaf in leaves if leaf.perturbed]

    def loss(moving, *chunk):
        of = iter(moving)
        whole = [next(of) if leaf.perturbed else leaf.value for leaf in leaves]
        return _loss(tree.unflatten(whole), *chunk)

    def one(*chunk):
        value, (to_head, to_x) = jax.value_and_grad(loss, argnums=(0, 1))(moving, *chunk)
        return (value, to_head), to_x

    vocabulary = leaves[0].value.shape[0]
    given = (x.value for x in (x_BTD, targets_BT, weights_BT))
    (total, to_head), to_x = _by_chunks(one, vocabulary, *given)
    of = iter(to_head)
    return total, (tree.unflatten([next(of) if leaf.perturbed else None for leaf in leaves]), to_x)


def _summed_backward(kept, gradient):
    to_head, to_x = jax.tree.map(lambda x: (x.astype(jnp.float32) * gradient).astype(x.dtype), kept)
    return to_head, to_x, None, None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _loss(head, x_BTD, targets_BT, weights_BT):
    logits = unembed(head[0], constrain(x_BTD, "BTD"), head[1])
    return loss_of(logits, targets_BT, weights_BT)


def _by_chunks(one, vocabulary, x_BTD, targets_BT, weights_BT):
    """one(x, targets, weights) of chunks of positions: its first result summed, its second
    [B, T, ...].
    """
    B, T = targets_BT.shape
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    size = min(T, max(8, rows // B))  # positions of each sequence in a chunk
    if size == T:
        return one(x_BTD, targets_BT, weights_BT)
    order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True)

    def moved(x, order_BT):
        order = jnp.expand_dims(order_BT, tuple(range(2, x.ndim)))
        return jnp.take_along_axis(x, order, axis=1)

    def chunks(x):
        x = jnp.pad(moved(x, order_BT), [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    def none(*chunk):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *chunk))

    def step(sums, chunk):
        more, rows = jax.lax.cond((chunk[2] != 0).any(), one, none, *chunk)
        return jax.tree.map(jnp.add, sums, more), rows

    given = tuple(map(chunks, (x_BTD, targets_BT, weights_BT)))
    sums, rows = jax.lax.scan(step, none(*(x[0] for x in given))[0], given)
    back_BT = jnp.argsort(order_BT, axis=1)

    def whole(x):
        return moved(jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], back_BT)

    return sums, jax.tree.map(whole, rows)
