"""Tries what a client wants as a grammar in a process of its own, so that it costs a bounded time
and cannot end the server.

llguidance works within limits of its own, but some inputs end the whole process (a stack
overflow: rules that refer to each other 5,000 deep) or take very long (multiples of 999983). The
process that tries has a byte for a token, 1.5 s of processor time and a stack eight times smaller
than the one it protects. It compiles the grammar, and walks through it at random: a walk that
nothing can continue shows a grammar with dead ends. `python -m gptoss_jax.chat.grammar_trial` is
that process; a line of JSON in, a line out.
"""

import atexit
import functools
import json
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptoss_jax.errors import GptOssError

if TYPE_CHECKING:
    import llguidance

SECONDS = 1.5  # of processor time
PATIENCE = 30.0  # seconds of waiting, where the machine is busy
MEMORY, STACK = 4 << 30, 1 << 20  # bytes
WALKS, STEPS = 4, 120
LIMITS = {
    "max_items_in_row": 10_000,
    "step_max_items": 100_000,
    "max_lexer_states": 100_000,
    "verbose_errors": False,
}
_EOS, _STOP = 256, 257  # tokens of its's vocabulary, after the bytes

_lock = threading.Lock()
_child: "subprocess.Popen[str] | None" = None


def try_grammars(grammars: Sequence[str], what: str) -> None:
    """Returns if every grammar compiles and can be walked through: each one of llguidance's, as
    JSON, without control tokens.

    Raises:
      GptOssError: It does not, or takes too long.
      Busy: There was no answer yet.
    """
    answer = _ask(tuple(grammars))
    if answer is None:
        raise GptOssError(
            f"{what}: it takes more than {SECONDS} s or too much memory to work out: make it "
            "simpler"
        )
    if answer:
        raise GptOssError(f"{what}: {answer}")


@functools.lru_cache(maxsize=64)  # refusals too: a second one costs nothing
def _ask(grammars: tuple[str, ...]) -> str | None:
    """What is wrong with the grammars: "" if nothing, None if trying it ended the process."""
    with _lock:
        child = _start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(grammars) + "\n")
            child.stdin.flush()
            ready, _, _ = select.select([child.stdout], [], [], PATIENCE)
            line = child.stdout.readline() if ready else None
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        _close()
        if line is None:
            from gptoss_jax.batching.requests import Busy  # loads jax, which the trial does without

            raise Busy(f"the machine is busy, a grammar waited {PATIENCE} s: try again later")
        return None


def _start() -> "subprocess.Popen[str]":
    global _child
    if _child is None or _child.poll() is not None:
        _close()
        _child = subprocess.Popen(
            [sys.executable, "-m", "gptoss_jax.chat.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
    return _child


@atexit.register
def _close() -> None:
    global _child
    if _child is not None:
        _child.kill()
        _child.communicate()
        _child = None


def first_line(error: str) -> str:
    """What llguidance says, without the grammar and state that follow."""
    lines = error.strip().splitlines() or ["it is not a grammar"]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = " ".join([lines[0], *reasons])
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-90:]}"


def try_here(part: str) -> str:
    """What is wrong with the grammar, or ""; what the process that tries does with each."""
    import llguidance as ll

    whole = {"lark_grammar": f"start: @part <[{_STOP}]>"}  # a control token follows, as it will
    grammar = json.dumps({"grammars": [whole, {"name": "part", **json.loads(part)}]})
    matcher = ll.LLMatcher(_bytes(), grammar, log_level=0, limits=ll.LLParserLimits(**LIMITS))
    if matcher.is_error():
        return first_line(matcher.get_error())
    choose = random.Random(0)
    for _ in range(WALKS):
        walk = matcher.deep_copy()
        for _ in range(STEPS):
            mask = int.from_bytes(walk.compute_bitmask(), "little")
            if walk.is_error() or walk.is_stopped() or not mask:
                return f"it leads to a dead end ({first_line(walk.get_error())})"
            token = choose.choice([token for token in range(_STOP + 1) if mask >> token & 1])
            if not walk.consume_token(token):
                return f"it leads to a dead end ({first_line(walk.get_error())})"
            if token == _STOP:
                break
    return ""


@functools.cache
def _bytes() -> "llguidance.LLTokenizer":
    import llguidance as ll

    class Bytes:
        eos_token_id = _EOS
        bos_token_id = None
        tokens = (*(bytes([byte]) for byte in range(256)), b"<|eos|>", b"<|stop|>")
        special_token_ids = (_EOS, _STOP)

        def __call__(self, text: bytes | str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return ll.LLTokenizer(ll.TokenizerWrapper(Bytes()), slices=[])


def _serve() -> None:
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        answer = next(filter(None, map(try_here, json.loads(line))), "")
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])  # whoever started it blocked it
    threading.stack_size(STACK)
    server = threading.Thread(target=_serve)
    server.start()
    server.join()


if __name__ == "__main__":
    _main()
