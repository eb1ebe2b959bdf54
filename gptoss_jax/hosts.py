"""Several processes that are one program: agreeing on values, ending together.

Every process has a wire (a TCP connection) to process 0, made on the coordinator's port before
JAX's own service takes that port over. Over the wires the processes compare their settings before
any of them waits for the others in JAX, process 0 hands values out, and the end of one ends all: at
once, with its reason, where JAX's heartbeats take their timeout and then abort with a stack of C++.
Knows nothing of models; a process that is alone is never touched. Who the processes are is told
(cluster.py finds it).
"""

import atexit
import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from gptoss_jax.cluster import Place
from gptoss_jax.errors import GptOssError

HEARTBEAT_SECONDS = 50  # JAX's own watch: it sees what has frozen, the wires see what has died
LEAVE_SECONDS = 60
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a lost host: 30 s

WELCOME = {"gptoss": "welcome"}


class _Wires:
    """This process's end of the wires; messages are lines of JSON, [kind, value]."""

    def __init__(self, place: Place, sockets: Mapping[int, socket.socket]):
        self.place = place
        self.sockets = dict(sockets)  # process 0: to every other one; others: to process 0
        self.inbox = {peer: queue.Queue() for peer in sockets}
        self.leaving = False
        self.ended = threading.Lock()
        self.listeners = [
            threading.Thread(target=self._listen, args=entry, daemon=True)
            for entry in self.sockets.items()
        ]
        for listener in self.listeners:
            listener.start()

    def gather(self, value: Any) -> list[Any] | None:
        """Every process's value, at process 0; None at the others."""
        if self.place.index:
            self._send(0, "value", value)
            return None
        return [value, *(self.inbox[peer].get() for peer in sorted(self.sockets))]

    def hand_out(self, value: Any) -> Any:
        """Process 0's value, in every process."""
        if self.place.index:
            return self.inbox[0].get()
        for peer in self.sockets:
            self._send(peer, "value", value)
        return value

    def tell(self, reason: str, kind: str = "failed") -> None:
        """Tells the others that this process ends, and why."""
        for peer in self.sockets:
            self._send(peer, kind, reason)

    def go_last(self) -> None:
        """Process 0 waits a little for the others to end: they abort when JAX's service does."""
        end = time.monotonic() + 3
        for listener in self.listeners:
            if self.place.index == 0 and listener is not threading.current_thread():
                listener.join(max(0, end - time.monotonic()))

    def _send(self, peer: int, kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # whoever listens to that wire ends this process
            self.sockets[peer].sendall(_line([kind, value]))

    def _listen(self, peer: int, wire: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), wire, wire.makefile("rb") as lines:
            for line in lines:
                kind, value = json.loads(line)
                if kind in ("failed", "died"):
                    self._end(kind, value)
                    return
                self.leaving |= kind == "refused"
                self.inbox[peer].put(value)
        if not self.leaving:
            self._end("died", f"process {peer} of {self.place.count} has died")

    def _end(self, kind: str, reason: str) -> None:
        """Ends this process, because another one has ended; once."""
        if not self.ended.acquire(blocking=False):
            return
        self.tell(reason, kind)
        if kind == "failed":
            time.sleep(1)  # the same mistake in all processes: let each say it itself
        if self.leaving:
            return
        print(
            f"gptoss: {self.place}: {reason}; the others stop: start all of them again",
            file=sys.stderr,
            flush=True,
        )
        self.go_last()
        os._exit(1)


_wires: _Wires | None = None


def place() -> Place | None:
    """This process's place since `connect`, None if it is alone."""
    return _wires and _wires.place


def speaks() -> bool:
    """Whether this process is the one that talks to the user: process 0, or one that is alone."""
    if _wires is not None:
        return _wires.place.index == 0
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def connect(place: Place, settings: Mapping[str, Any], timeout: float = 300) -> None:
    """Joins the other processes: wires first, then jax.distributed.

    Args:
      place: This process's.
      settings: What must be the same in all of them, JSON.
      timeout: Seconds to wait for the others.

    Raises:
      GptOssError: They did not come, or their number or settings differ.
    """
    global _wires
    end = time.monotonic() + timeout
    _wires = _Wires(place, (_call if place.index else _answer)(place, end))
    compare({"jax": jax.__version__, **settings})
    # With it a SIGTERM is a notice, and the process lives on.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        initialization_timeout=max(30, int(end - time.monotonic())),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=LEAVE_SECONDS,
        cluster_detection_method="deactivate",
    )
    compare({"devices a process": f"{jax.local_device_count()} {jax.default_backend()}"})


def _answer(place: Place, end: float) -> dict[int, socket.socket]:
    """Process 0: waits until every other process has called."""
    port = int(place.address.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    sockets: dict[int, socket.socket] = {}
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise GptOssError(
            f"process 0 cannot take port {port} of {place.address} ({os.strerror(error.errno or 0)}"
            "): choose another port, in all processes"
        ) from None
    with server:
        while len(sockets) < place.count - 1:
            server.settimeout(max(0.001, end - time.monotonic()))
            try:
                wire, caller = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, place.count) if i not in sockets)
                _refuse(
                    sockets.values(),
                    f"{len(sockets) + 1} of {place.count} processes came to {place.address}, "
                    f"missing {missing}: start all with the same --num-processes",
                )
            try:
                wire.settimeout(5)
                index, count = _read(wire)["gptoss"]
                wire.sendall(_line(WELCOME))
            except (OSError, ValueError, KeyError, TypeError):  # a stranger
                wire.close()
                continue
            if count != place.count:
                _refuse(
                    [*sockets.values(), wire],
                    f"process 0 was started as one of {place.count} processes, process {index} "
                    f"as one of {count}: start all with the same --num-processes",
                )
            if index in sockets:
                _refuse(
                    [*sockets.values(), wire],
                    f"two processes were started with --process-id {index} (the second from "
                    f"{caller[0].removeprefix('::ffff:')}): give each its own, 0 to "
                    f"{place.count - 1}",
                )
            sockets[index] = _tuned(wire)
    return sockets


def _refuse(wires: Iterable[socket.socket], reason: str) -> NoReturn:
    for wire in wires:
        with contextlib.suppress(OSError), wire:
            wire.sendall(_line(["refused", reason]))
            wire.shutdown(socket.SHUT_WR)
            wire.settimeout(5)
            while wire.recv(4096):  # closed with something unread, the reason would be lost too
                pass
    raise GptOssError(reason)


def _call(place: Place, end: float) -> dict[int, socket.socket]:
    """Another process: calls process 0 until it answers."""
    host, _, port = place.address.rpartition(":")
    why = "no answer"
    while time.monotonic() < end:
        try:
            wire = socket.create_connection((host.strip("[]"), int(port)), timeout=30)
            try:
                wire.sendall(_line({"gptoss": [place.index, place.count]}))
                if _read(wire) == WELCOME:
                    return {0: _tuned(wire)}
                raise ValueError
            except BaseException:
                wire.close()
                raise
        except OSError as error:
            why = error.strerror or str(error)
        except ValueError:
            why = "another program is there"
        time.sleep(0.2)
    raise GptOssError(
        f"process 0 of {place.count} does not answer at {place.address} ({why}): start it there, "
        "or correct the coordinator address"
    )


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read(wire: socket.socket) -> Any:
    """One line, and not a byte of what follows it."""
    with wire.makefile("rb", buffering=0) as file:
        return json.loads(file.readline(1000))


def _tuned(wire: socket.socket) -> socket.socket:
    wire.settimeout(None)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return wire


def compare(settings: Mapping[str, Any]) -> None:
    """Holds the processes to the same settings.

    Raises:
      GptOssError: In every process, naming what differs.
    """
    problem = _wires and _differs(_wires, settings)
    if problem:
        raise GptOssError(problem)


def _differs(wires: _Wires, settings: Mapping[str, Any]) -> str | None:
    every, problem = wires.gather(dict(settings)), None
    for index, other in enumerate(every or ()):
        for name in {**settings, **other}:
            mine, theirs = settings.get(name), other.get(name)
            if json.dumps(mine) != json.dumps(theirs):
                problem = problem or (
                    f"{name} is {mine!r} in process 0 and {theirs!r} in process {index}: start "
                    "all processes with the same"
                )
    return wires.hand_out(problem)


def same(value: Any) -> Any:
    """Process 0's value in every process; every process has to ask. Without `connect` (somebody
    else called jax.distributed.initialize) over the devices.

    Args:
      value: JSON.
    """
    if _wires is not None:
        return _wires.hand_out(value)
    if not jax.distributed.is_initialized():
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    padded = np.zeros(int(broadcast_one_to_all(np.int32(len(data)))), np.uint8)
    padded[: len(data)] = data[: len(padded)]
    return json.loads(bytes(broadcast_one_to_all(padded)))


def from_first(make: Callable[[], Any]) -> Any:
    """What make() gives in process 0, in every process; the others do not call it.

    Args:
      make: Gives JSON.
    """
    return same(make() if speaks() else None)


@contextlib.contextmanager
def together(place: Place | None, settings: Mapping[str, Any], timeout: float) -> Iterator[None]:
    """Connects; afterwards leaves with the others, or tells them what went wrong here. After an
    exception the interpreter ends without JAX's farewell, which would wait for them.

    Args and errors as `connect`; a place of None does nothing.
    """
    if place is None:
        yield
        return
    try:
        connect(place, settings, timeout)
        yield
        _leave()
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if not isinstance(error, GptOssError | KeyboardInterrupt | SystemExit):
            time.sleep(2)  # the death of a process shows here too: let its listener speak
        if _wires is not None:
            why = "was interrupted" if interrupted else f"failed: {error}"
            _wires.leaving = True
            _wires.tell(f"{place} {' '.join(why.split())}")
        atexit.register(_end_now, 130 if interrupted else 1)
        raise


def _leave() -> None:
    """Ends with the others: nobody goes before all are done."""
    assert _wires is not None
    _wires.gather(None)
    _wires.leaving = not _wires.place.index
    _wires.hand_out(None)
    _wires.leaving = True
    jax.distributed.shutdown()


def _end_now(code: int) -> None:
    if _wires is not None:
        _wires.go_last()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
