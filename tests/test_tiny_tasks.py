"""The conversations of gpt-oss-tiny against Python's own arithmetic, JSON and rendering."""

import json
import re

import numpy as np
import pytest

from gptoss_jax.chat.messages import EFFORTS
from gptoss_jax.chat.render import render
from gptoss_jax.tokenizer import load_tokenizer, write_kept
from gptoss_jax.train import tiny_arithmetic as arithmetic
from gptoss_jax.train import tiny_data
from gptoss_jax.train.tiny_tasks import KINDS, conversation, two_number_sum

COUNT = 150  # conversations of each kind


def conversations(kind, evaluation=False):
    return [conversation(7, i, evaluation=evaluation, kind=kind) for i in range(COUNT)]


def value(text):
    assert re.fullmatch(r"[-+*/(). \d]+", text), text
    return eval(re.sub(r"(?<!\d)0+(?=\d)", "", text))


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("operation", "+-")
def test_reasoning_adds_up(effort, operation):
    numbers = [
        *range(0, 13),
        19,
        90,
        99,
        100,
        101,
        109,
        110,
        199,
        347,
        502,
        900,
        990,
        999,
        1000,
        12345,
        99999,
    ]
    for first in numbers:
        for second in numbers:
            text = arithmetic.reasoning((first, second), operation, effort)
            expected = first + second if operation == "+" else first - second
            assert text.startswith(f"{first}{operation}{second}")
            assert arithmetic.result((first, second), operation) == expected
            columns = text.split(": ")[-1].split(",") if effort != "high" else text.split("\n")[1:]
            if effort == "low":
                totals = [int(c) for c in columns]
            else:
                equations = [re.search(r"([-+\d]+)=(-?\d+)", c).groups() for c in columns]
                assert all(value(left) == int(right) for left, right in equations)
                totals = [int(right) for _, right in equations]
            digits = "".join(str(t % 10) for t in reversed(totals))
            assert int(digits) == abs(expected)
            if effort == "high":
                so_far = [c.rsplit(", ", 1)[1] for c in columns]
                assert so_far == [digits[len(digits) - 1 - i :] for i in range(len(digits))]


def test_effort_is_length():
    for second in range(100, 400, 7):
        low, medium, high = (
            len(arithmetic.reasoning((347, second), "+", effort)) for effort in EFFORTS
        )
        assert 1.5 * low < medium < 0.6 * high


@pytest.mark.parametrize("kind", ["sum", "chain", "turns"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_answers_are_right(kind, evaluation):
    checked = 0
    for talk in conversations(kind, evaluation):
        assert talk.kind == kind
        left, equals, right = talk.answer.partition(" = ")
        if equals:
            assert value(left) == int(right)
            asked = re.findall(r"\d+", " ".join(m.content for m in talk.history))
            assert set(re.findall(r"\d+", left)) <= set(asked)
            checked += 1
    assert checked > COUNT // 2


def test_headline_sums_are_what_they_say():
    for effort in EFFORTS:
        for operation in "+-":
            for i in range(100):
                talk, expected = two_number_sum(3, i, effort, operation)
                left, right = talk.answer.split(" = ")
                numbers = [int(n) for n in re.findall(r"\d+", left)]
                assert len(numbers) == 2
                assert max(numbers) <= 999
                assert value(left) == int(right) == expected
                assert talk.settings.reasoning_effort == effort
                assert {str(n) for n in numbers} == set(
                    re.findall(r"\d+", talk.history[-1].content)
                )


def test_training_never_sees_an_evaluation_sum():
    """Two-number sums read off the reasoning itself, so that the split's own bookkeeping is not
    trusted."""

    def sums(talk):
        for message in talk.reply:
            if message.channel == "analysis":
                for a, operation, b in re.findall(r"^(\d+)([-+])(\d+)", message.content, re.M):
                    yield operation, *sorted((int(a), int(b)))

    held = {
        found
        for operation in "+-"
        for i in range(2000)
        for found in sums(two_number_sum(0, i, "high", operation)[0])
    }
    assert len(held) > 500
    trained = {found for i in range(6000) for found in sums(conversation(0, i))}
    assert len(trained) > 3000
    assert not held & trained


def test_same_arguments_same_conversation():
    assert [conversation(1, i) for i in range(50)] == [conversation(1, i) for i in range(50)]
    assert [conversation(1, i) for i in range(50)] != [conversation(2, i) for i in range(50)]


def test_every_kind_occurs():
    assert {conversation(0, i).kind for i in range(500)} == set(KINDS)


def test_stories_say_what_comes_out():
    for talk in conversations("word"):
        a, b = (int(n) for n in re.findall(r"\d+", talk.history[-1].content))
        (found,) = re.findall(r"\d+", talk.answer)
        assert int(found) in (a + b, a - b)


def test_calls_fit_the_declared_function():
    called = 0
    for talk in conversations("tool"):
        last = talk.reply[-1]
        if last.recipient is None:
            continue
        called += 1
        (tool,) = [t for t in talk.settings.tools if last.recipient == f"functions.{t.name}"]
        arguments = json.loads(last.content)
        assert set(arguments) == set(tool.parameters["properties"])
        assert isinstance(value(next(iter(arguments.values()))), int | float)
    assert called > COUNT // 2


def test_results_are_used():
    for talk in conversations("result"):
        call, result = talk.history[-2:]
        assert result.name == call.recipient
        if "rror" in result.content:
            assert talk.answer == "The function returned an error."
            continue
        left, right = talk.answer.split(" = ")
        assert value(left) == value(next(iter(json.loads(call.content).values())))
        assert right in result.content
        assert float(right) == pytest.approx(value(left), rel=1e-5)


def test_json_answers_fit_the_schema():
    for talk in conversations("json"):
        schema = talk.settings.response_format.schema
        answer = json.loads(talk.answer)
        assert list(answer) == list(schema["properties"])
        for key, content in answer.items():
            kind = schema["properties"][key]["type"]
            assert isinstance(content, str if kind == "string" else int)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_kept(folder / "kept_tokens.txt", tiny_data.vocabulary(count=1500, common=400))
    return load_tokenizer(folder)


def test_prompts_are_what_chat_renders(tokenizer):
    for index in range(200):
        talk = conversation(5, index)
        made = tiny_data.example(talk, tokenizer)
        prompt = render(talk.history, tokenizer, talk.settings)
        assert list(made.prefix + made.row)[: len(prompt)] == prompt
        learnt_early = any(made.learnt[: len(prompt) - len(made.prefix)])
        assert learnt_early == (talk.kind == "result")  # the call before its result
        assert all(made.learnt[len(prompt) - len(made.prefix) :])
        assert len(made.prefix) <= tiny_data.PREFIX
        learnt = [i for i, yes in zip(made.row, made.learnt, strict=True) if yes]
        assert tokenizer.decode(learnt).endswith(
            talk.answer + ("<|call|>" if talk.reply[-1].recipient else "<|return|>")
        )


def test_numbers_go_digit_by_digit(tokenizer):
    assert len(tokenizer.encode("What is 347 + 28519?")) == len("347") + len("28519") + len(
        ["What", " is", " ", " +", " ", "?"]
    )


def test_batches_hold_whole_groups(tokenizer):
    step = next(tiny_data.batches(tokenizer, seed=0))
    again = next(tiny_data.batches(tokenizer, seed=0))
    for batch, same, (longest, count) in zip(step, again, tiny_data.BUCKETS, strict=True):
        assert all(np.array_equal(batch[key], same[key]) for key in batch)
        assert batch["prefix"].shape == (count, tiny_data.PREFIX)
        assert batch["rows"].shape == (count * tiny_data.BRANCHES, longest + 1)
        text = tokenizer.decode(batch["prefix"][0][batch["prefix_mask"][0]].tolist())
        assert text.startswith("<|start|>system<|message|>")
        assert text.endswith("<|end|>")
        flat = batch["rows"][:, 1:].reshape(-1)[batch["learnt"][batch["weight"] > 0]]
        stops = [tokenizer.special[name] for name in ("<|return|>", "<|call|>")]
        assert np.isin(flat, stops).sum() == len(batch["rows"])
