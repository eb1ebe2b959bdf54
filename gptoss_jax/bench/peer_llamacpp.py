"""Times llama.cpp on the CPU, on a GGUF of gguf_file.py: MXFP4 experts, bfloat16 matrices.

    python -m gptoss_jax.bench.peer_llamacpp --config config.json --file MODEL.gguf --threads 2

Needs llama-cpp-python, built for this processor: CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python. Uses the C interface, which can step many rows at once.
"""

import ctypes
import time
from typing import Any

import numpy as np

from gptoss_jax.bench.peer import options, tell, timed

BATCH = 512  # tokens in one call, llama.cpp's own default for one that it computes at once


def main() -> None:
    """Runs it and prints one line of JSON."""
    given = options((__doc__ or "").splitlines()[0], file={"required": True})
    vocabulary = given.config["vocab_size"]
    started = time.perf_counter()
    rows = Rows(given.file, given.batch, given.prompt + given.new, given.threads)
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, vocabulary, (given.batch, given.prompt))
    load = time.perf_counter() - started
    prefill, steps = [], []
    for _ in range(given.repeats + 1):
        rows.clear()
        prefill.append(timed(lambda: rows.prefill(prompts))[0])
    for position in range(given.prompt, given.prompt + given.new):
        steps.append(timed(lambda position=position: rows.step(position, vocabulary))[0])
    tell(given, "llama.cpp", ("llama-cpp-python",), load, prefill[1:], steps)


class Rows:
    """A model and the sequences that it continues."""

    def __init__(self, file: str, count: int, context: int, threads: int):
        import llama_cpp

        self.count, self.api = count, llama_cpp
        llama_cpp.llama_backend_init()
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        how = llama_cpp.llama_model_default_params()
        if hasattr(how, "load_mode"):  # into memory: pages of a mapped file would be read late
            how.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        else:
            how.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(file.encode(), how)
        if not model:
            raise SystemExit(f"llama.cpp does not read {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = count * (-(-context // 256) * 256)
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_seq_max = count
        settings.n_threads = settings.n_threads_batch = threads
        self.context: Any = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp has no room for {count} rows of {context} tokens")
        self.batch = llama_cpp.llama_batch_init(max(BATCH, count), 0, 1)
        self.tokens = list(range(100, 100 + count))

    def clear(self) -> None:
        """Forgets what was read."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def prefill(self, prompts: np.ndarray) -> None:
        """Reads the prompts row by row; each row's last token gets logits."""
        rows, length = prompts.shape
        for row in range(rows):
            for at in range(0, length, BATCH):
                part = range(at, min(at + BATCH, length))
                self._run([(int(prompts[row, i]), i, row, i == length - 1) for i in part])

    def step(self, position: int, vocabulary: int) -> None:
        """One token of every row: the likeliest, as it was chosen from the step before."""
        self._run([(token, position, row, True) for row, token in enumerate(self.tokens)])
        for row in range(self.count):
            logits = self.api.llama_get_logits_ith(self.context, row)
            self.tokens[row] = int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def _run(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, row, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = row
            batch.logits[i] = wanted
        if self.api.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not compute a batch")
        self.api.llama_synchronize(self.context)


if __name__ == "__main__":
    main()
