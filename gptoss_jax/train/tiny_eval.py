"""What gpt-oss-tiny can do, measured on held-out conversations with the packed model that is
shipped.

Knows conversations and the engine's interface; knows nothing of training.
"""

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import tyro

from gptoss_jax.chat.messages import EFFORTS
from gptoss_jax.chat.parse import parse, well_formed
from gptoss_jax.chat.render import render
from gptoss_jax.train import tiny_phrases as phrases
from gptoss_jax.train.tiny_tasks import KINDS, Conversation, conversation, two_number_sum

BATCH = 64
_NAMES = {
    "sum": "sum, any wording",
    "word": "word problem",
    "chain": "sum of three",
    "turns": "later turn",
    "tool": "function declared, needed or not",
    "result": "answer from its result",
    "json": "JSON answer",
    "talk": "small talk",
    "refuse": "honest refusal",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss eval`."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["-m"])] = None
    """A folder with a checkpoint of gpt-oss-tiny; by default the one in the package."""
    sums: int = 250
    """Sums of two numbers of one to three digits, for each effort and each of + and -."""
    others: int = 200
    """Conversations of every other kind."""
    sampled: int = 2400
    """Conversations of all kinds sampled at temperature 1, for the share of well-formed
    completions."""
    seed: int = 0
    """Of the conversations; those of training have other sums whatever the seed."""
    dtype: str | None = None
    """"float32" or "bfloat16"; by default float32 on a CPU."""
    json: bool = False
    """Print one JSON object instead of a table."""
    misses: int = 0
    """Show this many wrong answers of each row, on stderr."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured share.

    Attributes:
      name: What was asked.
      right: Answers that are right: the same number, JSON value or sentence, on the right channel.
      total: Conversations.
      analysis: Mean number of tokens in the analysis channel.
    """

    name: str
    right: int
    total: int
    analysis: float

    @property
    def share(self) -> float:
        return self.right / self.total


def run(arguments: Arguments) -> None:
    """Measures and prints; see `evaluate`."""
    from gptoss_jax.hub import TINY
    from gptoss_jax.loading import load

    model = load(arguments.model or TINY, dtype=arguments.dtype)
    began = time.time()
    rows = evaluate(model, arguments, lambda text: print(text, file=sys.stderr))
    seconds = round(time.time() - began, 1)
    if arguments.json:
        table = {
            row.name: {"share": row.share, "of": row.total, "analysis_tokens": row.analysis}
            for row in rows
        }
        print(
            json.dumps(
                {"model": model.name, "seed": arguments.seed, "seconds": seconds, "rows": table}
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "held out", "right", "of", "share", "analysis tokens", title=f"{model.name}, {seconds} s"
    )
    for row in rows:
        table.add_row(
            row.name, str(row.right), str(row.total), f"{row.share:.2%}", f"{row.analysis:.1f}"
        )
    Console().print(table)


def evaluate(model, arguments: Arguments, show=lambda text: None) -> list[Row]:
    """Answers held-out conversations and counts the exactly right ones.

    Greedy: sums of two numbers at each effort, then every kind of conversation. At temperature 1:
    the share of completions that are harmony without a fault, stop token included.

    Args:
      model: A loaded model.
      arguments: Sizes and seed.
      show: Called with a line of text for each wrong answer, up to `arguments.misses` a row.

    Returns:
      Rows in the order of the table.
    """
    rows = []
    for effort in EFFORTS:
        talks = [
            two_number_sum(arguments.seed, i, effort, operation)[0]
            for operation in "+-"
            for i in range(arguments.sums)
        ]
        rows.append(_greedy(model, f"sum of two, {effort}", talks, arguments.misses, show))
    for kind in KINDS:
        talks = [
            conversation(arguments.seed, i, evaluation=True, kind=kind)
            for i in range(arguments.others)
        ]
        if kind == "result":
            calls = [
                dataclasses.replace(talk, history=talk.history[:1], reply=talk.history[1:-1])
                for talk in talks
            ]
            rows.append(_greedy(model, "call a function", calls, arguments.misses, show))
        rows.append(_greedy(model, _NAMES[kind], talks, arguments.misses, show))
    asks = phrases.TALK["identity"][0]
    talks = [
        t
        for i in range(20 * len(asks))
        if (t := conversation(arguments.seed, i, evaluation=True, kind="talk")).answer
        == phrases.IDENTITY
    ]
    rows.append(_greedy(model, "who are you", talks[: arguments.others], arguments.misses, show))
    rows.append(_sampled(model, arguments, show))
    return [row for row in rows if row.total]


def _complete(
    model, talks: Sequence[Conversation], temperature: float, seed: int
) -> list[list[int]]:
    """Completions in tokens, with what stopped them, in the order of the conversations."""
    from gptoss_jax.sampling import Sampling

    prompts = [render(talk.history, model.tokenizer, talk.settings) for talk in talks]
    order = sorted(range(len(talks)), key=lambda i: len(prompts[i]))
    out: list[list[int]] = [[] for _ in talks]
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        settings = [Sampling(temperature=temperature, seed=seed + i) for i in part]
        for i, done in zip(
            part, model.generate([prompts[i] for i in part], settings, 256), strict=True
        ):
            out[i] = [*done.tokens, *([done.stop] if isinstance(done.stop, int) else [])]
    return out


def _greedy(model, name: str, talks: Sequence[Conversation], misses: int, show) -> Row:
    right, analysis, shown = 0, 0, 0
    for talk, ids in zip(talks, _complete(model, talks, 0.0, 0), strict=True):
        parsed = parse(ids, model.tokenizer)
        texts = [m.content for m in parsed.messages if m.channel == "analysis"]
        analysis += sum(len(model.tokenizer.encode(text)) for text in texts)
        wanted, last = talk.reply[-1], parsed.messages[-1] if parsed.messages else None
        good = (
            last is not None
            and not parsed.repairs
            and (last.channel, last.recipient) == (wanted.channel, wanted.recipient)
            and _same(last.content, wanted)
        )
        right += good
        if not good and shown < misses:
            shown += 1
            show(f"{name} ({talk.settings.reasoning_effort}): {talk.history[-1].content!r}")
            show(f"  wanted {wanted.content!r}\n  said {model.tokenizer.decode(ids)!r}")
    return Row(name, right, len(talks), analysis / max(1, len(talks)))


def _same(content: str, wanted) -> bool:
    """Equal; JSON as values; a sum in its result (3 + 71 is 71 + 3)."""
    if wanted.content_type is not None:
        try:
            return json.loads(content) == json.loads(wanted.content)
        except ValueError:
            return False
    if " = " in wanted.content:
        return content.rpartition(" = ")[1:] == wanted.content.rpartition(" = ")[1:]
    return content == wanted.content


def _sampled(model, arguments: Arguments, show) -> Row:
    talks = [conversation(arguments.seed, i, evaluation=True) for i in range(arguments.sampled)]
    good, shown, faults = 0, 0, collections.Counter()
    for talk, ids in zip(talks, _complete(model, talks, 1.0, arguments.seed), strict=True):
        fine = well_formed(ids, model.tokenizer)
        good += fine
        faults[talk.kind] += not fine
        if not fine and shown < arguments.misses:
            shown += 1
            show(f"malformed ({talk.kind}): {talk.history[-1].content!r}")
            show(f"  said {model.tokenizer.decode(ids)!r}")
    return Row("well-formed at temperature 1", good, len(talks), 0.0)
