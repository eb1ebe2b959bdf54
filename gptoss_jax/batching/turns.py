"""What is on the device: completions that have a slot, and what was sent for them and not yet read.

One turn sends at most one chunk of a prompt and one step of all rows, and reads what was sent
before while that runs. The engine's thread alone calls it. Knows tokens, masks and stop strings;
refuses to know threads and who waits for a slot.
"""

import collections
import dataclasses
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptoss_jax.batching import pages
from gptoss_jax.batching.choices import BROKEN
from gptoss_jax.batching.requests import Failure
from gptoss_jax.batching.rows import Rows
from gptoss_jax.batching.settings import EngineSettings
from gptoss_jax.batching.sizes import Sizes
from gptoss_jax.batching.work import MEMORY, Job, Work
from gptoss_jax.completions import Piece, Reader, TokenLogprob
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError

ENDS = 3  # of prompts that are read besides a chunk, while few rows generate
AHEAD = 2  # steps that are sent before the first of them is read,
LOST = 0.12  # fewer when grammars would waste more than this share of them
HOPELESS = 0.6  # a grammar that accepts less gets its mask before the choice,
HOPE = 0.03  # and is tried without it after a while


@dataclasses.dataclass
class Step:
    """What was sent to the device and not yet read: a chunk of a prompt, or choices of rows.

    Attributes:
      number: In order of sending.
      wait: Tokens [B] or [B, T], or something that is there when a chunk is read.
      works: Rows that it concerns.
      logits: That the tokens were chosen from, [B, V] or [B, T, V]; None for a chunk.
      reports: Their log probabilities if somebody wants them, one for each column of tokens.
      masked: Rows whose grammar was asked before.
      drafts: How many tokens were drafted for each row.
    """

    number: int
    wait: Any
    works: dict[int, Work] = dataclasses.field(default_factory=dict)
    logits: Any = None
    reports: Sequence[Any] = ()
    masked: frozenset[int] = frozenset()
    drafts: Mapping[int, int] = dataclasses.field(default_factory=dict)


class Turns:
    """The slots of an engine and its turns.

    Args:
      model: Whose rows they are.
      settings: The engine's.
      sizes: Of everything.

    Attributes:
      works: Completions that have a slot, by slot.
      counts: What the engine counts.
    """

    def __init__(self, model: Model, settings: EngineSettings, sizes: Sizes):
        self.model, self.settings = model, settings
        self.works: dict[int, Work] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self._sizes = sizes
        self._rows = Rows(model, sizes)
        self._reading: list[Work] = []
        self._running: dict[int, Work] = {}
        self._begin()

    @property
    def at_work(self) -> bool:
        """Whether a slot is taken or something that was sent is not read."""
        return bool(self.works or self._sent)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return len(self._free)

    @property
    def pages(self) -> int:
        """Pages of prefixes that hold something."""
        return len(self._table)

    def give_slot(self, job: Job) -> None:
        """Lets the next completion of a request have a free slot."""
        index, slot = job.waiting.pop(0), heapq.heappop(self._free)
        request, s = job.request, job.request.sampling
        own = () if s.ignore_eos else self.model.config.eos_token_ids
        work = Work(
            job,
            index,
            slot,
            Reader(self.model.tokenizer, tuple(request.stop), s, job.limit),
            frozenset((*own, *s.stop_token_ids)),
            request.masks[index] if request.masks else None,
            length=len(job.prompt),
        )
        first = next((w for w in job.works.values() if w in self._reading), None)
        job.works[index] = self.works[slot] = work
        if first is None:  # the others copy what the first one reads
            self.counts["prompt_tokens_total"] += len(job.prompt)
            self._reading.append(work)

    def turn(self) -> None:
        """Sends a chunk and a step, and reads what was sent a turn before."""
        self._send_chunk()
        if self._running:
            self._send_step()
        while len(self._sent) > self._ahead():
            self._read(self._sent.popleft())

    def end(self, work: Work, piece: Piece | Failure, broken: bool = False) -> None:
        """Frees the slot of a completion and hands on its last piece."""
        work.over = True
        self._running.pop(work.slot, None)
        if work in self._reading:
            self._reading.remove(work)
            heir = next((w for w in work.job.works.values() if w is not work), None)
            if heir is not None:  # begins again: the slot of the first one is gone
                self._reading.append(heir)
        del self.works[work.slot], work.job.works[work.index]
        if broken:
            self._table.forget(work.job.pages)
        self._rows.release(work.slot, broken)
        heapq.heappush(self._free, work.slot)
        work.tell(piece)

    def fail(self, error: Exception) -> None:
        """Ends all with an error; what was donated may be lost, so that `reset` has to follow."""
        works = list(self.works.values())
        self.works, self._reading, self._running = {}, [], {}
        for work in works:
            work.over = True
            work.job.works.pop(work.index, None)
            work.tell(Failure(error))

    def reset(self) -> None:
        """Begins anew, with all rows and pages free."""
        self._rows.reset()
        self._begin()

    def warm_up(self) -> None:
        """Compiles every program; blocks."""
        if self.at_work:
            raise GptOssError("warm_up: the engine is at work; warm it up before the first request")
        self._rows.warm_up()

    def _ahead(self) -> int:
        """How much may be on the device while the next is sent."""
        if not self._running:
            return int(bool(self._reading))
        if self.settings.drafts:
            return 0
        # a refused choice wastes what was sent after it
        refused = [1 - w.accepted if w.mask is not None else 0.0 for w in self._running.values()]
        for ahead in range(AHEAD, 0, -1):
            lost = sum(ahead * share / (1 + ahead * share) for share in refused)
            if lost <= LOST * len(refused):
                return ahead
        return 0

    def _send_chunk(self) -> None:
        """Reads on in a prompt: by turns the oldest and the one with the least left. While more
        prompts wait to be read than rows generate, also the ends of a few others.
        """
        if not self._reading:
            return
        self._turns += 1
        choose = min if self._turns % 2 else _oldest
        self._read_on(choose(self._reading, key=lambda work: work.left))
        if len(self._reading) > len(self._running):
            short = [work for work in self._reading if work.left <= self._sizes.chunk]
            for work in short[:ENDS]:
                self._read_on(work)

    def _read_on(self, work: Work) -> None:
        """Sends one chunk of a prompt, and lets it generate after its last one."""
        self._restore(work)
        if work.left > 0:
            count = min(work.left, self._sizes.chunk)
            part = work.job.prompt[work.done : work.done + count]
            wait = self._rows.read(work.slot, work.done, part, work.job.adapter)
            self._sent.append(Step(self._next(), wait))
            work.done += count
            self._save(work)
        if work.left == 0:
            self._reading.remove(work)
            self._start(work)

    def _restore(self, work: Work) -> None:
        """Copies the pages that are there already, in the place of reading them."""
        named, size = work.job.pages, self._sizes.chunk
        while work.done // size < len(named):
            page = self._table.find(named[work.done // size])
            if page is None:
                break
            work.done += size
            self._rows.restore(work.slot, page, work.done)
            work.cached += size
            work.job.cached = max(work.job.cached, work.cached)
            self.counts["cached_tokens_total"] += size

    def _save(self, work: Work) -> None:
        """Keeps the chunk that was just read, if it is a whole page."""
        named, size = work.job.pages, self._sizes.chunk
        number, rest = divmod(work.done, size)
        if rest or number > len(named) or self._table.find(named[number - 1]) is not None:
            return
        page = self._table.add(named[number - 1])
        if page is not None:
            self._rows.save(work.slot, page, work.done)

    def _start(self, first: Work) -> None:
        """Lets all of a request's completions that have a slot generate."""
        job = first.job
        for work in [w for w in job.works.values() if w.slot not in self._running]:
            if work is not first:
                self._rows.copy(first.slot, work.slot)
            self._rows.admit(
                work.slot, job.prompt, job.request.sampling, work.index, job.seed, job.adapter
            )
            work.valid_from = self._number
            self._running[work.slot] = work

    def _send_step(self) -> None:
        """One token for every row that generates, or more where drafts are right."""
        drafts = self._drafts()
        if drafts:
            self._send_drafts(drafts)
            return
        logits = self._rows.advance()
        allowed, masked = None, {}
        if not self._choices():
            for slot, work in self._running.items():
                if work.mask is not None and work.accepted < HOPELESS:
                    masked[slot] = work
                    work.accepted += HOPE
            if masked:
                allowed = self._allowed(masked)
        tokens = self._rows.choose(logits, allowed)
        self._sent_choices(logits, tokens, dict(self._running), frozenset(masked))

    def _sent_choices(self, logits, tokens, works, masked, drafts=None) -> None:
        """Notes what was sent; asks for log probabilities if somebody wants them."""
        wanted = any(work.reader.wanted for work in works.values())
        reports = self._rows.reports(logits, tokens) if wanted else []
        step = Step(self._next(), tokens, works, logits, reports, masked, drafts or {})
        self._sent.append(step)
        self.counts["steps_total"] += 1

    def _drafts(self) -> dict[int, list[int]]:
        """Guesses for the rows, if they are worth a step that reads several tokens."""
        most = self.settings.drafts
        if not most or self._choices():
            return {}
        drafts = {slot: work.draft(most) for slot, work in self._running.items()}
        hoped = sum(self._running[slot].hits * len(draft) for slot, draft in drafts.items())
        return drafts if hoped > 0.5 * len(drafts) else {}

    def _send_drafts(self, drafts: dict[int, list[int]]) -> None:
        table = np.full((self.settings.slots, self.settings.drafts), -1, np.int32)
        for slot, draft in drafts.items():
            # a row that ends by its length has no room beyond it
            room = self._sizes.context - self._running[slot].length
            del draft[max(room, 0) :]
            table[slot, : len(draft)] = draft
        logits, tokens = self._rows.check_drafts(table)
        counts = {slot: len(draft) for slot, draft in drafts.items()}
        self.counts["draft_tokens_total"] += sum(counts.values())
        self._sent_choices(logits, tokens, dict(self._running), frozenset(), counts)

    def _allowed(self, works: dict[int, Work]) -> np.ndarray:
        """What the grammars of these rows allow, all for the others; ends those that cannot go
        on.
        """
        allowed = self._rows.all_allowed()
        for slot, work in works.items():
            assert work.mask is not None
            work.mask.fill(allowed[slot])
            if not allowed[slot].any():
                self.end(work, Failure(GptOssError("the grammar allows no token at this place")))
        return allowed

    def _read(self, step: Step) -> None:
        """Takes what the device has made."""
        tokens = np.asarray(step.wait)
        if step.logits is None:
            return
        tokens = tokens.reshape(len(tokens), -1)
        reports = [[np.asarray(x) for x in report] for report in step.reports]
        refused: dict[int, tuple[Work, int]] = {}
        for slot, work in step.works.items():
            if work.over or step.number < work.valid_from:
                continue
            row = tokens[slot].tolist()
            for column, token in enumerate(row):
                if token == -1 or work.over:
                    break
                if token == BROKEN:
                    error = GptOssError("the model's logits are not numbers")
                    self.end(work, Failure(error), broken=True)
                elif self._accept(work, token, slot in step.masked):
                    self._tell(work, token, reports[column] if reports else None)
                elif not work.over:
                    refused[slot] = work, column
                    break
            if count := step.drafts.get(slot):
                right = sum(token != -1 for token in row) - 1
                self.counts["accepted_tokens_total"] += right
                work.hits = MEMORY * work.hits + (1 - MEMORY) * right / count
        if refused:
            self._redo(step, tokens, refused)

    def _accept(self, work: Work, token: int, masked: bool) -> bool:
        """Whether the grammar of a completion, if it has one, takes the token."""
        if work.mask is None:
            return True
        good = work.mask.accept(token)
        if masked and not good:
            error = GptOssError(f"the grammar refuses token {token}, which it allowed")
            self.end(work, Failure(error))
        elif not masked:
            work.heard(good)
        return good

    def _redo(self, step: Step, tokens, refused: dict[int, tuple[Work, int]]) -> None:
        """Chooses again where a grammar refused a choice, among what it allows."""
        rows = self.settings.slots
        length, back, at = (np.zeros(rows, np.int32) for _ in range(3))
        later = self._choices()
        for slot, (work, column) in refused.items():
            length[slot], at[slot] = work.length, column
            made = int((tokens[slot] != -1).sum()) - column
            back[slot] = made + sum(s.works.get(slot) is work for s in later)
        works = {slot: work for slot, (work, _) in refused.items()}
        allowed = self._allowed(works)
        logits = step.logits
        if logits.ndim == 3:
            logits = self._rows.pick(logits, at)
        chosen = self._rows.redo(logits, allowed, length, back)
        for work in works.values():
            work.valid_from = self._number
        self._sent_choices(logits, chosen, works, frozenset(works))

    def _tell(self, work: Work, token: int, report) -> None:
        def logprob(column: int) -> TokenLogprob:
            assert report is not None
            chosen, ids, values = (part[work.slot] for part in report)
            top = slice(work.reader.top)
            pairs = tuple(zip(ids[top].tolist(), values[top].tolist(), strict=True))
            return TokenLogprob(token, float(chosen), pairs)

        work.length += 1
        work.remember(token)
        self.counts["generated_tokens_total"] += 1
        piece = work.reader.read([token], token in work.stops, logprob)
        if work.reader.finished:
            self.end(work, piece)
        elif piece.text or piece.tokens:
            work.tell(piece)

    def _begin(self) -> None:
        """What is known of rows and pages that are all free."""
        self._table = pages.PageTable(self._sizes.pages)
        self._free = list(range(self.settings.slots))
        self._sent: collections.deque[Step] = collections.deque()
        self._number = self._turns = 0

    def _choices(self) -> list[Step]:
        """Those that were sent and not read."""
        return [step for step in self._sent if step.logits is not None]

    def _next(self) -> int:
        self._number += 1
        return self._number - 1


def _oldest(works: Sequence[Work], key) -> Work:
    return min(works, key=lambda work: work.job.order)
