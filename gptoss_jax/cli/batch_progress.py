"""How far a batch run is, on stderr: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

EVERY, FIRST = 10.0, 60.0  # seconds between lines where stderr is no terminal


class Progress:
    """Counts and shows prompts answered, tokens a second, and the time left.

    Args:
      total: Prompts.
      done: Of them answered by earlier runs.
      hidden: Only count.
    """

    def __init__(self, total: int, done: int, hidden: bool = False):
        self.total, self.before, self.hidden = total, done, hidden
        self.now, self.seen, self.made, self.prompt = 0, 0, 0, 0
        self.seconds, self.started, self.spoke = 0.0, 0.0, 0.0
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.started = self.spoke = time.perf_counter()
        self.console = Console(stderr=True, highlight=False)
        if self.console.is_terminal and not self.hidden:
            speed = TextColumn("{task.fields[speed]:,.0f} tokens/s")
            left = TimeRemainingColumn(compact=True)
            columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), speed, left)
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.bar.add_task("", total=self.total, completed=self.before, speed=0.0)
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.perf_counter() - self.started
        if self.bar is not None:
            self.bar.stop()

    def tokens(self, new: int) -> None:
        """`new` tokens have come."""
        self.seen += new
        self._show()

    def answered(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """A batch is in the output."""
        self.now += len(rows)
        self.made += sum(row.get("completion_tokens", 0) for row in rows)
        self.prompt += sum(row.get("prompt_tokens", 0) for row in rows)
        self.seen = self.made
        self._show()

    def _show(self) -> None:
        now, done = time.perf_counter(), self.before + self.now
        passed = now - self.started
        if self.bar is not None:
            self.bar.update(0, completed=done, speed=self.seen / passed)
        elif not self.hidden and now - self.spoke > (EVERY if self.now else FIRST):
            self.spoke = now
            text = f"{done}/{self.total} answered, {self.seen / passed:,.0f} tokens/s"
            if self.now:
                left = passed * (self.total - done) / self.now
                text += f", {left // 60:.0f} min {left % 60:.0f} s left"
            self.console.print(text, soft_wrap=True)

    def summary(self) -> dict[str, Any]:
        """What this run did."""
        return {
            "prompts": self.total,
            "answered": self.now,
            "answered_before": self.before,
            "prompt_tokens": self.prompt,
            "completion_tokens": self.made,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.made / self.seconds, 1) if self.seconds else 0.0,
        }
