"""Rows of every form against openai-harmony's own tokens and masks written by hand; what is refused
and what it says; what is left out and counted."""

import gzip
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import openai_harmony as oh
import pytest
from fakes import harmony_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gptoss_jax.chat.render import harmony
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import load_tokenizer
from gptoss_jax.train import preview
from gptoss_jax.train.pipeline import Batches, BatchSettings
from gptoss_jax.train.read import read
from gptoss_jax.train.samples import PINNED_DATE, SampleSettings, load_samples, make_samples

FULL = load_tokenizer()
TINY = load_tokenizer(Path(__file__).parent.parent / "gptoss_jax" / "assets" / "gpt-oss-tiny")
A, U = oh.Role.ASSISTANT, oh.Role.USER
CALC = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Computes.",
        "parameters": {
            "type": "object",
            "properties": {"e": {"type": "string"}},
            "required": ["e"],
        },
    },
}


# what openai-harmony is told: nothing of our chat rooms takes part


def said(text, channel, recipient=None):
    message = oh.Message.from_role_and_content(A, text).with_channel(channel)
    if recipient:
        message = message.with_recipient(recipient).with_content_type("<|constrain|>json")
    return message


def asked(text):
    return oh.Message.from_role_and_content(U, text)


def returned(name, text):
    author = oh.Author(role=oh.Role.TOOL, name=name)
    message = oh.Message.from_author_and_content(author, text)
    return message.with_recipient("assistant").with_channel("commentary")


def harmony_tokens(messages, effort="MEDIUM", instructions=None, tools=False, identity=None):
    content = oh.SystemContent.new().with_conversation_start_date(PINNED_DATE)
    content = content.with_reasoning_effort(oh.ReasoningEffort[effort])
    if identity:
        content = content.with_model_identity(identity)
    head = [oh.Message.from_role_and_content(oh.Role.SYSTEM, content)]
    if instructions or tools:
        content = oh.DeveloperContent.new()
        if instructions:
            content = content.with_instructions(instructions)
        if tools:
            f = CALC["function"]
            tool = oh.ToolDescription.new(f["name"], f["description"], f["parameters"])
            content = content.with_function_tools([tool])
        head.append(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content))
    return harmony().render_conversation_for_training(
        oh.Conversation.from_messages([*head, *messages]),
        oh.RenderConversationConfig(auto_drop_analysis=False),
    )


def call(function, arguments, **keys):
    return {"type": "function", "function": {"name": function, "arguments": arguments}, **keys}


LOOP = [
    {"role": "user", "content": "2+2?"},
    {
        "role": "assistant",
        "thinking": "use calc",
        "content": "I compute.",
        "tool_calls": [call("calc", {"e": "2+2"}, id="c1")],
    },
]
LOOP_TEXT = (
    "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
    "{a:<|channel|>analysis<|message|>use calc<|end|>}"
    "{c:<|start|>assistant<|channel|>commentary<|message|>I compute.<|end|>}"
    "{c:<|start|>assistant to=functions.calc<|channel|>commentary <|constrain|>json<|message|>"
    '{"e": "2+2"}<|call|>}'
)
LOOP_SAID = [
    asked("2+2?"),
    said("use calc", "analysis"),
    said("I compute.", "commentary"),
    said('{"e": "2+2"}', "commentary", "functions.calc"),
]
RESULT_TEXT = (
    "<|start|>functions.calc to=assistant<|channel|>commentary<|message|>4<|end|><|start|>assistant"
)
HELLO = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "thinking": "greet", "content": "hello"},
]
# Row, then for each of its samples: what harmony is told, and its tail with {channel:what is learnt}
CASES = {
    "plain": (
        {"messages": HELLO},
        [
            (
                dict(messages=[asked("hi"), said("greet", "analysis"), said("hello", "final")]),
                "<|start|>user<|message|>hi<|end|><|start|>assistant"
                "{a:<|channel|>analysis<|message|>greet<|end|>}"
                "{f:<|start|>assistant<|channel|>final<|message|>hello<|return|>}",
            )
        ],
    ),
    "effort, identity and instructions": (
        {
            "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
            "chat_template_kwargs": {
                "reasoning_effort": "high",
                "model_identity": "You are a test.",
                "builtin_tools": None,
            },
        },
        [
            (
                dict(
                    messages=[asked("hi"), said("greet", "analysis"), said("hello", "final")],
                    effort="HIGH",
                    identity="You are a test.",
                    instructions="Be brief.",
                ),
                "<|start|>user<|message|>hi<|end|><|start|>assistant"
                "{a:<|channel|>analysis<|message|>greet<|end|>}"
                "{f:<|start|>assistant<|channel|>final<|message|>hello<|return|>}",
            )
        ],
    ),
    "answer without reasoning": (
        {"messages": [HELLO[0], {"role": "assistant", "content": "hello"}]},
        [
            (
                dict(messages=[asked("hi"), said("hello", "final")]),
                "<|start|>user<|message|>hi<|end|><|start|>assistant"
                "{f:<|channel|>final<|message|>hello<|return|>}",
            )
        ],
    ),
    "tools, loop not finished": (
        {"messages": LOOP, "tools": [CALC]},
        [(dict(messages=LOOP_SAID, tools=True), LOOP_TEXT)],
    ),
    "tools, loop finished": (
        {
            "messages": [
                *LOOP,
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
                {"role": "assistant", "reasoning": "done", "content": "4"},
            ],
            "tools": json.dumps([CALC]),
            "reasoning_effort": "low",
        },
        [
            (
                dict(
                    messages=[
                        *LOOP_SAID,
                        returned("functions.calc", "4"),
                        said("done", "analysis"),
                        said("4", "final"),
                    ],
                    tools=True,
                    effort="LOW",
                ),
                LOOP_TEXT + RESULT_TEXT + "{a:<|channel|>analysis<|message|>done<|end|>}"
                "{f:<|start|>assistant<|channel|>final<|message|>4<|return|>}",
            )
        ],
    ),
    "a call opens the turn, the result names nobody": (
        {
            "messages": [
                LOOP[0],
                {"role": "assistant", "tool_calls": [{"name": "calc", "arguments": '{"e":"2"}'}]},
                {"role": "tool", "content": "4"},
                {"role": "assistant", "content": "4"},
            ],
            "tools": [CALC],
        },
        [
            (
                dict(
                    messages=[
                        asked("2+2?"),
                        said('{"e":"2"}', "commentary", "functions.calc"),
                        returned("functions.calc", "4"),
                        said("4", "final"),
                    ],
                    tools=True,
                ),
                "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
                "{c: to=functions.calc<|channel|>commentary <|constrain|>json<|message|>"
                '{"e":"2"}<|call|>}' + RESULT_TEXT + "{f:<|channel|>final<|message|>4<|return|>}",
            )
        ],
    ),
    # the second sample sees the first turn without its reasoning and does not learn it; the
    # reasoning of its own unfinished loop stays
    "several turns": (
        {"messages": [*HELLO, *LOOP], "tools": [CALC]},
        [
            (
                dict(
                    messages=[asked("hi"), said("greet", "analysis"), said("hello", "final")],
                    tools=True,
                ),
                "<|start|>user<|message|>hi<|end|><|start|>assistant"
                "{a:<|channel|>analysis<|message|>greet<|end|>}"
                "{f:<|start|>assistant<|channel|>final<|message|>hello<|return|>}",
            ),
            (
                dict(messages=[asked("hi"), said("hello", "final"), *LOOP_SAID], tools=True),
                "<|start|>user<|message|>hi<|end|>"
                "<|start|>assistant<|channel|>final<|message|>hello<|end|>" + LOOP_TEXT,
            ),
        ],
    ),
    "weights of messages": (
        {
            "messages": [
                HELLO[0],
                {**HELLO[1], "weight": 0},
                LOOP[0],
                {**LOOP[1], "train": False},
                {"role": "tool", "name": "calc", "content": "4"},
                {"role": "assistant", "content": "4", "weight": 1},
            ],
            "tools": [CALC],
        },
        [
            (
                dict(
                    messages=[
                        asked("hi"),
                        said("hello", "final"),
                        *LOOP_SAID,
                        returned("functions.calc", "4"),
                        said("4", "final"),
                    ],
                    tools=True,
                ),
                re.sub(r"\{[ac]:(.*?)(<\|end\|>|<\|call\|>)\}", r"\1\2", LOOP_TEXT)
                + RESULT_TEXT
                + "{f:<|channel|>final<|message|>4<|return|>}",
            )
        ],
    ),
}
EVERY = [(name, number) for name, (_, found) in CASES.items() for number in range(len(found))]
MARK = re.compile(r"\{([acf]):(.*?<\|(?:end|call|return)\|>)\}")


def expected(name, number, weights=None):
    """Ids from harmony, weights from the marks, and the texts that are learnt."""
    told, golden = CASES[name][1][number]
    weights = weights or {"a": 1.0, "c": 1.0, "f": 1.0}
    ids, learnt, texts = [], [], []
    at = 0
    for mark in [*MARK.finditer(golden), None]:
        before = golden[at : mark.start() if mark else len(golden)]
        ids += harmony_ids(before)
        learnt += [0.0] * (len(ids) - len(learnt))
        if mark:
            at = mark.end()
            ids += harmony_ids(mark[2])
            learnt += [weights[mark[1]]] * (len(ids) - len(learnt))
            texts.append(mark[2])
    whole = harmony_tokens(**told)
    assert whole[-len(ids) :] == ids  # the golden text is harmony's own
    return whole, [0.0] * (len(whole) - len(ids)) + learnt, "".join(texts)


def test_goldens_hold_every_kind_of_mark():
    texts = [golden for _, found in CASES.values() for _, golden in found]
    assert {m[1] for text in texts for m in MARK.finditer(text)} == {"a", "c", "f"}


@pytest.mark.parametrize("name", CASES)
def test_number_of_samples(name):
    assert len(make_samples([CASES[name][0]], FULL).samples) == len(CASES[name][1])


@pytest.mark.parametrize(("name", "number"), EVERY)
def test_tokens_and_mask(name, number):
    sample = make_samples([CASES[name][0]], FULL).samples[number]
    ids, weights, _ = expected(name, number)
    assert sample.tokens.tolist() == ids
    assert sample.weights.tolist() == weights
    assert sample.tokens.dtype == np.int32
    assert sample.weights.dtype == np.float32


@pytest.mark.parametrize(("name", "number"), EVERY)
def test_weights_of_channels(name, number):
    given = SampleSettings(analysis_weight=0.25, commentary_weight=2.0, final_weight=0.5)
    sample = make_samples([CASES[name][0]], FULL, given).samples[number]
    _, weights, _ = expected(name, number, {"a": 0.25, "c": 2.0, "f": 0.5})
    assert sample.weights.tolist() == weights


@pytest.mark.parametrize(("name", "number"), EVERY)
def test_the_small_vocabulary_learns_the_same_text(name, number):
    sample = make_samples([CASES[name][0]], TINY).samples[number]
    ids, _, text = expected(name, number)
    assert TINY.decode(sample.tokens.tolist()) == FULL.decode(ids)
    assert TINY.decode(sample.tokens[sample.weights > 0].tolist()) == text


def test_answers_alone_can_be_learnt():
    only = SampleSettings(analysis_weight=0, commentary_weight=0)
    sample = make_samples([CASES["tools, loop finished"][0]], FULL, only).samples[0]
    assert FULL.decode(sample.tokens[sample.weights > 0].tolist()) == (
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


def test_last_turn_alone():
    row = CASES["several turns"][0]
    last = make_samples([row], FULL, SampleSettings(multi_turn="last")).samples
    assert [s.tokens.tolist() for s in last] == [expected("several turns", 1)[0]]
    # a question without an answer at the end is no turn
    open_end = {**row, "messages": [*row["messages"], HELLO[0]]}
    again = make_samples([open_end], FULL, SampleSettings(multi_turn="last")).samples
    assert again[0].tokens.tolist() == last[0].tokens.tolist()


def test_the_date_is_pinned(monkeypatch):
    class Clock:
        @staticmethod
        def today():
            raise AssertionError("training data must not look at the clock")

    monkeypatch.setattr(
        "gptoss_jax.chat.render.datetime", types.SimpleNamespace(date=Clock), raising=True
    )
    texts = [
        FULL.decode(make_samples([{"messages": HELLO}], FULL, s).samples[0].tokens.tolist())
        for s in (None, SampleSettings(date="2031-02-03"))
    ]
    assert f"Current date: {PINNED_DATE}\n" in texts[0]
    assert "Current date: 2031-02-03\n" in texts[1]


# forms that say the same


def same(row, other, **keys):
    ours, theirs = (make_samples([r], FULL, SampleSettings(**keys)).samples for r in (row, other))
    assert [s.tokens.tolist() for s in ours] == [s.tokens.tolist() for s in theirs]
    assert [s.weights.tolist() for s in ours] == [s.weights.tolist() for s in theirs]


PLAIN = {"messages": [HELLO[0], {"role": "assistant", "content": "hello"}]}
TOLD = {"messages": [{"role": "developer", "content": "Be brief."}, *HELLO]}
CALLED = CASES["a call opens the turn, the result names nobody"][0]
FORMS = {
    "reasoning_content": (
        {"messages": [HELLO[0], {"role": "assistant", "reasoning_content": "greet", "content": "hello"}]},
        {"messages": HELLO},
    ),
    "nulls everywhere": (
        {
            "messages": [
                {"role": "user", "content": "hi", "thinking": None, "tool_calls": None, "name": None},
                {"role": "assistant", "content": "hello", "thinking": "greet", "tool_calls": None, "weight": None},
            ],
            "tools": None,
            "chat_template_kwargs": None,
            "text": None,
            "prompt": None,
        },
        {"messages": HELLO},
    ),
    "empty keys of a table": (
        {"messages": [{**HELLO[0], "tool_calls": [], "thinking": ""}, {**HELLO[1], "tool_calls": []}]},
        {"messages": HELLO},
    ),
    "messages as JSON text": ({"messages": json.dumps(HELLO)}, {"messages": HELLO}),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, HELLO[1]]},
        {"messages": HELLO},
    ),
    "prompt and completion": ({"prompt": "hi", "completion": "hello"}, PLAIN),
    "lists of messages": ({"prompt": HELLO[:1], "completion": HELLO[1:]}, {"messages": HELLO}),
    "system is developer": (
        {"messages": [{"role": "system", "content": "Be brief."}, *HELLO]},
        TOLD,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        PLAIN,
    ),
    "ShareGPT with a system column": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "user", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": 1}],
        },
        {"messages": [TOLD["messages"][0], *PLAIN["messages"]]},
    ),
    "ShareGPT with calls": (
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "calc", "arguments": "{\\"e\\":\\"2\\"}"}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "tools": json.dumps([CALC["function"]]),
        },
        CALLED,
    ),
    "Multilingual-Thinking": (
        {"reasoning_language": "French", "developer": "Be brief.", "user": "hi", "analysis": "greet", "final": "hello"},
        {"messages": [{"role": "system", "content": "reasoning language: French\n\nBe brief."}, *HELLO]},
    ),
    "Multilingual-Thinking's messages come first": (
        {"developer": "x", "user": "y", "analysis": None, "final": "z", "messages": HELLO},
        {"messages": HELLO},
    ),
    "raw harmony in content": (
        {
            "messages": [
                HELLO[0],
                {
                    "role": "assistant",
                    "content": "<|channel|>analysis<|message|>greet<|end|><|start|>assistant"
                    "<|channel|>final<|message|>hello<|return|>",
                },
            ]
        },
        {"messages": HELLO},
    ),
    "raw harmony, the answer alone": (
        {"messages": [HELLO[0], {"role": "assistant", "content": "<|channel|>final<|message|>hello"}]},
        PLAIN,
    ),
    "arguments as an object": (
        {
            "messages": [
                LOOP[0],
                {"role": "assistant", "tool_calls": [{"function": {"name": "calc", "arguments": {"e": "2"}}, "type": None}]},
                {"role": "tool", "name": "functions.calc", "content": {"v": 4}},
                {"role": "assistant", "content": "4"},
            ],
        },
        {
            "messages": [
                LOOP[0],
                {"role": "assistant", "tool_calls": [{"id": 7, "name": "calc", "arguments": '{"e": "2"}'}]},
                {"role": "tool", "tool_call_id": "7", "content": '{"v": 4}'},
                {"role": "assistant", "content": "4"},
            ],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_say_the_same(name):
    same(*FORMS[name])


def test_results_without_names_answer_the_calls_in_order():
    def row(first, second):
        two = {"role": "assistant", "tool_calls": [call("one", {}), call("two", {})]}
        results = [{"role": "tool", "content": t, **n} for t, n in (("1", first), ("2", second))]
        return {"messages": [LOOP[0], two, *results, {"role": "assistant", "content": "x"}]}

    same(row({}, {}), row({"name": "one"}, {"name": "two"}))
    same(row({"name": "two"}, {}), row({"name": "two"}, {"name": "one"}))


def test_a_call_that_nobody_answered_waits_no_longer_than_its_turn():
    late = [*LOOP, HELLO[0], {"role": "tool", "content": "4"}, HELLO[1]]
    with pytest.raises(
        GptOssError, match=r"message 3: the tool result has no name .* no call waits"
    ):
        make_samples([{"messages": late}], FULL)


def test_only_the_completion_is_learnt():
    row = {"prompt": [*HELLO, LOOP[0]], "completion": [{"role": "assistant", "content": "4"}]}
    (sample,) = make_samples([row], FULL).samples
    assert FULL.decode(sample.tokens[sample.weights > 0].tolist()) == (
        "<|channel|>final<|message|>4<|return|>"
    )
    same(row, {"messages": [*HELLO, LOOP[0], *row["completion"]]}, multi_turn="last")


def test_a_text_is_learnt_to_its_end():
    (sample,) = make_samples([{"text": "one two <|end|> three"}], FULL).samples
    assert FULL.decode(sample.tokens.tolist()) == "one two <|end|> three<|endoftext|>"
    assert sample.tokens.tolist()[:-1] == FULL.encode("one two <|end|> three")
    assert sample.weights.tolist() == [0] + [1] * (len(sample) - 1)


def test_control_text_of_a_user_stays_text():
    row = {
        "messages": [{"role": "user", "content": "<|start|>assistant<|channel|>final"}, HELLO[1]]
    }
    (sample,) = make_samples([row], FULL).samples
    assert (sample.tokens == FULL.special["<|start|>"]).sum() == 4  # system, user, assistant twice


# broken data


def write(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


GOOD = {"messages": HELLO}


def one(**keys):
    return {"messages": [HELLO[0], {"role": "assistant", **keys}]}


BAD = {
    '{"messages": [': r":2: not JSON \(Expecting value at column 15\): give one whole JSON object a line",
    "[1]": ":2: expected a JSON object a line, got a list",
    "3": ":2: expected a JSON object a line, got a int",
    '{"question": "x"}': r":2: no conversation in the columns 'question': expected messages,",
    '{"messages": []}': ":2: messages is empty: expected a list of messages",
    '{"messages": {"a": 1}}': ":2: expected messages as a list",
    '{"messages": "hi"}': ":2: messages is text that is not JSON: 'hi'",
    '{"messages": [7]}': ":2: message 0: expected a dict with role and content, got 7",
    json.dumps({"messages": [{"role": "robot", "content": "x"}, HELLO[1]]}): ":2: message 0: unknown role 'robot': use system, developer, user, assistant or tool",
    json.dumps({"conversations": [{"from": "alien", "value": "x"}]}): ":2: conversations, turn 0: unknown role 'alien' or no value: use from",
    json.dumps({"messages": HELLO[:1]}): ":2: no assistant message: there is nothing to learn",
    json.dumps(one(content="")): ":2: the assistant says nothing in turn 1",
    json.dumps(one(content=None)): ":2: the assistant says nothing in turn 1",
    json.dumps(one(content="x", weight=0)): ":2: nothing to learn: every weight is 0",
    json.dumps(one(content="x", weight=-1)): ":2: message 1: weight is -1: expected 0, 1 or a positive number",
    json.dumps(one(content="x", train="yes")): ":2: message 1: train is 'yes': expected 0, 1",
    json.dumps(one(content="x", weight=1, train=False)): ":2: message 1: weight and train disagree: keep one",
    json.dumps({"messages": [{**HELLO[0], "weight": 1}, HELLO[1]]}): ":2: message 0: weight is 1 in a message of role 'user': only what the assistant says is learnt",
    json.dumps(one(content="x", channel="final")): ":2: message 1: key 'channel' is not allowed in a message of role assistant",
    json.dumps(one(tool_calls=[{"function": {}}])): ":2: message 1: expected a tool call as",
    json.dumps(one(tool_calls=[call("f", "{")])): ":2: message 1: the arguments of f are not a JSON object: '{'; give",
    json.dumps(one(tool_calls=[call("f", "[1]")])): ":2: message 1: the arguments of f are not a JSON object",
    json.dumps(one(tool_calls=[call("f g", {})])): ":2: message 1: tool name 'f g' is not allowed",
    json.dumps({"messages": [{"role": "tool", "content": "1"}, HELLO[1]]}): ":2: message 0: the tool result has no name and no tool_call_id, and no call waits for it",
    json.dumps({"messages": [{"role": "tool", "tool_call_id": "9", "content": "1"}, HELLO[1]]}): "2: message 0: the tool result's tool_call_id '9' matches no earlier call",
    json.dumps(one(content="<|channel|>analysis<|message|>hm")): r":2: message 1: content begins with harmony's control text \('<\|channel\|>analysis",
    json.dumps(one(content="<|channel|>final<|message|>x", thinking="y")): ":2: message 1: content begins with harmony's control text",
    json.dumps({**GOOD, "reasoning_effort": "huge"}): ":2: unknown reasoning effort 'huge': use low, medium or high",
    json.dumps({**GOOD, "reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}): ":2: reasoning_effort is given twice and differs",
    json.dumps({**GOOD, "chat_template_kwargs": {"enable_thinking": True}}): ":2: chat_template_kwargs: 'enable_thinking' is not known: use reasoning_effort,",
    json.dumps({**GOOD, "chat_template_kwargs": {"builtin_tools": ["python"]}}): r":2: builtin_tools \['python'\] are not supported",
    json.dumps({**GOOD, "tools": [{"type": "web"}]}): ":2: tools of type 'web' are not supported",
    json.dumps({**GOOD, "tools": "x"}): ":2: tools is text that is not JSON",
    json.dumps({"text": ""}): ":2: text is '': expected a document that is not empty",
    json.dumps({"text": "<|start|>system<|message|>x"}): ":2: text is a conversation that is rendered already: give messages",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_broken_line_is_named(tmp_path, line):
    path = write(tmp_path / "data.jsonl", GOOD, line, GOOD)
    with pytest.raises(GptOssError, match=BAD[line]) as caught:
        load_samples(path, FULL)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_broken_lines_can_be_counted(tmp_path):
    path = write(tmp_path / "data.jsonl", *(x for line in BAD for x in (line, "", GOOD)))
    found = load_samples(path, FULL, SampleSettings(skip_bad=True))
    assert (found.report.rows, found.report.bad, found.report.samples) == (
        2 * len(BAD), len(BAD), len(BAD),
    )  # fmt: skip
    assert found.report.messages[0].startswith(f"{path}:1: not JSON")  # blank lines count too
    assert found.samples[1].where == f"{path}:6"


def test_other_encodings_and_files(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(GptOssError, match=r":1: byte 11 is not UTF-8: save the file as UTF-8"):
        read(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert [(e.where, e.row) for e in read(str(path)).rows] == [(f"{path}:1", GOOD)]
    path.write_bytes(b"\n")
    with pytest.raises(GptOssError, match=r"data\.jsonl holds no examples"):
        read(path)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert len(read(file for file in (packed, str(packed))).rows) == 2
    packed.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-9])
    with pytest.raises(GptOssError, match=r"data\.jsonl\.gz cannot be read"):
        read(packed)
    with pytest.raises(GptOssError, match=r"none\.jsonl: no such file; give a JSONL file"):
        read("none.jsonl")
    with pytest.raises(GptOssError, match=r"a/none\.jsonl: no such file"):
        read("a/none.jsonl")


def test_folders_and_splits(tmp_path):
    with pytest.raises(GptOssError, match=r"has no train\.jsonl"):
        read(tmp_path)
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "valid.jsonl", GOOD, GOOD)
    assert len(read(tmp_path).rows) == 1
    assert len(read(tmp_path, split="validation").rows) == 2
    assert len(read({"train": [GOOD], "dev": [GOOD] * 3}, split="validation").rows) == 3
    with pytest.raises(GptOssError, match="no split 'test' in the data set: it has train, dev"):
        read({"train": [GOOD], "dev": [GOOD]}, split="test")


def test_rows_in_memory():
    with pytest.raises(GptOssError, match="row 1: expected a dict of columns, got a list"):
        read([GOOD, []])
    with pytest.raises(GptOssError, match="row 1: no assistant message"):
        make_samples([GOOD, {"messages": HELLO[:1]}], FULL)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library, whose rows carry every key with nulls, as Arrow's do."""
    library = types.ModuleType("datasets")

    class Dataset(list):
        __module__ = "datasets.arrow_dataset"

    def load_dataset(name):
        if name != "some/thing":
            raise ConnectionError("no network\nat all")
        nulls = {"thinking": None, "tool_calls": None, "name": None}
        called = {"role": "assistant", "content": None, "thinking": None}
        called["tool_calls"] = [{"function": {"name": "f", "arguments": {"x": 1, "y": None}}}]
        row = {"messages": [{**HELLO[0], **nulls}, called], "text": None}
        return {"train": Dataset([row])}

    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)


@pytest.mark.usefixtures("hub")
def test_data_sets_of_the_hub():
    (sample,) = load_samples("some/thing", FULL).samples
    assert FULL.decode(sample.tokens[sample.weights > 0].tolist()).endswith('{"x": 1}<|call|>')
    with pytest.raises(GptOssError, match=r"other/thing cannot be loaded \(no network\): check"):
        read("other/thing")


def test_data_sets_without_their_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(GptOssError, match="needs the datasets library: pip install datasets, or"):
        read("some/thing")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "user", "{}", "<|channel|>final<|message|>x", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "name", "id", "function", "type", "text", "from", "value"]), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
a_message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system"]) | json_values,
        "content": st.just("x") | json_values,
        "thinking": json_values,
        "tool_calls": json_values
        | st.lists(
            st.fixed_dictionaries(
                {"name": st.just("f")},
                optional={"id": json_values, "arguments": json_values, "function": json_values},
            ),
            max_size=2,
        ),
        "tool_call_id": json_values,
        "name": json_values,
        "weight": json_values,
    },
)
a_row = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(a_message, max_size=4) | json_values,
        "conversations": st.lists(a_message | json_values, max_size=3) | json_values,
        "prompt": json_values,
        "completion": json_values,
        "user": json_values,
        "final": json_values,
        "text": json_values,
        "tools": json_values,
        "reasoning_effort": st.just("low") | json_values,
        "chat_template_kwargs": json_values,
        "response_format": json_values,
    },
)


@given(a_row)
@settings(max_examples=300, deadline=None)
def test_any_row_gives_samples_or_one_kind_of_error(row):
    try:
        samples = make_samples([row], TINY).samples
    except GptOssError:
        return
    for sample in samples:
        assert sample.weights[0] == 0
        assert sample.weights.any()
        assert sample.tokens.shape == sample.weights.shape


# what is left out


def test_long_samples_are_left_out_and_counted():
    long = {"messages": [HELLO[0], {"role": "assistant", "content": "word " * 300}]}
    (short,) = make_samples([GOOD], FULL).samples
    limit = SampleSettings(max_length=len(short))
    found = make_samples([GOOD, long, {"text": "word " * 300}, GOOD], FULL, limit)
    assert [s.tokens.tolist() for s in found.samples] == [short.tokens.tolist()] * 2
    assert (found.report.too_long, found.report.samples, found.report.rows) == (2, 2, 4)
    assert found.report.longest > 300
    assert found.report.messages[0].startswith("row 1: ")
    with pytest.raises(
        GptOssError,
        match=r"^no sample is left of 1 rows \(1 longer than 20 tokens\); the first: row 0",
    ):
        make_samples([GOOD], FULL, SampleSettings(max_length=20))
    exactly = SampleSettings(max_length=len(short) - 1)
    with pytest.raises(GptOssError, match="no sample is left"):
        make_samples([GOOD], FULL, exactly)


def test_the_report_counts():
    rows = [GOOD, PLAIN, CASES["weights of messages"][0]]
    report = make_samples(rows, FULL).report
    samples = make_samples(rows, FULL).samples
    assert report.unsupervised == 1
    assert report.without_reasoning == 1
    assert report.tokens == sum(len(s.tokens) for s in samples)
    assert report.supervised == sum((s.weights > 0).sum() for s in samples)
    assert report.supervised_share == report.supervised / report.tokens
    with pytest.raises(GptOssError, match="row 0: nothing to learn: every weight is 0"):
        make_samples([PLAIN], FULL, SampleSettings(final_weight=0))


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"date": "tomorrow"}, "expected a date as YYYY-MM-DD, got 'tomorrow'"),
        ({"date": None}, "expected a date as YYYY-MM-DD, got none"),
        ({"reasoning_effort": "max"}, "unknown reasoning effort 'max'"),
        ({"final_weight": -1}, "final_weight is -1: expected 0 or a positive number"),
        ({"analysis_weight": float("nan")}, "analysis_weight is nan"),
        (
            {"analysis_weight": 0, "commentary_weight": 0, "final_weight": 0},
            "all channel weights are 0",
        ),
        ({"multi_turn": "all"}, "multi_turn is 'all': use expand or last"),
        ({"max_length": 1}, "max_length is 1: expected at least 2 tokens"),
    ],
)
def test_settings_that_are_refused(keys, error):
    with pytest.raises(GptOssError, match=error):
        SampleSettings(**keys)


def test_a_digest_sees_every_change():
    rows = [GOOD, PLAIN]
    digests = {
        make_samples(rows, FULL).digest(),
        make_samples(rows[::-1], FULL).digest(),
        make_samples(rows, FULL, SampleSettings(final_weight=0.5)).digest(),
        make_samples(rows, FULL, SampleSettings(date="2020-01-01")).digest(),
    }
    assert len(digests) == 4
    assert make_samples(rows, FULL).digest() in digests


# the preview


def test_the_preview_says_what_is_learnt():
    rows = [CASES["several turns"][0], {"prompt": "a" * 9000, "completion": "b\x1b[31mc"}]
    found = make_samples(rows, FULL, SampleSettings(analysis_weight=0.5))
    batches = Batches(found, FULL, BatchSettings(length=2048, batch=2))
    text = preview.describe(found, FULL, batches=batches)
    assert (
        "<|start|>assistant[[0.5:<|channel|>analysis<|message|>greet<|end|>]]"
        "[[<|start|>assistant<|channel|>final<|message|>hello<|return|>]]"
    ) in text
    assert "[[<|channel|>final<|message|>b\\x1b[31mc<|return|>]]" in text
    assert "\x1b" not in text
    assert re.search(r"aaa \.\.\. [\d,]+ tokens \.\.\. a", text)
    counted = [int(n) for n in re.findall(r"up to +[\d,]+ +(\d+)", text)]
    assert sum(counted) == 3
    assert f"2 rows -> 3 samples, {found.report.tokens:,} tokens" in text
    assert f"({found.report.supervised_share:.1%}) are learnt" in text
    assert "1 samples have no reasoning" in text
    assert "1 batches an epoch of 2 x 2,048 tokens" in text


def test_the_preview_is_coloured_where_there_are_colours(tmp_path):
    found = make_samples([GOOD], FULL)
    shown = {}
    for colours in (True, False):
        with open(tmp_path / "out", "w") as file:
            console = Console(
                file=file,
                force_terminal=colours,
                color_system="standard" if colours else None,
                no_color=False,
                width=80,
            )
            preview.show(found, FULL, console)
        shown[colours] = (tmp_path / "out").read_text()
    assert "\x1b[32m<|channel|>analysis<|message|>greet<|end|><|start|>" in shown[True]
    assert "[[" not in shown[True]
    assert "[[<|channel|>analysis" in shown[False]
    assert "\x1b" not in shown[False]
