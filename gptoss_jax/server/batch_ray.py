"""A batch on a Ray cluster: shards of its requests to actors, each with a model and an engine.

Ray Data starts the actors, hands out the shards, and hands a shard out again when its actor dies;
a shard's answers come as a whole or not at all. Knows Ray; refuses to know files.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptOssError
from gptoss_jax.server.batch_requests import Asked, Requests, settings_of, start_engine

MEMORY = 512 * 2**20  # of a cluster of our own: text needs little
ATTEMPTS = 8  # a shard that has ended so many actors is to blame itself
SIDE_BY_SIDE = 2  # shards of one actor, so that the end of one leaves no slots idle


@dataclasses.dataclass(frozen=True)
class Loading:
    """What every actor loads, and how it answers.

    Attributes:
      source: Hub id or folder, the same on all nodes.
      name: That requests give.
      mesh: Devices of one actor.
      dtype: As in `load`.
      max_context: As in `load`.
      revision: On the Hub.
      offline: As in `load`.
      adapters: Folders by name.
      slots: Of the engine.
      date: That the model is told.
      allow_control_tokens: As in the server's settings.
      fingerprint: That the checkpoint must have.
    """

    source: str
    name: str
    mesh: str | None
    dtype: str | None
    max_context: int | None
    revision: str | None
    offline: bool
    adapters: Mapping[str, str]
    slots: int
    date: str
    allow_control_tokens: bool
    fingerprint: str


Identify = Callable[[Path], str]
"""The fingerprint of a checkpoint's folder."""


class Attempts:
    """Counts how often each shard was begun, as an actor of its own, which outlives the others."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()

    def begin(self, first: str) -> int:
        """One more attempt of the shard whose first request is `first`."""
        self.counts[first] += 1
        return self.counts[first]


class Answerer:
    """One actor: loads once, then answers shards, two side by side.

    What no new attempt would mend is told in the answers, not raised: Ray would try again.

    Args:
      loading: What to load.
      identify: Gives the fingerprint of a checkpoint's folder.
      attempts: Handle of the Attempts.
    """

    def __init__(self, loading: Loading, identify: Identify, attempts: Any):
        self.refusal, self.dtype, self.attempts = "", "", attempts
        try:
            self._load(loading, identify)
        except GptOssError as error:
            self.refusal = str(error)

    def _load(self, loading: Loading, identify: Identify) -> None:
        from gptoss_jax import hub
        from gptoss_jax.loading import load

        folder = hub.resolve(
            loading.source, revision=loading.revision, offline=loading.offline or None
        )
        if identify(folder) != loading.fingerprint:
            raise GptOssError(
                f"{os.uname().nodename} has another content of {loading.source} than the rest: "
                "copy it to all nodes"
            )
        model = load(
            folder,
            mesh=loading.mesh,
            dtype=loading.dtype,
            max_context=loading.max_context,
            adapters=loading.adapters or None,
        )
        model = dataclasses.replace(model, name=loading.name)
        self.dtype = model.params["embedding"].dtype.name
        settings = settings_of(loading.date, loading.allow_control_tokens)
        engine = start_engine(model, loading.slots)
        self.requests = Requests(engine, settings, SIDE_BY_SIDE * loading.slots)

    def __call__(self, shard: Any) -> Any:
        """A table of requests -> a table of answers."""
        import pyarrow
        import ray

        asked = [
            Asked(name, url, body.encode())
            for name, url, body in map(json.loads, shard["line"].to_pylist())
        ]
        first, refusal = asked[0].custom_id, self.refusal
        attempt: Any = ray.get(self.attempts.begin.remote(first))
        if not refusal and attempt > ATTEMPTS:
            refusal = (
                f"actors have ended {ATTEMPTS} times while {len(asked)} requests from {first!r} on "
                "were at work: look at their memory and at Ray's logs; what is answered is kept"
            )
        if refusal:
            return pyarrow.table({"row": [""], "dtype": [""], "refusal": [refusal]})
        rows = [json.dumps(row) for rows in self.requests.answers(asked) for row in rows]
        same = {"dtype": [self.dtype] * len(rows), "refusal": [""] * len(rows)}
        return pyarrow.table({"row": rows, **same})


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Joins a cluster.

    Args:
      address: Of a cluster; "" for that of RAY_ADDRESS, else the one that runs on this machine,
        else one of our own, which ends with us.

    Raises:
      GptOssError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise GptOssError("--ray needs Ray: pip install 'gptoss_jax[ray]'") from None
    _reached(address or os.environ.get("RAY_ADDRESS", ""))
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        ray.init(address or "auto", **quiet)
    except ConnectionError:
        if address or os.environ.get("RAY_ADDRESS"):
            raise _nothing_at(address or os.environ["RAY_ADDRESS"]) from None
        ray.init("local", include_dashboard=False, object_store_memory=MEMORY, **quiet)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _reached(address: str) -> None:
    """Refuses an address where nobody listens; Ray would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError:
        raise _nothing_at(address) from None


def _nothing_at(address: str) -> GptOssError:
    return GptOssError(
        f"no Ray cluster at {address}: start one (ray start --head), or leave the address out"
    )


def resources_of(text: str | None) -> dict[str, float]:
    """What one actor takes of the cluster, from text such as "GPU=1,CPU=4"; by default one GPU, or
    all TPU chips of a host, or one CPU, whichever the cluster has first.
    """
    if text is None:
        import ray

        found = ray.cluster_resources()
        chips = [node["Resources"].get("TPU", 0) for node in ray.nodes() if node["Alive"]]
        if found.get("GPU"):
            return {"GPU": 1}
        return {"TPU": min(filter(None, chips))} if any(chips) else {"CPU": 1}
    out: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            out[name.strip()] = float(number)
        except ValueError:
            out[name.strip()] = math.nan
        if not name.strip() or not 0 < out[name.strip()] < math.inf:
            raise GptOssError(f"--actor-resources {text}: give NAME=NUMBER, such as GPU=1,CPU=4")
    return out


def actors_of(resources: Mapping[str, float]) -> int:
    """How many such actors the cluster holds; without accelerators one on each machine."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if set(resources) == {"CPU"}:
        fitting = [node for node in alive if node.get("CPU", 0) >= resources["CPU"]]
        return max(len(fitting), 1)
    each = [
        min(math.floor(node.get(name, 0) / number) for name, number in resources.items())
        for node in alive
    ]
    return max(sum(each), 1)


def fingerprint(
    source: str, revision: str | None, offline: bool, identify: Identify, resources: Any
) -> str:
    """The fingerprint of a checkpoint, taken where the actors will be."""
    import ray

    def find() -> tuple[str, str]:
        from gptoss_jax import hub

        try:
            return identify(hub.resolve(source, revision=revision, offline=offline or None)), ""
        except GptOssError as error:
            return "", str(error)

    with _told():
        found, refusal = ray.get(ray.remote(**_options(resources))(find).remote())
    if refusal:
        raise GptOssError(refusal)
    return found


def answers(
    asked: Sequence[Asked],
    loading: Loading,
    identify: Identify,
    actors: int,
    resources: Mapping[str, float],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(dtype of the model, answers of one shard) as they come.

    Raises:
      GptOssError: The model cannot be loaded, or an actor's end cannot be mended.
    """
    import pyarrow
    import ray.data

    size = max(1, min(loading.slots, -(-len(asked) // (SIDE_BY_SIDE * actors))))
    lines = (json.dumps([one.custom_id, one.url, one.body.decode()]) for one in asked)
    shards = []
    while shard := list(itertools.islice(lines, size)):
        shards.append(pyarrow.table({"line": shard}))
    strategy = ray.data.ActorPoolStrategy(
        size=min(actors, len(shards)),
        max_concurrent_calls_per_actor=SIDE_BY_SIDE,
        enable_true_multi_threading=True,
    )
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    found = ray.data.from_arrow(shards).map_batches(
        Answerer,
        fn_constructor_args=(loading, identify, attempts),
        compute=strategy,
        batch_size=None,
        batch_format="pyarrow",
        **_options(resources),
    )
    with _told():
        tables: Any = found.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        )
        for table in tables:
            refusals = set(table["refusal"].to_pylist()) - {""}
            if refusals:
                raise GptOssError(refusals.pop())
            yield table["dtype"][0].as_py(), [json.loads(row) for row in table["row"].to_pylist()]


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Resources in Ray's words."""
    words = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    out: dict[str, Any] = {words[name]: n for name, n in resources.items() if name in words}
    own = {name: number for name, number in resources.items() if name not in words}
    return out | ({"resources": own} if own else {})


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What breaks in Ray, in one line."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise GptOssError(
            f"Ray could not go on: {lines[-1] if lines else type(error).__name__}; what is "
            "answered is kept, and the same command goes on from there"
        ) from error
