"""What tests/test_hosts.py runs in several processes: loads models, generates, and writes what it
did and what it read as JSON.
"""

import collections
import json
import sys

import jax
import numpy as np

from gptoss_jax import checkpoint, cluster, hosts, loading
from gptoss_jax.sampling import Sampling

# What clusters tell a process through its environment.
CLUSTERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JOB_", "KUBERNETES_")
PROMPTS = ["347+285=", "Who are you?"]
GREEDY = Sampling(temperature=0, logprobs=True, top_logprobs=2)
SAMPLED = Sampling(seed=3, top_k=40, top_p=0.9, repetition_penalty=1.1)
TOKENS = [[1, 2, 3, 4, 5], [7, 8]]


def work(model):
    """Tokens of a greedy row, of one with a seed and of one with a drawn seed, and logits."""
    seeded = model.generate(PROMPTS, [GREEDY, SAMPLED], max_new_tokens=6)
    drawn = model.generate(PROMPTS, [GREEDY, Sampling()], max_new_tokens=6)
    return {
        "tokens": [completion.tokens for completion in seeded],
        "drawn": drawn[1].tokens,
        "logits": [np.asarray(row).tolist() for row in model.logits(TOKENS)],
    }


def loaded(folder, mesh):
    """A model, and the bytes that loading it read by parameter."""
    kind = type(checkpoint.open_checkpoint(folder))
    reads, read = collections.Counter(), kind.read

    def counted(self, leaf, index=None):
        array = read(self, leaf, index)
        reads[leaf.name] += array.nbytes
        return array

    kind.read = counted
    try:
        return loading.load(folder, mesh=mesh), dict(reads)
    finally:
        kind.read = read


def main(address, count, index, jobs, out):
    place = cluster.Place(address, int(count), int(index))
    found = []
    with hosts.together(place, {"jobs": jobs}, 60):
        for job in json.loads(jobs):
            model, read = loaded(job["folder"], job["mesh"])
            found.append({"read": read, **(work(model) if job["work"] else {})})
            if job.get("save"):
                checkpoint.save_params(job["save"], model.config, model.params)
        line = hosts.from_first(lambda: f"a line of process {index}")
        answer = {"jobs": found, "line": line, "processes": jax.process_count()}
    with open(out, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
