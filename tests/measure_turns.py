"""README's decode steps in turns: what is compared makes some steps after the other, again and again
in one run, so that a memory's moods meet both, each turn beside the bandwidth of its own moment.

    python tests/measure_turns.py --peer llama.cpp     this package, and llama.cpp in its own process
    python tests/measure_turns.py --batches 1 8        two numbers of rows, in one process

Random weights of gpt-oss-20b's format and width, 4 layers of it (--layers). The bandwidth is that of
a bare loop that does nothing but read 512 MB, with as many threads. A share is what our step reads at
least (experts by uniform routing) by that bandwidth. Needs a C++ compiler.
"""

import argparse
import atexit
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.bench.process import cores, use_cores

MB, OURS = 1 << 20, "gptoss_jax"
LOOP = """
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>
typedef uint64_t Wide __attribute__((vector_size(64), aligned(8), may_alias));
constexpr size_t kPart = 5760;
extern "C" double seconds(const Wide* data, size_t count, int threads, size_t ahead, uint64_t* sum) {
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> all{0};
  const auto read = [&] {
    Wide sums[4] = {};
    for (size_t i; (i = next.fetch_add(kPart)) < count;)
      for (size_t j = i; j + 4 <= count && j < i + kPart; j += 4)
        for (size_t k = 0; k < 4; k++) {
          if (ahead) __builtin_prefetch(data + j + ahead + k);
          sums[k] += data[j + k];
        }
    for (size_t k = 0; k < 32; k++) all += sums[k / 8][k % 8];
  };
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(read);
  read();
  for (auto& one : others) one.join();
  *sum = all;
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
"""
Turn = Callable[[int], float]  # steps to make -> seconds of one, their mean


def reading_loop(threads: int) -> Callable[[], float]:
    """What gives bytes a second of the loop: the best of four passes, two of which ask for what they
    read 8 KB ahead.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "loop.so"
        compiler = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-pthread"]
        command = [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(made)]
        subprocess.run(command, input=LOOP, text=True, check=True)
        call: Any = ctypes.CDLL(str(made)).seconds
    call.restype = ctypes.c_double
    data, sum_ = np.ones(64 * MB, np.uint64), ctypes.c_uint64()

    def seconds(ahead: int) -> float:
        where, count = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes // 64)
        found = call(where, count, threads, ctypes.c_size_t(ahead), ctypes.byref(sum_))
        assert sum_.value == data.size
        return found

    return lambda: data.nbytes / min(seconds(ahead) for ahead in (0, 128, 0, 128))


def ours(model: Any, batch: int, prompt: int, total: int) -> Turn:
    """Steps of this package, as `generate` makes them, after a prompt."""
    import jax

    from gptoss_jax.bench import steps

    held = [
        steps.prefill(model, steps.prompts(model, batch, prompt), steps.capacity_for(model, total))
    ]
    settings = steps.greedy(model, batch)

    def turn(count: int) -> float:
        jax.block_until_ready(held)
        started = time.perf_counter()
        held[0], out = steps.decode(model, held[0], settings, count)
        jax.block_until_ready((held, out))
        return (time.perf_counter() - started) / count

    return turn


def llama_cpp(arguments: argparse.Namespace, vocabulary: int, total: int) -> Turn:
    """Steps of llama.cpp in a process of its own, which is told by a pipe how many to make."""
    from gptoss_jax.bench import compare

    if why := compare.missing(arguments.peer):
        raise SystemExit(why)
    file = compare.llama_file(arguments.model, arguments.layers, print)
    numbers = vocabulary, arguments.batch, arguments.prompt, total, arguments.threads
    sizes = [str(n) for n in numbers]
    command = [sys.executable, __file__, "--as-llama", str(file), *sizes]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(child.communicate)  # closes its input, at which it ends
    given, told = child.stdin, child.stdout
    assert given is not None
    assert told is not None

    def turn(count: int) -> float:
        print(count, file=given, flush=True)
        line = told.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended with {child.wait()}")
        return float(line)

    return turn


def as_llama(file: str, vocabulary: int, batch: int, prompt: int, total: int, threads: int) -> None:
    """The other process: for each line with a number that many steps, and their seconds."""
    from gptoss_jax.bench.peer_llamacpp import Rows

    use_cores(threads)
    rows = Rows(file, batch, total, threads)
    rows.prefill(np.random.default_rng(0).integers(0, vocabulary, (batch, prompt)))
    position = prompt
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            rows.step(position, vocabulary)
            position += 1
        print((time.perf_counter() - started) / int(line), flush=True)


def spread(values: Sequence[float], form: str) -> str:
    """Median and range."""
    middle, *ends = (format(x, form) for x in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({' to '.join(ends)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--peer", choices=["llama.cpp"])
    what.add_argument("--batches", type=int, nargs=2, metavar="ROWS")
    parser.add_argument("--model", default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="rows, with --peer")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16, help="of each in a turn, at most 64")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=cores())
    given = parser.parse_args()
    if not 1 <= given.steps <= 64 or len(set(given.batches or (1, 2))) < 2:
        parser.error("--steps takes 1 to 64, --batches two different numbers")
    use_cores(given.threads)  # before XLA starts
    os.environ["JAX_PLATFORMS"] = "cpu"

    from gptoss_jax.bench import report
    from gptoss_jax.bench.model import open_model

    total = given.prompt + given.steps * (given.turns + 1)
    model = open_model(given.model, random_weights=True, layers=given.layers, mesh={})
    batches = {f"batch {n}": n for n in given.batches} if given.batches else {OURS: given.batch}
    turns = {name: ours(model, n, given.prompt, total) for name, n in batches.items()}
    if given.peer:
        turns = {given.peer: llama_cpp(given, model.config.vocab_size, total), **turns}
    rate = reading_loop(given.threads)
    for turn in turns.values():
        turn(given.steps)  # compiles
    first, second = turns
    milliseconds, loop = {name: [] for name in turns}, []
    shares, ratios = {name: [] for name in batches}, []
    for number in range(1, given.turns + 1):
        for name, turn in turns.items():
            milliseconds[name].append(turn(given.steps) * 1e3)
        loop.append(rate() / 1e9)
        context = given.prompt + given.steps * number
        for name, n in batches.items():
            reads = report.least(model, context, 0, n)["decode"].bytes / 1e6
            shares[name].append(100 * reads / milliseconds[name][-1] / loop[-1])
        by_rows = batches[second] / batches.get(first, batches[second])
        ratios.append(milliseconds[first][-1] / milliseconds[second][-1] * by_rows)
        steps = ", ".join(f"{name} {found[-1]:.1f} ms" for name, found in milliseconds.items())
        parts = ", ".join(f"{name} {found[-1]:.0f} %" for name, found in shares.items())
        print(
            f"{number:3}: {steps}, {ratios[-1]:.2f} x the tokens; loop {loop[-1]:.1f} GB/s: {parts}",
            flush=True,
        )
    print(
        f"medians and ranges of {given.turns} turns of {given.steps} steps, {given.threads} threads"
    )
    for name, found in milliseconds.items():
        print(f"  {name}: {spread(found, '.1f')} ms a step")
    print(f"  {second} by {first}: {spread(ratios, '.2f')} x the tokens")
    print(f"  reading loop: {spread(loop, '.1f')} GB/s")
    for name, found in shares.items():
        print(f"  {name}, share of the loop: {spread(found, '.0f')} %")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-llama"]:
        as_llama(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
