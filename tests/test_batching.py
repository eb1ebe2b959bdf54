"""Continuous batching: what each request gets is what it would get alone, whatever else runs, is
cancelled, refused or broken.
"""

import queue
import time

import numpy as np
import pytest
import tiny

from gptoss_jax.batching import Engine, EngineSettings, Failure, Request
from gptoss_jax.completions import join
from gptoss_jax.sampling import Sampling

V = tiny.CONFIG.vocab_size
SETTINGS = EngineSettings(slots=4, max_context=256, chunk=16)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def engine(model):
    engine = Engine(model, SETTINGS)
    yield engine
    engine.close(0)


def submit(engine, requests):
    """Generations, and a function that waits for what every completion gets: {(request, index):
    pieces}.
    """
    came: queue.Queue = queue.Queue()
    generations = [
        engine.submit(request, lambda i, piece, k=k: came.put((k, i, piece)))
        for k, request in enumerate(requests)
    ]

    def wait():
        left, parts = sum(request.sampling.n for request in requests), {}
        while left:
            k, i, piece = came.get(timeout=120)
            parts.setdefault((k, i), []).append(piece)
            left -= isinstance(piece, Failure) or piece.finish_reason is not None
        return parts

    return generations, wait


def run(engine, requests):
    """Completions (or Failures) of every request, as a list of lists."""
    parts = submit(engine, requests)[1]()
    ends = {
        key: pieces[-1] if isinstance(pieces[-1], Failure) else join(pieces)
        for key, pieces in parts.items()
    }
    return [[ends[k, i] for i in range(r.sampling.n)] for k, r in enumerate(requests)]


def workload(count, seed=0):
    """Random requests with every kind of setting."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        sampling = Sampling(
            temperature=[0.0, 1.0, 0.7][i % 3],
            seed=int(rng.integers(1 << 40)),
            n=1 + (i % 4 == 3),
            top_k=int(rng.choice([0, 5])),
            top_p=float(rng.choice([1.0, 0.8])),
            min_p=float(rng.choice([0.0, 0.05])),
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            presence_penalty=float(rng.choice([0.0, 0.5])),
            logit_bias={int(rng.integers(V)): 2.0} if i % 5 == 0 else {},
            logprobs=i % 3 == 0,
            top_logprobs=3 * (i % 3 == 0),
            ignore_eos=bool(i % 2),
        )
        prompt = rng.integers(0, V, int(rng.integers(1, 90))).tolist()
        yield Request(prompt, sampling, int(rng.integers(1, 40)))


def test_every_request_gets_what_generate_gives(model, engine):
    requests = list(workload(12))
    for request, found in zip(requests, run(engine, requests), strict=True):
        expected = model.generate(request.prompt, request.sampling, request.max_new_tokens)
        expected = expected if isinstance(expected, list) else [expected]
        assert [c.tokens for c in found] == [c.tokens for c in expected]
        for a, b in zip(found, expected, strict=True):
            assert (a.text, a.finish_reason, a.stop) == (b.text, b.finish_reason, b.stop)
            assert (a.logprobs is None) == (b.logprobs is None)
            if a.logprobs and b.logprobs:
                pairs = list(zip(a.logprobs, b.logprobs, strict=True))
                assert max(abs(x.logprob - y.logprob) for x, y in pairs) < 1e-4
                assert all([i for i, _ in x.top] == [i for i, _ in y.top] for x, y in pairs)


class Only:
    """A grammar that allows the ids of some residues, by place."""

    def __init__(self, pattern):
        self.pattern, self.accepted = pattern, []

    def _set(self):
        divisor, residue = self.pattern[len(self.accepted) % len(self.pattern)]
        return np.arange(V) % divisor == residue

    def fill(self, allowed):
        bits = np.zeros(32 * len(allowed), np.uint8)
        bits[:V] = self._set()
        allowed[:] = np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token):
        good = bool(self._set()[token])
        if good:
            self.accepted.append(token)
        return good


def test_masked_choices_are_the_allowed_ones(engine):
    """Beside others that are free; a grammar that allows all changes nothing."""
    pattern = [(2, 0), (7, 3), (1, 0), (1, 0)]
    masks = [Only(pattern) for _ in range(3)] + [Only([(1, 0)])]
    base = [Sampling(temperature=t, seed=5, ignore_eos=True) for t in (0, 1, 1, 1)]
    base[2] = Sampling(temperature=1, seed=6, top_k=1, presence_penalty=1.5, ignore_eos=True)
    prompt = list(range(30, 50))
    requests = [
        Request(prompt, s, 24, masks=[mask]) for s, mask in zip(base, masks, strict=True)
    ] + [Request(prompt, base[1], 24)]
    found = [c[0] for c in run(engine, requests)]
    for completion, mask in zip(found, masks, strict=False):
        assert completion.tokens == mask.accepted
        check = Only(mask.pattern)
        assert all(check.accept(token) for token in completion.tokens)
    assert found[3].tokens == found[4].tokens
    time.sleep(0.2)
    assert engine.statistics()["slots_busy"] == 0
