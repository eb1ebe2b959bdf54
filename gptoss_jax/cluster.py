"""Which process this is, of how many, and where the first one is: from arguments, the environment
or the cluster that JAX detects.

Opens no connection of its own; knows nothing of models.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax

from gptoss_jax.errors import GptOssError


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among several.

    Attributes:
      address: HOST:PORT of process 0.
      count: Processes.
      index: This one, from 0.
      devices: Local ids of the devices that it takes, None for all.
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}"


def find(
    address: str | None = None, count: int | None = None, index: int | None = None
) -> Place | None:
    """This process's place: what is given, and the rest from the cluster as JAX detects it (Cloud
    TPU, SLURM, Kubernetes Jobs, Open MPI).

    Args:
      address: HOST:PORT of process 0; by default $JAX_COORDINATOR_ADDRESS.
      count: Processes; 1 asks no cluster.
      index: This one.

    Returns:
      The place; None for a process that is alone.

    Raises:
      GptOssError: Some of it is missing or impossible.
    """
    if count == 1 and not index:
        return None
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    devices = None
    if None in (address, count, index):
        detected = _cluster()
        if detected is not None:
            address = address or detected.address
            count = detected.count if count is None else count
            index = detected.index if index is None else index
            devices = detected.devices
    if address is None and count is None and index is None:
        return None
    if address is None or count is None or index is None:
        raise GptOssError(
            f"coordinator address {address}, number of processes {count}, process id {index}: "
            "no cluster was found that knows the rest, give all three (or --num-processes 1)"
        )
    if count == 1:
        return None
    if not 0 <= index < count:
        raise GptOssError(f"process id {index} of {count} processes: expected 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise GptOssError(f"coordinator address {address!r}: expected HOST:PORT of process 0")
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        devices = tuple(map(int, os.environ["JAX_LOCAL_DEVICE_IDS"].split(",")))
    return Place(address, count, index, devices)


def _cluster() -> Place | None:
    """What JAX detects, asked only where there are several processes: its own detection asks a
    metadata server about one TPU host, and counts a SLURM job's tasks in a step of one.
    """
    from jax._src.clusters import ClusterEnv  # no public name; jax.distributed does the same

    environ = os.environ
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    one_tpu_host = bool(workers) and "," not in workers
    slices = environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
    tpus = "tpu" in _platforms() and (slices or not one_tpu_host)
    several = {
        "OmpiCluster": environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1",
        "SlurmCluster": environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
        != "1",
        "GkeTpuCluster": tpus,
        "GceTpuCluster": tpus,
        "K8sCluster": "JOB_COMPLETION_INDEX" in environ,
    }
    for cluster in ClusterEnv._cluster_types:
        if several.get(cluster.__name__) and cluster.is_env_present():
            count = cluster.get_process_count()
            if count == 1:
                return None
            port = environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(300, port)
            local = cluster.get_local_process_id()
            index = cluster.get_process_id()
            return Place(address, count, index, None if local is None else (local,))
    return None


def _platforms() -> Sequence[str]:
    return (jax.config.values["jax_platforms"] or "tpu").split(",")
