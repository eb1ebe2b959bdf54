"""A verb run by several processes at once: the same command in each, and only process 0 speaks."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

from gptoss_jax.cli.loading import ModelArguments, note

# Where a process stands may differ between processes; all other options may not.
OWN = {"coordinator_address", "num_processes", "process_id", "initialization_timeout"}


@contextlib.contextmanager
def together(verb: str, arguments: Any) -> Iterator[None]:
    """Runs its body with the other processes that there are; alone for verbs without a model.

    Args:
      verb: As typed.
      arguments: Its options; the group `model` says where this process stands.

    Raises:
      GptOssError: The others did not come, or were started with something else.
    """
    model = getattr(arguments, "model", None)
    if not isinstance(model, ModelArguments):
        yield
        return
    from gptoss_jax import __version__, cluster, hosts

    place = cluster.find(model.coordinator_address, model.num_processes, model.process_id)
    if place is None:
        yield
        return
    settings = {"gptoss_jax": __version__, "the verb": verb, **options(arguments)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(hosts.together(place, settings, model.initialization_timeout))
        stack.enter_context(_stdout_of_one(hosts.speaks()))
        import jax

        note(f"{place.count} processes, {jax.device_count()} devices, coordinator {place.address}")
        yield


@contextlib.contextmanager
def _stdout_of_one(speaks: bool) -> Iterator[None]:
    """Leaves stdout to Python's prints of one process: Gloo's C++ writes there in all of them."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        with open(kept if speaks else nowhere, "w", encoding="utf-8", closefd=False) as ours:
            with contextlib.redirect_stdout(ours):
                yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def options(arguments: Any) -> dict[str, Any]:
    """Options by their flags, those of groups too, that have to be the same in all processes."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if dataclasses.is_dataclass(value):
            found |= options(value)
        elif field.name not in OWN:
            plain = value is None or isinstance(value, str | int | float)
            found[f"--{field.name.replace('_', '-')}"] = value if plain else str(value)
    return found
