"""Held-out accuracy of gpt-oss-tiny: sums, tools, JSON, identity, and the share of well-formed
harmony.
"""

from gptoss_jax.train.tiny_eval import Arguments as Arguments
from gptoss_jax.train.tiny_eval import run as run
