"""What an adapter is once it is read, whatever it was read from."""

import dataclasses

from gptoss_jax.config import GptOssConfig
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import Params

SIZES = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "vocab_size",
)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
      tree: {"a", "b"} of numpy float32 at the paths of the weights it adds to.
      lora: Its scale; of an imported one also ranks and targets, in as far as they are regular.
      source: Where its base came from; "" if it is not known.
      fingerprint: Of its base; "" if it is not known.
    """

    tree: Params
    lora: LoraConfig
    source: str = ""
    fingerprint: str = ""


def size_up(config: GptOssConfig) -> dict[str, int]:
    """The numbers of a config that an adapter depends on."""
    return {name: getattr(config, name) for name in SIZES}
