"""Settings of a fine-tuning run: frozen dataclasses, and which of them a run cannot change.

Knows names and values; knows no arrays and no files.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from gptoss_jax.errors import GptOssError
from gptoss_jax.lora import LoraConfig
from gptoss_jax.train.samples import SampleSettings

Schedule = Literal["cosine", "linear", "constant"]
LOGS = ("tensorboard", "wandb", "trackio")


def _within(name: str, value: Any, least: float, end: float, words: str, low: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < end or (low and value == least):
        raise GptOssError(f"{name} is {value!r}: expected {words}")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GptOssError(f"{name} is {value!r}: expected a whole number of {least} or more")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW, and how its rate goes.

    Attributes:
      learning_rate: The peak. 2e-4 suits LoRA, a tenth of it full fine-tuning.
      schedule: After the warm-up: "cosine" or "linear" down to `final_share` at the last step, or
        "constant".
      warmup: Of the rate from 0, linear: steps, or below 1 a share of all steps.
      final_share: Of the peak, what is left at the end.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled; of matrices, never of biases, norms and sinks.
      clip: Longest gradient, as the norm over all parameters; 0 for no limit.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    final_share: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        _within("learning_rate", self.learning_rate, 0, math.inf, "a positive number", low=True)
        if self.schedule not in ("cosine", "linear", "constant"):
            raise GptOssError(f"schedule {self.schedule!r}: use cosine, linear or constant")
        _within("warmup", self.warmup, 0, math.inf, "0 or more steps, or a share below 1")
        _within("final_share", self.final_share, 0, 1.0000001, "0 to 1")
        _within("b1", self.b1, 0, 1, "0 to below 1")
        _within("b2", self.b2, 0, 1, "0 to below 1")
        _within("eps", self.eps, 0, math.inf, "a positive number", low=True)
        _within("weight_decay", self.weight_decay, 0, math.inf, "0 or more")
        _within("clip", self.clip, 0, math.inf, "0 or more")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything about a run but model, data and place.

    Attributes:
      lora: What the adapter adds to; None trains the model's own parameters, in float32 beside a
        copy of the model's type, which is what they are computed in.
      frozen: Without an adapter: names or patterns of parameters that stay as they are, such as
        "router*", "sinks", "norm", "embedding".
      unpack: Without an adapter: make arrays of MXFP4 experts, four times their size.
      optimizer: AdamW's.
      data: How conversations are rendered and what of them is learnt; samples longer than `length`
        are left out and counted.
      steps: Updates; None for `epochs` over the data.
      epochs: Times that all data come.
      batch_size: Rows that are computed at once, over all devices.
      accumulate: Times that batch_size rows come before an update.
      length: Tokens of a row.
      packing: Several samples a row; otherwise one, in rows of up to four lengths.
      seed: Of the adapter's first values, the order of the data, the split and the previews.
      remat: Compute layers again in the backward pass instead of keeping them.
      router_loss: Coefficient of the load-balancing loss; the released config's 0.9 is for
        pre-training.
      bad_steps: Updates in a row without a finite gradient that end the run; one is skipped.
      eval_share: Share of the rows that is held out, where no evaluation data is given.
      eval_every: Steps between evaluations; one comes before the first and after the last step too.
      patience: Evaluations without a lower loss that end the run; 0 for never.
      result: What becomes the adapter: that of the last step, or of the best evaluation.
      sample_every: Steps between sample generations; 0 for none.
      sample_count: How many prompts, of the evaluation data or else the training data.
      sample_tokens: Most tokens of a sample generation.
      save_every: Steps between checkpoints.
      keep: Latest checkpoints that are kept, the best besides.
      log: Where metrics go besides metrics.jsonl: "tensorboard", "wandb", "trackio".
    """

    lora: LoraConfig | None = dataclasses.field(default_factory=LoraConfig)
    frozen: tuple[str, ...] = ()
    unpack: bool = False
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    data: SampleSettings = dataclasses.field(default_factory=SampleSettings)
    steps: int | None = None
    epochs: int = 1
    batch_size: int = 1
    accumulate: int = 8
    length: int = 2048
    packing: bool = True
    seed: int = 0
    remat: bool = True
    router_loss: float = 0.0
    bad_steps: int = 10
    eval_share: float = 0.0
    eval_every: int = 50
    patience: int = 0
    result: Literal["last", "best"] = "last"
    sample_every: int = 0
    sample_count: int = 3
    sample_tokens: int = 128
    save_every: int = 50
    keep: int = 3
    log: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "eval_every", "save_every", "keep"):
            _whole(name, getattr(self, name), 1)
        for name in ("bad_steps", "sample_count", "sample_tokens"):
            _whole(name, getattr(self, name), 1)
        for name in ("patience", "sample_every", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        _whole("length", self.length, 2)
        _within("eval_share", self.eval_share, 0, 1, "0 to below 1")
        _within("router_loss", self.router_loss, 0, math.inf, "0 or more")
        if self.result not in ("last", "best"):
            raise GptOssError(f"result {self.result!r}: use last or best")
        for name in self.log:
            if name not in LOGS:
                raise GptOssError(f"log {name!r}: use {', '.join(LOGS)}")
        if self.lora is not None and (self.frozen or self.unpack):
            name = "frozen" if self.frozen else "unpack"
            raise GptOssError(f"{name} is for full fine-tuning: an adapter changes no parameter")

    @property
    def rows(self) -> int:
        """Rows of an update."""
        return self.batch_size * self.accumulate


# What a run may be continued with, though it was begun with something else. batch_size and
# accumulate count by their product.
_FREE = {
    *("steps", "epochs", "batch_size", "accumulate", "remat", "bad_steps", "eval_every"),
    *("patience", "result", "sample_every", "sample_count", "sample_tokens", "save_every"),
    *("keep", "log", "unpack"),
}


def identity(settings: Settings) -> dict[str, Any]:
    """What has to stay the same for a run to be the same run: field -> JSON."""
    found: dict[str, Any] = {"full": settings.lora is None}
    groups = {"lora": settings.lora, "optimizer": settings.optimizer, "data": settings.data}
    for group in groups.values():
        for name, value in (dataclasses.asdict(group) if group else {}).items():
            if name not in ("skip_bad", "max_length"):  # the samples themselves are compared
                found[name] = list(value) if isinstance(value, tuple) else value
    for field in dataclasses.fields(settings):
        if field.name not in {*groups, *_FREE}:
            value = getattr(settings, field.name)
            found[field.name] = list(value) if isinstance(value, tuple) else value
    found["batch_size times accumulate"] = settings.rows
    return found


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuses to continue a run with something else.

    Args:
      saved: The run's identity.
      now: This call's.
      where: The run, for the message.

    Raises:
      GptOssError: Naming the first field that differs, and how many more do.
    """
    names = [n for n in {**now, **saved} if saved.get(n) != now.get(n)]
    if names:
        name, more = names[0], f" ({len(names) - 1} more differ)" if names[1:] else ""
        raise GptOssError(
            f"{where} was made with {name} {saved.get(name)!r}, now it is {now.get(name)!r}{more}: "
            "continue with the same, give another output, or restart to begin anew (--restart)"
        )
