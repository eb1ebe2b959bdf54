"""How far a run is: a bar in a terminal, one line that changes in a notebook, a line now and then
elsewhere.

Knows numbers; knows no training.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

EVERY = 10.0  # seconds between lines where there is nothing to redraw


class Progress:
    """Shows a run on stderr, or in the notebook's cell.

    Args:
      total: Steps.
      done: Of them done by earlier runs.
      hidden: Show nothing.
    """

    def __init__(self, total: int, done: int, hidden: bool = False):
        self.total, self.done, self.first, self.hidden = total, done, done, hidden
        self._bar: Any = None
        self._cell: Any = None
        self._started = self._spoke = time.perf_counter()
        self._eval = ""

    def __enter__(self) -> "Progress":
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        if self.hidden:
            return self
        if _in_notebook():
            self._cell = _cell("starting (the first step compiles)")
        elif self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            left = TimeRemainingColumn(compact=True)
            self._bar = Bar(
                *columns, TextColumn("{task.fields[text]}"), left, console=self._console
            )
            self._bar.add_task("training", total=self.total, completed=self.done, text="compiling")
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done."""
        self.done = row["step"]
        if "compile_seconds" in row:  # which says nothing about the steps to come
            self._started, self.first = time.perf_counter() - row["seconds"], self.done - 1
        text = f"loss {row['loss']:.4f}{self._eval}, {row['tokens_per_second']:,.0f} tokens/s"
        if row["skipped"]:
            text += f", {row['skipped']} skipped"
        self._show(text)

    def evaluated(self, loss: float) -> None:
        """An evaluation is done."""
        self._eval = f" (held out {loss:.4f})"
        self.say(f"step {self.done}: held-out loss {loss:.4f}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.hidden:
            return
        if self._cell is not None:
            print(text)
        elif self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, text: str) -> None:
        now = time.perf_counter()
        if self.hidden:
            return
        if self._bar is not None:
            self._bar.update(0, completed=self.done, text=text)
            return
        spent, made = now - self._started, self.done - self.first
        left = spent / max(1, made) * (self.total - self.done)
        line = f"step {self.done}/{self.total}: {text}, {left // 60:.0f} min {left % 60:.0f} s left"
        if self._cell is not None:
            if now - self._spoke > 0.2 or self.done == self.total:
                self._spoke = now
                self._cell.update({"text/plain": line}, raw=True)
        elif made == 1 or now - self._spoke > EVERY or self.done == self.total:
            self._spoke = now
            self.say(line)


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython")
    shell = shell and shell.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _cell(text: str) -> Any:
    """An output of the cell that can be replaced; needs no widgets."""
    import importlib

    display = importlib.import_module("IPython.display").display
    return display({"text/plain": text}, raw=True, display_id=True)
