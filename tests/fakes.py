"""Stand-ins for a model in tests of what lies above it."""

import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Sequence

from gptoss_jax.batching.requests import Busy, Closing, Failure, Listener, Request
from gptoss_jax.completions import Piece as EnginePiece
from gptoss_jax.completions import Reader, TokenLogprob
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import Tokenizer, load_tokenizer

_PARTS = re.compile(r"(<\|[a-z_0-9]+\|>)")


def harmony_ids(text: str, tokenizer: Tokenizer | None = None) -> list[int]:
    """Text in which control tokens stand by name -> ids."""
    tokenizer = tokenizer or load_tokenizer()
    out: list[int] = []
    for part in _PARTS.split(text):
        special = part in tokenizer.special
        out += [tokenizer.special[part]] if special else tokenizer.encode(part)
    return out


@dataclasses.dataclass
class Piece:
    tokens: list[int]
    text: str = ""
    finish_reason: str | None = None
    stop: int | None = None


class ScriptedModel:
    """Replays given completions, one a call of `stream`, as the engine does: the stop token is in
    the last piece's stop.

    `scripts` are texts with control tokens by name, or ids. Records `prompts` and `settings`.
    Honours max_new_tokens and the stop token ids of the sampling settings, as the engine would.
    """

    def __init__(
        self, *scripts: str | list[int], tokenizer: Tokenizer | None = None, piece: int = 3
    ):
        self.tokenizer = tokenizer or load_tokenizer()
        self.scripts = [
            harmony_ids(script, self.tokenizer) if isinstance(script, str) else list(script)
            for script in scripts
        ]
        self.piece = piece
        self.prompts: list[list[int]] = []
        self.settings: list[object] = []

    def stream(self, prompt, sampling=None, max_new_tokens=None, stop=()):
        self.prompts.append(list(prompt))
        self.settings.append(sampling)
        if not self.scripts:
            raise AssertionError("the script is at its end, but the model is asked again")
        ids = self.scripts.pop(0)
        stops = set(sampling.stop_token_ids) if sampling is not None else set()
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        limit = len(ids) if max_new_tokens is None else min(max_new_tokens, len(ids))
        stopped = end is not None and end < limit
        ids, last = (ids[:end], ids[end]) if stopped else (ids[:limit], None)
        for at in range(0, len(ids), self.piece):
            part = ids[at : at + self.piece]
            yield Piece(part, self.tokenizer.decode(part))
        yield Piece([], finish_reason="stop" if stopped else "length", stop=last)


OPEN: set["ScriptedEngine"] = set()  # those whose thread runs


@contextlib.contextmanager
def closing():
    """Closes the scripted engines that were made in it."""
    before = set(OPEN)
    yield
    for engine in OPEN - before:
        engine.held.set()
        engine.close(0)


class ScriptedEngine:
    """Replays given completions behind the seam of batching/requests.py, in a thread of its own.

    Every step gives each running generation its next token, so that requests run side by side and a
    cancel counts within one step. Stop ids, stop strings, max_new_tokens, logprobs and n go through
    the same reader as in the real engine; masks must accept every scripted token.

    Args:
      scripts: Texts with control tokens by name, or ids: one a completion, in the order of the
        requests. Or a function from the Request to the n scripts of it.
      repeat: Begin again with the first script when all are used.
      piece: Tokens of each step.
      delay: Seconds of each step.
      lenient: A token that a mask refuses ends its completion as a full context would, instead of
        failing.
      capacity: Requests at work, above which submit raises Busy.
      fail_after: Steps after which every generation gets a Failure with `failure`.
      hold_after: Steps after which it holds, until `go_on`.

    Records `requests`, `cancelled` (request's number, completion) and what runs in `running`.
    """

    def __init__(
        self,
        *scripts,
        repeat: bool = False,
        tokenizer: Tokenizer | None = None,
        piece: int = 1,
        delay: float = 0.0,
        lenient: bool = False,
        capacity: int = 1000,
        max_context: int = 4096,
        adapters: Sequence[str] = (),
        name: str = "scripted",
        fail_after: int | None = None,
        hold_after: int | None = None,
        failure: Exception | None = None,
    ):
        self.tokenizer = tokenizer or load_tokenizer()
        self.scripts, self.repeat, self.at = scripts, repeat, 0
        self.piece, self.delay, self.capacity = piece, delay, capacity
        self.lenient = lenient
        self.max_context, self.adapters, self.name = max_context, tuple(adapters), name
        self.fail_after, self.failure = fail_after, failure or RuntimeError("scripted failure")
        self.hold_after, self.steps, self.holds = hold_after, 0, threading.Event()
        self.requests: list[Request] = []
        self.cancelled: list[tuple[int, int]] = []
        self.running: list[ScriptedGeneration] = []
        self.held = threading.Event()  # cleared: no step is made
        self.held.set()
        self.closing = self.closed = False
        self.generated = self.cached = 0
        self.work = threading.Condition()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()
        OPEN.add(self)

    def submit(self, request: Request, listener: Listener) -> "ScriptedGeneration":
        prompt = self.tokenizer.check(request.prompt)
        limit = self.max_context - len(prompt)
        if not prompt:
            raise GptOssError("the prompt is empty: give at least one token")
        if limit < (request.max_new_tokens or 1):
            raise GptOssError(
                f"the prompt has {len(prompt)} tokens and {request.max_new_tokens or 1} are asked "
                f"for, but the context is {self.max_context}: shorten the prompt or ask for less"
            )
        if request.adapter is not None and request.adapter not in self.adapters:
            raise GptOssError(f"no adapter {request.adapter!r}: use one of {self.adapters}")
        if request.masks and len(request.masks) != request.sampling.n:
            raise GptOssError("give one mask for each of the n completions")
        with self.work:
            if self.closing:
                raise Closing("the server is shutting down: try another")
            if len(self.running) >= self.capacity:
                raise Busy("the queue is full: try again later")
            generation = ScriptedGeneration(self, request, listener, self._take(request), limit)
            self.requests.append(request)
            self.cached += generation.cached_tokens
            self.running.append(generation)
            self.work.notify_all()
        return generation

    def statistics(self):
        busy = len(self.running)
        return {
            "slots": 8,
            "slots_busy": busy,
            "queue": 0,
            "cache_pages": 64,
            "cache_pages_busy": busy,
            "prompt_tokens_total": sum(len(r.prompt) for r in self.requests),
            "cached_tokens_total": self.cached,
            "generated_tokens_total": self.generated,
            "steps_total": self.generated,
            "draft_tokens_total": 0,
            "accepted_tokens_total": 0,
            "requests_total": len(self.requests),
            "cancelled_total": len(self.cancelled),
        }

    def close(self, drain: float | None = None) -> None:
        with self.work:
            self.closing = True
            self.work.notify_all()
            self.work.wait_for(lambda: not self.running, drain)
            for generation in self.running:
                generation.cancel()
            self.work.wait_for(lambda: not self.running, 10)
            self.closed = True
            self.work.notify_all()
        self.thread.join(10)
        OPEN.discard(self)

    def go_on(self) -> None:
        """Waits until it holds, and ends that."""
        assert self.holds.wait(60)
        self.held.set()

    def _take(self, request: Request) -> list[list[int]]:
        n = request.sampling.n
        if len(self.scripts) == 1 and callable(self.scripts[0]):
            taken = list(self.scripts[0](request))
        else:
            taken = []
            for _ in range(n):
                if self.at == len(self.scripts) and self.repeat:
                    self.at = 0
                if self.at == len(self.scripts):
                    raise AssertionError("the script is at its end, but the engine is asked again")
                taken.append(self.scripts[self.at])
                self.at += 1
        assert len(taken) == n, f"{len(taken)} scripts for n={n}"
        return [harmony_ids(s, self.tokenizer) if isinstance(s, str) else list(s) for s in taken]

    def _loop(self) -> None:
        while True:
            with self.work:
                self.work.wait_for(lambda: self.running or self.closed)
                if self.closed:
                    return
                at_work = list(self.running)
            self.held.wait()
            if self.delay:
                time.sleep(self.delay)
            for generation in at_work:
                generation.step()
            self.steps += 1
            if self.steps == self.hold_after:
                self.held.clear()
                self.holds.set()

    def ended(self, generation: "ScriptedGeneration") -> None:
        with self.work:
            self.running.remove(generation)
            self.work.notify_all()


class ScriptedGeneration:
    """One request of a ScriptedEngine."""

    def __init__(self, engine: ScriptedEngine, request, listener, scripts, limit):
        self.engine, self.request, self.listener, self.scripts = engine, request, listener, scripts
        self.number = len(engine.requests)
        prompt = list(request.prompt)
        common = [_common(prompt, list(r.prompt)) for r in engine.requests]
        self.cached_tokens = min(max(common, default=0), len(prompt) - 1)
        if request.max_new_tokens is not None:
            limit = request.max_new_tokens
        n = request.sampling.n
        tokenizer, sampling = engine.tokenizer, request.sampling
        self.readers: list[Reader | None] = [
            Reader(tokenizer, request.stop, sampling, limit) for _ in range(n)
        ]
        self.places, self.steps, self.ended = [0] * n, 0, set()
        self.stops = {*sampling.stop_token_ids}
        if not sampling.ignore_eos:
            self.stops |= {*tokenizer.stop_ids}

    def cancel(self, completion: int | None = None) -> None:
        chosen = range(len(self.scripts)) if completion is None else [completion]
        self.ended |= {c for c in chosen if self.readers[c] is not None}

    def step(self) -> None:
        self.steps += 1
        for number, reader in enumerate(self.readers):
            if reader is None:
                continue
            if number in self.ended:
                self.engine.cancelled.append((self.number, number))
                came: EnginePiece | Failure = EnginePiece("", [], None, "cancelled")
            elif self.engine.fail_after is not None and self.steps > self.engine.fail_after:
                came = Failure(self.engine.failure)
            else:
                came = self._next(number, reader)
            if isinstance(came, Failure) or came.finish_reason is not None:
                self.readers[number] = None
                if not any(self.readers):  # its place is free before the last piece is told
                    self.engine.ended(self)
            self.listener(number, came)

    def _next(self, number: int, reader: Reader) -> "EnginePiece | Failure":
        place = self.places[number]
        tokens = self.scripts[number][place : place + self.engine.piece]
        end = next((i for i, token in enumerate(tokens) if token in self.stops), None)
        tokens = tokens if end is None else tokens[: end + 1]
        self.places[number] = place + len(tokens)
        if not tokens:  # the script has no stop of its own: as if the context were full
            reader.limit = 0
        for token in tokens if self.request.masks else ():
            if not self.request.masks[number].accept(token):
                if self.engine.lenient:
                    tokens, reader.limit = [], 0
                    break
                text = self.engine.tokenizer.decode([token])
                return Failure(AssertionError(f"the mask refuses the scripted token {text!r}"))
        self.engine.generated += len(tokens)
        top = self.request.sampling.top_logprobs
        return reader.read(tokens, end is not None, lambda i: scripted_logprob(tokens[i], top))


def scripted_logprob(token: int, top: int = 3) -> TokenLogprob:
    """What a ScriptedEngine says of a token: the token itself and up to two neighbours."""
    logprob = -0.25 - token % 8 / 8
    near = ((token, logprob), (token + 1, logprob - 0.5), (max(token - 1, 0), logprob - 1.0))
    return TokenLogprob(token, logprob, near[:top])


def _common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
