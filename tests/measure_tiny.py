"""Decode speed of gpt-oss-tiny: `python tests/measure_tiny.py` prints README's row.

The time of 64 tokens is taken from that of 256, so that prefill and start-up are not counted;
medians of five.
"""

import time

import numpy as np

import gptoss_jax as gj


def rate(model, sampling, batch: int) -> float:
    """Tokens a second of the whole batch, prompts of 64 tokens."""
    prompts = [list(range(20, 84))] * batch

    def seconds(tokens):
        started = time.perf_counter()
        model.generate(prompts, sampling, max_new_tokens=tokens)
        return time.perf_counter() - started

    seconds(256)
    differences = [seconds(256) - seconds(64) for _ in range(5)]
    return batch * 192 / float(np.median(differences))


if __name__ == "__main__":
    model = gj.load("gpt-oss-tiny")
    greedy, drawn = (gj.Sampling(temperature=t, seed=1, ignore_eos=True) for t in (0, 1))
    for batch in (1, 8, 64):
        print(f"greedy, batch {batch}: {rate(model, greedy, batch):.0f} tokens/s")
    print(f"temperature 1, batch 1: {rate(model, drawn, 1):.0f} tokens/s")
