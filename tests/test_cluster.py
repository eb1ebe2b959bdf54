"""Which process this is: arguments, and the environment variables of clusters as they document them."""

import os

import hosts_program
import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster as tpu

from gptoss_jax import cluster
from gptoss_jax.cluster import Place
from gptoss_jax.errors import GptOssError

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.mark.parametrize(
    ("environ", "given", "expected"),
    [
        ({}, (None, None, None), None),
        ({}, ("10.0.0.1:99", 2, 1), Place("10.0.0.1:99", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a:9"}, (None, 2, 0), Place("a:9", 2, 0)),
        ({"JAX_LOCAL_DEVICE_IDS": "2,3"}, ("a:9", 2, 0), Place("a:9", 2, 0, (2, 3))),
        (SLURM, (None, None, None), Place("node003:61441", 2, 1, (0,))),
        (SLURM, (None, 1, None), None),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (None, None, None), None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (None, None, None), None),
        ({**SLURM, "JAX_COORDINATOR_PORT": "7"}, (None, None, None), Place("node003:7", 2, 1, (0,))),
        (OMPI, (None, None, None), Place("10.96.0.1:62624", 4, 2, (1,))),
        # Colab, Kaggle: one host, no metadata server; a pod that is no indexed Job
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, (None, None, None), None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (None, None, None), None),
    ],
)  # fmt: skip
def test_places(monkeypatch, environ, given, expected):
    for name in list(os.environ):
        if name.startswith(hosts_program.CLUSTERS) and name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cluster.find(*given) == expected


def test_a_tpu_slice_of_several_hosts(monkeypatch):
    """As on GKE; a CPU run on its hosts is alone."""
    monkeypatch.setattr(tpu, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(tpu, "get_metadata", lambda key: ("", 404))
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,t1v-1,t1v-2")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert cluster.find() is None
    monkeypatch.setattr(cluster, "_platforms", lambda: ("tpu", "cpu"))
    assert cluster.find() == Place("localhost:8482", 3, 2)
    assert jax.config.jax_platforms == "cpu"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (None, 2, None),
            "coordinator address None, number of processes 2, process id None: no cluster was found "
            "that knows the rest, give all three (or --num-processes 1)",
        ),
        (("a:9", 2, 2), "process id 2 of 2 processes: expected 0 to 1"),
        (("nowhere", 2, 1), "coordinator address 'nowhere': expected HOST:PORT of process 0"),
    ],
)
def test_places_that_are_refused(given, message):
    with pytest.raises(GptOssError) as error:
        cluster.find(*given)
    assert str(error.value) == message
