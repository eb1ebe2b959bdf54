"""What continuous batching gives on gpt-oss-tiny: `python tests/measure_serving.py`.

Throughput of 32 requests at once against the same one after another (through the engine, and by
Model.generate), and the time to the first token of short prompts, alone and while a prompt of 4096
tokens is read. Rounds of both kinds take turns; medians.
"""

import queue
import sys
import time

import numpy as np

import gptoss_jax as gj
from gptoss_jax.batching import Engine, EngineSettings, Failure, Request

ROUNDS, REQUESTS, NEW, LONG = 5, 32, 64, 4096


def start(engine, requests):
    """Submits all; returns a function that waits and gives the seconds to each first token and to
    the end of all.
    """
    came: queue.Queue = queue.Queue()
    begun = time.perf_counter()
    for k, request in enumerate(requests):
        engine.submit(request, lambda i, piece, k=k: came.put((k, time.perf_counter(), piece)))

    def wait():
        first, left, at = {}, len(requests), begun
        while left:
            k, at, piece = came.get(timeout=600)
            if isinstance(piece, Failure):
                raise piece.error
            first.setdefault(k, at - begun)
            left -= piece.finish_reason is not None
        return list(first.values()), at - begun

    return wait


def main(drafts: int = 0) -> None:
    model = gj.load("gpt-oss-tiny")
    settings = EngineSettings(pages=0, **({"drafts": drafts} if drafts else {}))
    engine = Engine(model, settings)
    begun = time.perf_counter()
    engine.warm_up()
    print(f"warm-up: {time.perf_counter() - begun:.1f} s")
    rng = np.random.default_rng(0)

    def request(length, new, seed=0):
        ids = rng.integers(256, 1600, length).tolist()
        return Request(ids, gj.Sampling(seed=seed, ignore_eos=True), new)

    some = [request(int(n), NEW, i) for i, n in enumerate(rng.integers(20, 100, REQUESTS))]
    start(engine, some)()
    model.generate(some[0].prompt, some[0].sampling, NEW)
    together, alone, generate = [], [], []
    for _ in range(ROUNDS):
        together.append(REQUESTS * NEW / start(engine, some)()[1])
        begun = time.perf_counter()
        for one in some[:8]:
            start(engine, [one])()
        alone.append(8 * NEW / (time.perf_counter() - begun))
        begun = time.perf_counter()
        for one in some[:8]:
            model.generate(one.prompt, one.sampling, NEW)
        generate.append(8 * NEW / (time.perf_counter() - begun))
    a, b, c = (float(np.median(x)) for x in (together, alone, generate))
    print(f"{REQUESTS} at once: {a:.0f} tokens/s")
    print(f"one after another: {b:.0f} tokens/s ({a / b:.1f} x), Model.generate: {c:.0f}")

    unloaded, loaded, seconds = [], [], 0.0
    for _ in range(ROUNDS):
        for _ in range(8):
            unloaded += start(engine, [request(24, 2)])()[0]
        long = start(engine, [request(LONG, 2)])
        for _ in range(8):
            loaded += start(engine, [request(24, 2)])()[0]
        seconds = long()[1]
    a, b = (1e3 * float(np.median(x)) for x in (unloaded, loaded))
    print(f"first token of a prompt of 24: {a:.1f} ms")
    print(f"while one of {LONG} is read: {b:.1f} ms ({b / a:.1f} x); it takes {seconds:.2f} s")
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
