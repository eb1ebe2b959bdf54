"""Checkpoints of a run: written beside the training, there whole or not at all, the last ones and
the best kept.

Knows trees, JSON and Orbax; knows no model and no data.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gptoss_jax.checkpoint.stored import is_full
from gptoss_jax.errors import GptOssError

STATE, POSITION = "state", "position"


class Checkpoints:
    """The checkpoints in a folder, each named by its step.

    Args:
      folder: Made if it is not there; what an interrupted save left is removed.
      keep: How many of the latest stay.

    Attributes:
      best: Step that stays besides, or None.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        self.best: int | None = None
        self._keep = keep
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())  # the writing threads log too
        with _quiet():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LastAndBest(self),
                    cleanup_tmp_directories=True,
                    create=True,
                ),
                item_names=(STATE, POSITION),
            )

    @property
    def steps(self) -> list[int]:
        """Steps of whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, position: dict[str, Any], wait: bool = False) -> None:
        """Saves; arrays are copied at once, and written while the caller goes on.

        Args:
          step: Its name.
          state: Tree of arrays.
          position: JSON beside it.
          wait: Return only when it is on the disk.

        Raises:
          GptOssError: This one or the one before could not be written; those before are whole.
        """
        with self._explained():
            items = {STATE: ocp.args.StandardSave(state), POSITION: ocp.args.JsonSave(position)}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if wait:
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Until everything is on the disk; raises as `save`."""
        with self._explained():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises as `save` if writing has failed since."""
        with self._explained():
            self._manager.check_for_errors()

    def position(self, step: int) -> dict[str, Any]:
        """The JSON of a checkpoint."""
        items = {POSITION: ocp.args.JsonRestore()}
        with self._readable(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))[POSITION]

    def restore(self, step: int, like: Any) -> Any:
        """The state of a checkpoint, as arrays that may be donated.

        Args:
          step: Which.
          like: Tree of arrays or jax.ShapeDtypeStruct with the shardings that are wanted, which may
            be others than it was saved with.

        Raises:
          GptOssError: It is damaged, or of another shape.
        """
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items = {STATE: ocp.args.StandardRestore(shapes)}
        with self._readable(step):
            found = self._manager.restore(step, args=ocp.args.Composite(**items))[STATE]
        # Orbax's arrays may share memory with what it read: copies are ours alone (jax#18617)
        return jax.tree.map(jnp.copy, found)

    def close(self) -> None:
        """Ends the writing threads; what they still write is waited for."""
        with contextlib.suppress(Exception), _quiet():
            self._manager.close()
        self._quiet.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except Exception as error:
            whole = self._whole()
            left = f"the checkpoint of step {whole[-1]} is whole" if whole else "there is none yet"
            what = "the disk is full" if is_full(error) else f"{type(error).__name__}: {error}"
            raise GptOssError(
                f"{self.folder}: a checkpoint could not be written ({what}); {left}: "
                "make room, then the same command continues from there"
            ) from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except Exception as error:
            others = [str(s) for s in self._whole() if s != step]
            before = f" (others: {', '.join(others)})" if others else ""
            raise GptOssError(
                f"{self.folder / str(step)}: the checkpoint cannot be read "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): remove it to "
                f"continue from an earlier one{before}"
            ) from error

    def _whole(self) -> list[int]:
        """Steps on the disk, whatever the manager believes after a failure."""
        with contextlib.suppress(Exception), _quiet():
            return sorted(ocp.utils.checkpoint_steps(self.folder))
        return []


class _LastAndBest:
    """Orbax's preservation policy: the latest `keep`, and the best."""

    def __init__(self, owner: Checkpoints):
        self._owner = owner

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        last = len(checkpoints) - self._owner._keep
        return [i >= last or c.step == self._owner.best for i, c in enumerate(checkpoints)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs tracebacks of what it raises, and the writes that fail after the first come back
    to an event loop that it has closed.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)

    def heard(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            hook(found)

    sys.unraisablehook = heard
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
