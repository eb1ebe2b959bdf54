"""The engine: one thread that owns the device and moves all generations forward together.

Its loop takes requests and cancellations, gives free slots to those that wait, and lets turns.py do
the rest. Knows token ids and stop strings; refuses to know roles, channels and HTTP.
"""

import heapq
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from gptoss_jax.batching import pages
from gptoss_jax.batching.requests import Busy, Closing, Failure, Listener, Request
from gptoss_jax.batching.settings import EngineSettings
from gptoss_jax.batching.sizes import choose_sizes
from gptoss_jax.batching.turns import Turns
from gptoss_jax.batching.work import Job
from gptoss_jax.completions import Piece, Reader
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer


class Engine:
    """Many generations at once (`requests.BatchingEngine`); starts its thread.

    Args:
      model: What `loading.load` gave, with the adapters that requests may name.
      settings: How much it takes on.

    Raises:
      GptOssError: The settings do not fit the model or the memory, or there are several processes.
    """

    def __init__(self, model: Model, settings: EngineSettings | None = None):
        if jax.process_count() > 1:
            raise GptOssError(
                f"{jax.process_count()} processes: continuous batching runs in one; start one "
                "server on each host, with the devices of that host"
            )
        self.model = model
        self.settings = settings or EngineSettings()
        self._sizes = choose_sizes(model, self.settings)
        self._turns = Turns(model, self.settings, self._sizes)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._submitted, self._queued, self._closing = 0, 0, False
        self._waiting: list[Job] = []
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="gptoss-engine", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def max_context(self) -> int:
        return self._sizes.context

    @property
    def adapters(self) -> Sequence[str]:
        return () if self.model.adapters is None else self.model.adapters.names

    def submit(self, request: Request, listener: Listener) -> Job:
        """Queues a request; returns at once. Errors as the seam says."""
        job = self._checked(request, listener)
        with self._lock:
            if self._closing:
                raise Closing("the engine is shutting down: send requests to another one")
            full = self._queued > 0 or len(self._turns.works) >= self.settings.slots
            if full and self._queued >= self.settings.max_queue:
                raise Busy(
                    f"{self._queued} requests wait and {self.settings.slots} slots are taken: "
                    "try again later"
                )
            self._queued += 1
            self._submitted += 1
            job.number = self._submitted
            self._turns.counts["requests_total"] += 1
            self._inbox.put(lambda: heapq.heappush(self._waiting, job))
        return job

    def statistics(self) -> Mapping[str, float]:
        """Gauges and counters, as the seam says."""
        names = ("prompt_tokens", "cached_tokens", "generated_tokens", "steps", "draft_tokens")
        names += ("accepted_tokens", "requests", "cancelled")
        gauges = {
            "slots": self.settings.slots,
            "slots_busy": len(self._turns.works),
            "queue": self._queued,
            "cache_pages": self._sizes.pages,
            "cache_pages_busy": self._turns.pages,
        }
        return gauges | {f"{name}_total": self._turns.counts[f"{name}_total"] for name in names}

    def close(self, drain: float | None = None) -> None:
        """Takes no new requests; waits up to `drain` seconds (None: until done) for those at work,
        then cancels them.
        """
        with self._lock:
            self._closing = True
        with self._idle:
            self._idle.wait_for(lambda: not self._submitted_left(), drain)
        self._inbox.put(None)
        self._thread.join()

    def warm_up(self) -> None:
        """Compiles every program, so that no request waits for it; blocks."""
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def run():
            try:
                self._turns.warm_up()
                done.put(None)
            except Exception as error:
                done.put(error)

        self._inbox.put(run)
        error = done.get()
        if error is not None:
            raise error

    # In any thread.

    def _checked(self, request: Request, listener: Listener) -> Job:
        prompt = np.asarray(request.prompt)
        most = request.max_new_tokens
        if most is not None and (isinstance(most, bool) or most < 1):
            raise GptOssError(f"max_new_tokens is {most}: expected a positive integer, or None")
        self.model._check_ids(prompt, 0)
        if len(prompt) + (most or 1) > self._sizes.context:
            asked = f" and {most} new ones are asked for" if most else ""
            raise GptOssError(
                f"the prompt has {len(prompt)} tokens{asked}: the context is {self._sizes.context} "
                "tokens; shorten the prompt or ask for fewer"
            )
        if isinstance(request.stop, str) or not all(isinstance(s, str) and s for s in request.stop):
            raise GptOssError(f"stop is {request.stop!r}: expected strings that are not empty")
        sampling = request.sampling
        for token in sampling.logit_bias:
            if not 0 <= token < self.model.config.vocab_size:
                raise GptOssError(
                    f"logit_bias names token {token}: ids are 0 to "
                    f"{self.model.config.vocab_size - 1}"
                )
        if request.masks and len(request.masks) != sampling.n:
            raise GptOssError(
                f"{len(request.masks)} masks for {sampling.n} completions: give one for each"
            )
        adapter = int(self.model._numbers(request.adapter, 1)[0])
        limit = self._sizes.context - len(prompt) if most is None else most
        prompt = prompt.astype(np.int32)
        named = pages.names(prompt, self._sizes.chunk, adapter) if self._sizes.pages else []
        return Job(0, request, listener, prompt, limit, adapter, named, self._cancel)

    def _cancel(self, job: Job, completion: int | None) -> None:
        self._inbox.put(lambda: self._cancelled(job, completion))

    def _submitted_left(self) -> bool:
        return bool(self._queued or self._turns.works)

    # In the engine's thread.

    def _loop(self) -> None:
        while True:
            try:
                if not self._take():
                    break
                self._admit()
                self._turns.turn()
            except Exception as error:
                if not self._failed(error):
                    return
        for job in [*self._waiting, *{work.job for work in self._turns.works.values()}]:
            self._cancelled(job, None)

    def _take(self) -> bool:
        """Does what was asked for from other threads, and waits for it if there is nothing else to
        do; False at the end.
        """
        while True:
            idle = not (self._waiting or self._turns.at_work)
            if idle:
                with self._idle:
                    self._idle.notify_all()
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()

    def _admit(self) -> None:
        """Gives free slots to waiting completions."""
        while self._waiting and self._turns.free:
            job = self._waiting[0]
            while job.waiting and self._turns.free:
                self._turns.give_slot(job)
            if not job.waiting:
                heapq.heappop(self._waiting)
                with self._lock:
                    self._queued -= 1

    def _cancelled(self, job: Job, completion: int | None) -> None:
        def last(reader: Reader) -> Piece:
            text, tokens = reader.text.flush()
            held = reader.held[: len(tokens)] if reader.wanted else None
            return Piece(text, tokens, held, "cancelled")

        found = [w for w in list(job.works.values()) if completion in (None, w.index)]
        waiting = [i for i in job.waiting if completion in (None, i)]
        self._turns.counts["cancelled_total"] += bool(found or waiting)
        for work in found:
            self._turns.end(work, last(work.reader))
        job.waiting = [i for i in job.waiting if i not in waiting]
        if waiting and not job.waiting and job in self._waiting:
            self._waiting.remove(job)
            heapq.heapify(self._waiting)
            with self._lock:
                self._queued -= 1
        for index in waiting:
            job.listener(index, Piece("", [], None, "cancelled"))

    def _failed(self, error: Exception) -> bool:
        """Ends the requests at work, and begins anew: what was donated is lost. False if there is
        no beginning anew: then all end.
        """
        self._turns.fail(error)
        try:
            self._turns.reset()
        except Exception as last:
            with self._lock:
                self._closing = True
            while not self._inbox.empty():  # nothing comes after `_closing`
                if message := self._inbox.get():
                    message()
            for job in self._waiting:
                for index in job.waiting:
                    job.listener(index, Failure(last))
            self._waiting, self._queued = [], 0
            with self._idle:
                self._idle.notify_all()
            return False
        return True
