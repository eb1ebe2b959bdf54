"""What grammars cost and hold: `python tests/measure_grammar.py [masks|costly|schemas|throughput]`.

masks: microseconds to work out a mask and to take a token, and to make a grammar, with the full
vocabulary and that of gpt-oss-tiny. costly: seconds until what would cost too much is refused.
schemas: random schemas through the real engine with gpt-oss-tiny at temperature 1.5: every answer
that ends is checked by jsonschema. throughput: tokens/s at batch 8 with grammars and without, by
turns. Needs jsonschema.
"""

import sys
import time

import numpy as np
from measure_serving import start
from schemas import NASTY, check, random_schema
from test_grammar import CITY, COSTLY, FULL, PERSON, TINY, Driver, accepts

import gptoss_jax as gj
from gptoss_jax.batching import Engine, EngineSettings, Request
from gptoss_jax.chat import messages as m
from gptoss_jax.chat.grammar import Regex, completion_grammar
from gptoss_jax.chat.parse import parse
from gptoss_jax.chat.render import render
from gptoss_jax.errors import GptOssError
from gptoss_jax.train.tiny_tasks import conversation

SCHEMAS, ROUNDS, ROWS, REQUESTS = 2000, 7, 8, 64


class Timed:
    """A grammar, and its only mask at a time, with the seconds of every call."""

    def __init__(self, grammar):
        self.grammar, self.fills, self.takes = grammar, [], []

    def mask(self):
        self.inner = self.grammar.mask()
        return self

    def fill(self, allowed):
        begun = time.perf_counter()
        self.inner.fill(allowed)
        self.fills.append(time.perf_counter() - begun)

    def accept(self, token):
        begun = time.perf_counter()
        taken = self.inner.accept(token)
        self.takes.append(time.perf_counter() - begun)
        return taken


def masks() -> None:
    asked = {
        "person": dict(response_format=PERSON),
        "any object": dict(response_format=m.ResponseFormat({"type": "object"})),
        "linked list": dict(response_format=m.ResponseFormat(NASTY["linked list"])),
        "big enum": dict(response_format=m.ResponseFormat(NASTY["big enum"])),
        "telephone": dict(response_format=m.ResponseFormat(NASTY["telephone"])),
        "300 optional": dict(response_format=m.ResponseFormat(NASTY["300 optional"])),
        "regex": dict(response_format=Regex("[A-Z][a-z]+( [A-Z][a-z]+){1,5}, born [0-9]{4}")),
        "20 strict tools": dict(
            tools=[m.Tool(f"tool_{n}", "", CITY, strict=True) for n in range(20)],
            tool_choice="required",
        ),
    }
    for name, tokenizer in (("tiny", TINY), ("full", FULL)):
        begun = time.perf_counter()
        completion_grammar(tokenizer, response_format=Regex("first"))
        print(
            f"{name}: {tokenizer.vocab_size} tokens, first grammar {time.perf_counter() - begun:.2f} s"
        )
        for kind, settings in asked.items():
            begun = time.perf_counter()
            grammar = completion_grammar(tokenizer, **settings)
            made = time.perf_counter() - begun
            timed = Timed(grammar)
            driver = Driver(tokenizer, 0)
            for _ in range(20):
                driver.finish(timed, limit=150)
            fills, takes = timed.fills, timed.takes
            a, b = 1e6 * np.percentile(fills, [50, 99])
            c, d = 1e6 * np.percentile(takes, [50, 99])
            print(
                f"  {kind:16} made in {1e3 * made:6.1f} ms; mask {a:6.0f} us (p99 {b:6.0f}), "
                f"token {c:4.0f} us (p99 {d:5.0f})"
            )


def costly() -> None:
    for name, (structure, _) in COSTLY.items():
        begun = time.perf_counter()
        try:
            completion_grammar(FULL, response_format=structure)
            answer = "taken"
        except GptOssError as error:
            answer = str(error)
        print(f"{time.perf_counter() - begun:5.2f} s  {name}: {answer[:110]}")


def schemas() -> None:
    model = gj.load("gpt-oss-tiny")
    engine = Engine(model, EngineSettings(slots=32, max_queue=10_000))
    prompt, stops = render([m.user("2 + 2")], TINY), TINY.stop_ids
    asked, refused, seed = [], 0, 100_000
    while len(asked) < SCHEMAS:
        schema, seed = random_schema(seed), seed + 1
        try:
            asked.append(
                (schema, completion_grammar(TINY, response_format=m.ResponseFormat(schema)))
            )
        except GptOssError:
            refused += 1
    asked += [
        (schema, completion_grammar(TINY, response_format=m.ResponseFormat(schema)))
        for schema in NASTY.values()
    ]
    answers: list[list[int]] = [[] for _ in asked]
    ends: list[str | None] = [None] * len(asked)
    failures = []
    begun = time.perf_counter()

    def listen(number):
        def listener(_, piece):
            if hasattr(piece, "error"):
                failures.append((asked[number][0], piece.error))
                ends[number] = "failed"
                return
            answers[number] += piece.tokens
            if piece.finish_reason:
                answers[number] += [piece.stop] if isinstance(piece.stop, int) else []
                ends[number] = piece.finish_reason

        return listener

    for number, (_, grammar) in enumerate(asked):
        sampling = gj.Sampling(temperature=1.5, seed=number, stop_token_ids=stops)
        engine.submit(Request(prompt, sampling, 400, masks=[grammar.mask()]), listen(number))
    while None in ends:
        time.sleep(0.2)
    seconds = time.perf_counter() - begun
    wrong = 0
    for (schema, _), ids, end in zip(asked, answers, ends, strict=True):
        if end != "stop":
            continue
        read = parse(ids, TINY)
        try:
            assert not read.repairs, read.repairs
            check(read.messages[-1].content, schema)
        except Exception as error:
            wrong += 1
            print("WRONG", schema, read, str(error)[:200])
    print(
        f"{len(asked)} schemas ({refused} more refused): {ends.count('stop')} answers ended, "
        f"{wrong} of them invalid; {ends.count('length')} were cut, {len(failures)} failed; "
        f"{sum(map(len, answers))} tokens in {seconds:.0f} s"
    )
    for failure in failures[:5]:
        print("FAILED", *failure)
    engine.close()


def throughput() -> None:
    model = gj.load("gpt-oss-tiny")
    engine = Engine(model, EngineSettings(slots=ROWS, pages=0))
    engine.warm_up()
    talks = [conversation(7, k, evaluation=True, kind="json") for k in range(REQUESTS)]
    prompts = [render(talk.history, TINY, talk.settings) for talk in talks]
    formats = [talk.settings.response_format for talk in talks]

    def run(constrained: bool, temperature: float, new: int, ignore: bool):
        requests = []
        for k, prompt in enumerate(prompts):
            sampling = gj.Sampling(
                temperature=temperature,
                seed=k,
                ignore_eos=ignore,
                stop_token_ids=() if ignore else TINY.stop_ids,
            )
            masks = [made(k).mask()] if constrained else []
            requests.append(Request(prompt, sampling, new, masks=masks))
        before = engine.statistics()["generated_tokens_total"]
        seconds = start(engine, requests)()[1]
        return (engine.statistics()["generated_tokens_total"] - before) / seconds

    def made(k):
        return grammars[k]

    def compare(name, temperature, new, ignore):
        run(False, temperature, new, ignore), run(True, temperature, new, ignore)
        pairs = np.array(
            [[run(c, temperature, new, ignore) for c in (False, True)] for _ in range(ROUNDS)]
        )
        free, bound = np.median(pairs, 0)
        lost = 1 - np.median(pairs[:, 1] / pairs[:, 0])
        print(f"{name}: {free:.0f} tokens/s free, {bound:.0f} with grammars, {lost:.1%} lost")

    grammars = [completion_grammar(TINY, response_format=fmt) for fmt in formats]
    good = sum(
        accepts(grammar, TINY.decode(c.tokens) + "<|return|>")
        for grammar, c in zip(
            grammars, model.generate(prompts, gj.Sampling(temperature=0), 200), strict=True
        )
    )
    print(f"{good} of {REQUESTS} greedy answers fit their format without a grammar")
    compare("JSON tasks, greedy", 0.0, 200, False)
    compare("JSON tasks, temperature 1", 1.0, 200, False)
    text = completion_grammar(TINY, [m.Tool("f", strict=True)], "none")
    grammars = [text] * REQUESTS
    compare("free text", 1.0, 128, False)
    long = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
    grammars = [completion_grammar(TINY, response_format=m.ResponseFormat(long))] * REQUESTS
    compare("a format the model does not know, temperature 1.5", 1.5, 128, True)
    engine.close()


if __name__ == "__main__":
    for part in sys.argv[1:] or ["masks", "costly", "throughput", "schemas"]:
        print(f"== {part}", flush=True)
        {"masks": masks, "costly": costly, "schemas": schemas, "throughput": throughput}[part]()
