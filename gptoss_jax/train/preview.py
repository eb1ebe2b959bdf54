"""What a run would learn, for the eyes: the first samples with the loss marked, lengths, shares,
what was left out.

Knows how to draw. Refuses to know how samples are made. Text of the data is drawn with its control
characters spelled out, so that no sample can steer the terminal.
"""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from gptoss_jax.tokenizer import Tokenizer
from gptoss_jax.train.pipeline import Batches
from gptoss_jax.train.samples import Sample, Samples

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_WIDTH = 40  # of the histogram's longest bar
_SHOWN = 240  # tokens of one stretch before and after what is left out


def show(
    samples: Samples,
    tokenizer: Tokenizer,
    console: "Console | None" = None,
    *,
    count: int = 3,
    batches: Batches | None = None,
) -> None:
    """Prints the first samples and the statistics: what is learnt in green where the console has
    colours, between `[[` and `]]` where it has none. The arguments are those of `describe`."""
    from rich.console import Console

    console = console or Console()
    plain = console.color_system is None or console.no_color
    text = _draw(samples, tokenizer, count, batches, marks=plain)
    console.print(text, soft_wrap=True, highlight=False)


def describe(
    samples: Samples, tokenizer: Tokenizer, *, count: int = 3, batches: Batches | None = None
) -> str:
    """The preview as plain text.

    Args:
      samples: Of `make_samples`.
      tokenizer: Their tokenizer.
      count: How many samples to show.
      batches: Also say how they fill their rows.

    Returns:
      Lines; what is learnt stands between `[[` and `]]`, with its weight (`[[0.5:`) where that is
      not 1.
    """
    return _draw(samples, tokenizer, count, batches, marks=True).plain


def _draw(
    samples: Samples, tokenizer: Tokenizer, count: int, batches: Batches | None, marks: bool
) -> "Text":
    from rich.text import Text

    out = Text()
    for sample in samples.samples[:count]:
        learnt = int(np.count_nonzero(sample.weights))
        out.append(f"{sample.where}: {len(sample):,} tokens, {learnt:,} learnt\n", "bold")
        _draw_sample(out, sample, tokenizer, marks)
        out.append("\n\n")
    out.append("tokens a sample\n", "bold")
    out.append("\n".join(_histogram([len(sample) for sample in samples.samples])) + "\n\n")
    out.append("\n".join(_facts(samples, batches)) + "\n")
    return out


def _draw_sample(out: "Text", sample: Sample, tokenizer: Tokenizer, marks: bool) -> None:
    position = 0
    for weight, run in itertools.groupby(sample.weights.tolist()):
        size = len(list(run))
        text = _stretch(sample.tokens[position : position + size], tokenizer)
        position += size
        if not weight:
            out.append(text, "dim")
        elif marks:
            out.append(f"[[{'' if weight == 1 else f'{weight:g}:'}{text}]]")
        else:
            out.append(text, "green" if weight == 1 else "yellow")


def _stretch(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text of ids, the middle of a long stretch left out."""
    if len(ids) <= 2 * _SHOWN + 20:
        return _printable(tokenizer.decode(ids.tolist()))
    before, after = (
        _printable(tokenizer.decode(part.tolist())) for part in (ids[:_SHOWN], ids[-_SHOWN:])
    )
    return f"{before} ... {len(ids) - 2 * _SHOWN:,} tokens ... {after}"


def _printable(text: str) -> str:
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def _histogram(lengths: list[int]) -> list[str]:
    """One line for every power of two that some length reaches."""
    powers = [max(4, (length - 1).bit_length()) for length in lengths]
    counts = [powers.count(power) for power in range(min(powers), max(powers) + 1)]
    return [
        f"  up to {2**power:>8,}  {number:>8,}  {'#' * round(_WIDTH * number / max(counts))}"
        for power, number in enumerate(counts, min(powers))
    ]


def _facts(samples: Samples, batches: Batches | None) -> list[str]:
    report = samples.report
    lines = [
        f"{report.rows:,} rows -> {report.samples:,} samples, {report.tokens:,} tokens, of which "
        f"{report.supervised:,} ({report.supervised_share:.1%}) are learnt"
    ]
    left_out = {
        "broken rows": report.bad,
        "samples too long": report.too_long,
        "turns with weight 0": report.unsupervised,
    }
    lines.append(
        "left out: "
        + ", ".join(f"{number:,} {what}" for what, number in left_out.items())
        + f" (the longest sample has {report.longest:,} tokens)"
    )
    lines += [f"  {_printable(message)}" for message in report.messages]
    if report.without_reasoning:
        lines.append(
            f"{report.without_reasoning:,} samples have no reasoning: they teach the model to "
            "answer at once"
        )
    if batches is not None:
        settings = batches.settings
        lengths = " or ".join(f"{length:,}" for length in batches.lengths)
        lines.append(
            f"{batches.per_epoch:,} batches an epoch of {settings.batch:,} x {lengths} tokens, "
            f"{batches.fill_share:.1%} of them filled"
        )
    return lines
