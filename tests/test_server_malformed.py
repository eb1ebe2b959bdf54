"""Malformed output through the whole server: never an error, the visible result as defined, the
same streamed and not."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import USER, app_of, events, local, summed
from test_chat_parse import CONTROL, CORPUS, WORDS, tokens

from gptoss_jax.chat.parse import parse
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()
CALC = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}


def visible(messages, stop):
    """What the user is to see of messages: content, reasoning, calls, finish_reason.

    Written from the parser's table and the rules of server/conversation.py's docstring, for tools
    that offer `calc` only.
    """
    content, reasoning, calls = [], [], []
    for channel, recipient, text in messages:
        if recipient == "functions.calc":
            calls.append(("calc", text or "{}"))
        elif recipient is not None and recipient.startswith("functions."):
            content.append(text)
        elif recipient is not None or channel == "analysis":
            reasoning.append(text)
        else:
            content.append(text)
    reason = "length" if stop is None else "tool_calls" if calls else "stop"
    joined = ("\n".join(text for text in texts if text) for texts in (content, reasoning))
    return (*joined, calls, reason)


async def both(app, engine, ids):
    body = {"messages": USER, "tools": [CALC]}
    async with local(app) as client:
        answers = []
        for stream in (False, True):
            engine.scripts, engine.at = (ids,), 0
            answer = await client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert answer.status_code == 200, answer.text
            answers.append(answer)
    return answers[0].json()["choices"][0], events(answers[1].text)


def seen(message, reason):
    calls = message.get("tool_calls", ())
    made = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return message["content"] or "", message.get("reasoning", ""), made, reason


@pytest.fixture(scope="module")
def server():
    app, engine = app_of([])
    yield app, engine
    engine.close(0)


@pytest.mark.parametrize(
    ("name", "text", "messages", "stop"), [case[:4] for case in CORPUS], ids=[c[0] for c in CORPUS]
)
def test_the_corpus(name, text, messages, stop, server):
    ids = tokens(text)
    # half a call is none, and content that was cut is shown
    whole = [m for m in messages if stop is not None or not (m[1] or "").startswith("functions.")]
    expected = visible(whole, stop)
    choice, chunks = asyncio.run(both(*server, ids))
    assert seen(choice["message"], choice["finish_reason"]) == expected
    message, reason, _ = summed(chunks)
    assert seen(message, reason) == expected


def test_every_way_to_split_the_corpus():
    async def all_of_it():
        for piece in (2, 3, 7, 50):
            app, engine = app_of([], piece=piece)
            for name, text, messages, stop, _ in CORPUS:
                if stop is None:
                    continue
                choice, chunks = await both(app, engine, tokens(text))
                expected = visible(messages, stop)
                assert seen(choice["message"], choice["finish_reason"]) == expected, (name, piece)
                assert seen(*summed(chunks)[:2]) == expected, (name, piece)

    asyncio.run(all_of_it())


def test_the_text_of_control_tokens_stays_text(server):
    written = "a <|end|><|start|>assistant<|channel|>final<|message|> b <|return|>"
    ids = tokens("<|channel|>final<|message|>") + FULL.encode(written) + tokens("<|return|>")
    choice, chunks = asyncio.run(both(*server, ids))
    assert choice["message"]["content"] == summed(chunks)[0]["content"] == written


@given(st.lists(st.one_of(st.sampled_from(CONTROL), st.sampled_from(WORDS)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_tokens_have_a_result(server, ids):
    choice, chunks = asyncio.run(both(*server, ids))
    first = next((i for i, token in enumerate(ids) if token in FULL.stop_ids), None)
    parsed = parse(ids if first is None else ids[: first + 1], FULL, ["calc"])
    messages = [
        (m.channel, m.recipient, m.content)
        for m in parsed.messages
        if m.recipient != "functions.calc"
        or parsed.stop is not None
        or m is not parsed.messages[-1]
    ]
    expected = visible(messages, parsed.stop)
    message, reason, _ = summed(chunks)
    assert reason == choice["finish_reason"] == expected[3]
    assert seen(choice["message"], reason)[:2] == seen(message, reason)[:2] == expected[:2]
    if reason != "length":
        assert seen(choice["message"], reason) == seen(message, reason) == expected
