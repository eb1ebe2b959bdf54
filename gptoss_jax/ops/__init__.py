"""The operations of gpt-oss: the readable reference of each, and the choice of a faster path.

Functions take arrays and numbers, never a config or a parameter path. Arrays carry their axes as
suffix (dims.py).

Precision (x is the activations' dtype, bfloat16 or float32; every product accumulates in float32):

    operation   input          inside   output   follows
    rms_norm    x, scale       float32  x        torch reference: scale multiplied before the cast
    rotate      x              float32  x        triton reference (torch casts cos, sin to bfloat16)
    linear      x, weight x    float32  x        bias added in float32
    attention   x, sinks       float32  x        triton reference: scores, sinks, softmax in float32
    route       x, weight x    float32  float32  selection and softmax on float32 logits
    expert_mlp  x, MXFP4 or x  float32  x        biases, SwiGLU in float32; hidden cast to x between
    LowRank     x, a and b x   float32  float32  peft: added before the cast of what it adds to
    Rounded     MXFP4 or x     float32  x        merging: W + b a in float32, rounded, then cast
    unembed     x, weight x    float32  float32  triton reference: float32 logits
"""

from gptoss_jax.ops.attention import attention as attention
from gptoss_jax.ops.attention_step import attend_one as attend_one
from gptoss_jax.ops.decode import add_linear as add_linear
from gptoss_jax.ops.decode import norm_linears as norm_linears
from gptoss_jax.ops.decode import norm_route as norm_route
from gptoss_jax.ops.embed import embed as embed
from gptoss_jax.ops.linear import LowRank as LowRank
from gptoss_jax.ops.linear import Rounded as Rounded
from gptoss_jax.ops.linear import linear as linear
from gptoss_jax.ops.linear import low_rank_product as low_rank_product
from gptoss_jax.ops.moe import expert_mlp as expert_mlp
from gptoss_jax.ops.moe import route as route
from gptoss_jax.ops.norm import rms_norm as rms_norm
from gptoss_jax.ops.product import product as product
from gptoss_jax.ops.rope import rotate as rotate
from gptoss_jax.ops.rope import rotation as rotation
