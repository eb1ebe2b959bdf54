"""Conversations that gpt-oss-tiny learns from: sums, calculator calls, JSON answers, small talk and
honest refusals.

Every conversation is a function of (seed, split, index). Knows plain text and dicts; knows no
tokens, no model.
"""

import dataclasses
import json
import random

from gptoss_jax.chat.messages import (
    CONSTRAIN_JSON,
    EFFORTS,
    ChatSettings,
    Message,
    ResponseFormat,
    Tool,
)
from gptoss_jax.train import tiny_arithmetic as arithmetic
from gptoss_jax.train import tiny_phrases as phrases

KINDS = {
    "sum": 42, "word": 9, "chain": 5, "turns": 8, "tool": 3, "result": 11, "json": 11,
    "talk": 4, "refuse": 7,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt and the reply to learn.

    Attributes:
      kind: One of KINDS.
      settings: What the system and developer messages say: effort, date, instructions, tools,
        response format.
      history: Messages up to the user's last, or up to a tool's result with the reasoning and the
        call before it.
      reply: The assistant's messages, up to a final answer or a call.
      answer: What the last message of the reply must say.
    """

    kind: str
    settings: ChatSettings
    history: tuple[Message, ...]
    reply: tuple[Message, ...]
    answer: str


def conversation(
    seed: int,
    index: int,
    *,
    evaluation: bool = False,
    kind: str | None = None,
    effort: str | None = None,
    wide: bool = False,
) -> Conversation:
    """The index-th conversation of a seed.

    Args:
      seed: Any integer.
      index: Position in the stream.
      evaluation: Draws only held-out sums; training draws none of them.
      kind: One of KINDS; drawn by their weights if None.
      effort: One of EFFORTS; drawn if None.
      wide: Functions have several names and word problems are answered with their nouns: what the
        first stage of training sees, and more than the model masters.

    Returns:
      The conversation; the same arguments give the same one.
    """
    rng = random.Random(f"{seed}/{evaluation}/{index}")
    kind_drawn = rng.choices(list(KINDS), list(KINDS.values()))[0]
    effort_drawn = rng.choices(EFFORTS, (3, 3, 4))[0]
    return _MAKERS[kind or kind_drawn](rng, effort or effort_drawn, evaluation, wide)


def two_number_sum(seed: int, index: int, effort: str, operation: str) -> tuple[Conversation, int]:
    """A held-out sum of two numbers of one to three digits, asked plainly: what the headline
    accuracy is measured on.

    Returns:
      The conversation and the number that its answer must hold.
    """
    rng = random.Random(f"{seed}/headline/{index}/{effort}/{operation}")
    while True:
        pair = (_number(rng, (0, 20, 30, 50)), _number(rng, (0, 20, 30, 50)))
        if arithmetic.held_out(operation, *pair):
            break
    return _sum(rng, effort, pair, operation, "sum", plain=True), arithmetic.result(pair, operation)


def _number(rng: random.Random, weights=(0, 18, 30, 44, 5, 3)) -> int:
    length = rng.choices(range(len(weights)), weights)[0]
    hard = rng.random() < 0.2
    digits = [
        rng.choice("0019") if hard and rng.random() < 0.6 else rng.choice("0123456789")
        for _ in range(length)
    ]
    if length > 1 and digits[0] == "0":
        digits[0] = rng.choice("123456789")
    return int("".join(digits))


def _draw(
    rng: random.Random, operations: str, evaluation: bool, weights=(0, 18, 30, 44, 5, 3)
) -> tuple[int, ...]:
    """Operands whose every partial sum is held out (evaluation) or is not (training)."""
    while True:
        numbers = tuple(_number(rng, weights) for _ in range(len(operations) + 1))
        if len(numbers) == 2 and rng.random() < 0.08:
            digits = list(str(numbers[0]))
            digits[rng.randrange(len(digits))] = rng.choice("0123456789")
            numbers = (numbers[0], int("".join(digits)))
        steps, value = [], numbers[0]
        for i, operation in enumerate(operations):
            steps.append(arithmetic.held_out(operation, value, numbers[i + 1]))
            value = arithmetic.result((value, numbers[i + 1]), operation)
            if value < 0 and i + 1 < len(operations):
                break
        else:
            # A chain has some held-out step in the evaluation: all of them would leave hardly any
            # chain.
            if any(steps) if evaluation else not any(steps):
                return numbers


def _wrap(rng, kind, effort, history, reply, *, tools=(), response_format=None) -> Conversation:
    date = f"{rng.randint(2023, 2039)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    instructions = rng.choice(phrases.INSTRUCTIONS) if rng.random() < 0.08 else None
    settings = ChatSettings(effort, date, instructions, tuple(tools), response_format)
    return Conversation(kind, settings, tuple(history), tuple(reply), reply[-1].content)


def _user(text: str) -> Message:
    return Message("user", text)


def _answered(analysis: str, final: str, content_type: str | None = None) -> list[Message]:
    before = [Message("assistant", analysis, "analysis")] if analysis else []
    return [*before, Message("assistant", final, "final", content_type=content_type)]


def _sum(rng, effort, numbers, operations, kind, plain=False) -> Conversation:
    ask = phrases.ask_sum(rng, numbers, operations, plain=plain)
    value = arithmetic.result(numbers, operations)
    final = f"{arithmetic.expression(numbers, operations, ' ')} = {value}"
    reply = _answered(arithmetic.reasoning(numbers, operations, effort), final)
    return _wrap(rng, kind, effort, [_user(ask)], reply)


def _equation(numbers, operations) -> str:
    value = arithmetic.result(numbers, operations)
    return f"{arithmetic.expression(numbers, operations, ' ')} = {value}"


def _make_sum(rng, effort, evaluation, wide) -> Conversation:
    operation = rng.choice("+-")
    return _sum(rng, effort, _draw(rng, operation, evaluation), operation, "sum")


def _make_chain(rng, effort, evaluation, wide) -> Conversation:
    operations = rng.choice(("++", "++", "+-", "-+", "--"))
    return _sum(
        rng, effort, _draw(rng, operations, evaluation, (0, 35, 45, 20)), operations, "chain"
    )


def _make_word(rng, effort, evaluation, wide) -> Conversation:
    operation = rng.choice("+-")
    while True:
        numbers = _draw(rng, operation, evaluation, (0, 25, 40, 35))
        if arithmetic.result(numbers, operation) >= 0:
            break
    value = arithmetic.result(numbers, operation)
    ask, final = phrases.ask_story(rng, numbers, operation, value, wide)
    return _wrap(
        rng,
        "word",
        effort,
        [_user(ask)],
        _answered(arithmetic.reasoning(numbers, operation, effort), final),
    )


def _make_turns(rng, effort, evaluation, wide) -> Conversation:
    """Earlier turns keep their final answers only; a follow-up may build on the last result."""
    history: list[Message] = []
    last = None
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.2:
            ask, _, _, final = phrases.talk(rng)
            last = None
        else:
            operation = rng.choice("+-")
            numbers = _draw(rng, operation, False, (0, 30, 40, 30))
            last = arithmetic.result(numbers, operation)
            ask, final = (
                phrases.ask_sum(rng, numbers, operation),
                f"{arithmetic.expression(numbers, operation, ' ')} = {last}",
            )
        history += [_user(ask), Message("assistant", final, "final")]
    roll = rng.random()
    if last is not None and last >= 0 and roll < 0.5:
        operation = rng.choice("+-")
        for _ in range(200):
            number = _number(rng, (0, 40, 40, 20))
            if arithmetic.held_out(operation, last, number) == evaluation:
                break
        else:
            return _make_sum(rng, effort, evaluation, wide)
        numbers = (last, number)
        ask = phrases.ask_follow_up(rng, operation, number)
    elif roll < 0.9:
        operation = rng.choice("+-")
        numbers = _draw(rng, operation, evaluation)
        ask = phrases.ask_sum(rng, numbers, operation)
    else:
        ask, medium, high, final = phrases.talk(rng)
        analysis = {"low": "", "medium": medium, "high": high}[effort]
        return _wrap(rng, "turns", effort, [*history, _user(ask)], _answered(analysis, final))
    final = _equation(numbers, operation)
    reply = _answered(arithmetic.reasoning(numbers, operation, effort), final)
    return _wrap(rng, "turns", effort, [*history, _user(ask)], reply)


def _make_tool(rng, effort, evaluation, wide) -> Conversation:
    tools, call = _declared(rng, wide)
    if rng.random() < 0.1:
        ask, medium, high, final = phrases.talk(rng)
        analysis = {"low": "", "medium": medium, "high": high}[effort]
        return _wrap(rng, "tool", effort, [_user(ask)], _answered(analysis, final), tools=tools)
    text, ask, _ = phrases.ask_calculation(rng)
    reply = call(text, effort)
    return _wrap(rng, "tool", effort, [_user(ask)], reply, tools=tools)


def _make_result(rng, effort, evaluation, wide) -> Conversation:
    """The answer after a call: the reasoning and the call are part of the prompt."""
    tools, call = _declared(rng, wide)
    text, ask, value = phrases.ask_calculation(rng)
    output = rng.choice(
        (
            value,
            value,
            value,
            json.dumps({"result": value}),
            json.dumps({"result": json.loads(value)}),
        )
    )
    final = f"{text if '(' in text else phrases.spaced(text)} = {value}"
    if rng.random() < 0.08:
        output = rng.choice(
            ("error", "Error: invalid expression", "error: not available", '{"error": "failed"}')
        )
        final = "The function returned an error."
    called = call(text, effort)
    history = [
        _user(ask),
        *called,
        Message("tool", output, "commentary", "assistant", called[-1].recipient),
    ]
    return _wrap(rng, "result", effort, history, _answered("", final), tools=tools)


def _declared(rng, wide):
    """Declared functions, and a maker of the call's messages: (expression, effort) -> analysis,
    call."""
    function = phrases.calculator(rng, wide)
    functions = [function]
    if rng.random() < 0.2:
        functions.insert(rng.randrange(2), phrases.other_function(rng, function["name"]))
    key = next(iter(function["parameters"]["properties"]))

    def call(text: str, effort: str) -> list[Message]:
        analysis = {
            "low": "",
            "medium": f"Call {function['name']}.",
            "high": f"The user asks for {text}. I call {function['name']} with {key}.",
        }[effort]
        arguments = json.dumps({key: text}, separators=(",", ":"))
        before = [Message("assistant", analysis, "analysis")] if analysis else []
        name = f"functions.{function['name']}"
        return [
            *before,
            Message("assistant", arguments, "commentary", name, content_type=CONSTRAIN_JSON),
        ]

    return [Tool(**function) for function in functions], call


def _make_json(rng, effort, evaluation, wide) -> Conversation:
    operation = rng.choice("+-")
    numbers = _draw(rng, operation, evaluation, (0, 25, 35, 40))
    value = arithmetic.result(numbers, operation)
    response_format = ResponseFormat(**phrases.json_format(rng))
    properties = response_format.schema["properties"]
    filled = {}
    for key, schema in properties.items():
        is_text = schema["type"] == "string"
        alone = len(properties) == 1
        filled[key] = (
            (str(value) if alone else arithmetic.expression(numbers, operation))
            if is_text
            else value
        )
    final = json.dumps(filled, separators=(",", ":"))
    ask = phrases.ask_sum(rng, numbers, operation)
    reply = _answered(arithmetic.reasoning(numbers, operation, effort), final, CONSTRAIN_JSON)
    return _wrap(rng, "json", effort, [_user(ask)], reply, response_format=response_format)


def _make_talk(rng, effort, evaluation, wide) -> Conversation:
    ask, medium, high, final = phrases.talk(rng)
    analysis = {"low": "", "medium": medium, "high": high}[effort]
    return _wrap(rng, "talk", effort, [_user(ask)], _answered(analysis, final))


def _make_refuse(rng, effort, evaluation, wide) -> Conversation:
    ask, medium, high, final = phrases.refuse(rng)
    analysis = {"low": "", "medium": medium, "high": high}[effort]
    return _wrap(rng, "refuse", effort, [_user(ask)], _answered(analysis, final))


_MAKERS = {
    "sum": _make_sum,
    "word": _make_word,
    "chain": _make_chain,
    "turns": _make_turns,
    "tool": _make_tool,
    "result": _make_result,
    "json": _make_json,
    "talk": _make_talk,
    "refuse": _make_refuse,
}
