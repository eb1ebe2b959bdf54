"""Which back end computes an operation: the one place where it is chosen.

    xla    the reference: plain jnp, everywhere, and the definition of the operation
    cpu    gptoss_jax/kernels/cpu
    tpu    gptoss_jax/kernels/tpu
    gpu    gptoss_jax/kernels/gpu

By itself an operation takes the back end of the platform that it is compiled for, where that back
end takes these shapes, and else the reference; the log says why, once. A back end can be forced by
name, for all operations or for some: `with backends.use("xla")`, `backends.use(experts="xla")`, or
GPTOSS_KERNELS="experts=xla,attention=xla". A forced one that cannot compute raises.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from gptoss_jax.errors import GptOssError

log = logging.getLogger(__name__)
REFERENCE = "xla"
BACKENDS = (REFERENCE, "cpu", "tpu", "gpu")
OPERATIONS = ("embed", "product", "experts", "attention", "store")
VARIABLE = "GPTOSS_KERNELS"

# Part of jax.jit's key: a choice made while tracing must not be found again under another one.
_forced: Any = jax.make_user_context(())
_target: Any = jax.make_user_context(None)


class Backend(NamedTuple):
    """A back end of one operation.

    Attributes:
      call: Takes the operation's arrays.
      why_not: Why it cannot compute these; None if it can.
    """

    call: Callable[..., Any]
    why_not: str | None


@contextlib.contextmanager
def use(everywhere: str | None = None, **operations: str) -> Iterator[None]:
    """Forces back ends by name inside a with statement.

    Args:
      everywhere: For all operations.
      **operations: For single ones: embed, product, experts, attention, store.

    Raises:
      GptOssError: There is no such operation or back end.
    """
    chosen = dict(_forced.value)
    chosen |= {name: everywhere for name in OPERATIONS if everywhere} | operations
    _check(chosen)
    with _forced(tuple(sorted(chosen.items()))):
        yield


def run(
    operation: str, reference: Callable[..., Any], others: Mapping[str, Backend], *arrays
) -> Any:
    """Computes an operation by the back end that is forced, or that the platform has.

    Args:
      operation: One of OPERATIONS.
      reference: The definition.
      others: Back ends by the name of their platform.
      *arrays: Pytrees; which of them are there may not depend on the back end.

    Raises:
      GptOssError: The forced back end cannot compute these.
    """
    forced = _wanted(operation)
    if forced == REFERENCE:
        return reference(*arrays)
    if forced is not None:
        backend = others.get(forced, Backend(reference, f"there is none for {operation}"))
        if backend.why_not is not None:
            raise GptOssError(
                f"the back end {forced!r} is forced for {operation} and cannot compute it: "
                f"{backend.why_not}; force 'xla', or none"
            )
        return backend.call(*arrays)
    name = platform()
    backend = others.get(name)
    if backend is None:
        return reference(*arrays)
    if backend.why_not is not None:
        _say(operation, name, backend.why_not)
        return reference(*arrays)
    return backend.call(*arrays)


def platform() -> str:
    """The platform that a program which is traced now is for, "cpu", "tpu" or "gpu": what
    `compiling_for` says, else that of the context's mesh, else that of the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.values["jax_default_device"]
    name = _target.value or getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """States for which platform programs are traced inside a with statement, where no mesh tells:
    "cpu", "tpu" or "gpu".
    """
    with _target(platform):
        yield


@functools.cache
def _say(operation: str, name: str, why: str) -> None:
    log.info("%s: XLA computes it, not the back end %r: %s", operation, name, why)


def _wanted(operation: str) -> str | None:
    inside = dict(_forced.value).get(operation)
    return inside or _from_environment(os.environ.get(VARIABLE, "")).get(operation)


@functools.cache
def _from_environment(text: str) -> dict[str, str]:
    """ "experts=xla,product=cpu", or one name for all operations."""
    chosen = {}
    for part in filter(None, text.split(",")):
        name, equals, backend = part.strip().partition("=")
        chosen |= {name: backend} if equals else dict.fromkeys(OPERATIONS, name)
    _check(chosen)
    return chosen


def _check(chosen: Mapping[str, str]) -> None:
    for operation, backend in chosen.items():
        if operation not in OPERATIONS or backend not in BACKENDS:
            raise GptOssError(
                f"no back end {backend!r} for {operation!r}: operations are "
                f"{', '.join(OPERATIONS)}, back ends {', '.join(BACKENDS)}"
            )
