"""Malformed output through /v1/responses: never an error, the items as defined, the same streamed
and not."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responding import events_of
from serving import app_of, local
from test_chat_parse import CONTROL, CORPUS, WORDS, tokens

from gptoss_jax.chat.parse import parse
from gptoss_jax.server.responses_shapes import ResponseShape
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()
CALC = {"type": "function", "name": "calc", "parameters": {"type": "object"}, "strict": False}


def expected_of(messages, stop):
    """What output items messages make: (type or phase, text, status), and the response's status.

    Written from the parser's table and the rules of server/conversation.py's docstring, for tools
    that offer `calc` only.
    """
    out = []
    for number, (channel, recipient, text) in enumerate(messages):
        cut = stop is None and number == len(messages) - 1
        status = "incomplete" if cut else "completed"
        if recipient == "functions.calc":
            # no arguments at all are an empty object
            out.append(("function_call", text if text.strip() or cut else text + "{}", status))
        elif not text:
            continue
        elif channel == "analysis" or (recipient and not recipient.startswith("functions.")):
            out.append(("reasoning", text, status))
        elif channel == "commentary" and recipient is None:
            out.append(("commentary", text, status))
        else:
            out.append(("final_answer", text, status))
    return out, "incomplete" if stop is None else "completed"


def seen(response):
    """A response in the same words."""
    out = []
    for item in response["output"]:
        text = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        out.append((item.get("phase", item["type"]), text, item["status"]))
    return out, response["status"]


async def both(app, engine, ids, strict=True):
    """The response as a whole, and as it was streamed."""
    out = []
    async with local(app) as client:
        for stream in (False, True):
            engine.scripts, engine.at = (ids,), 0
            body = {"input": "hi", "tools": [CALC], "store": False, "stream": stream}
            answer = await client.post("/v1/responses", json=body)
            assert answer.status_code == 200, answer.text
            if not stream:
                out.append(answer.json())
            elif strict:
                out.append(events_of(answer.text)[-1]["response"])
            else:
                last = answer.text.strip().split("\n\n")[-1].split("data: ", 1)[1]
                out.append(json.loads(last)["response"])
            ResponseShape.model_validate(out[-1])
    return out


@pytest.fixture(scope="module")
def server():
    app, engine = app_of([])
    yield app, engine
    engine.close(0)


@pytest.mark.parametrize(
    ("name", "text", "messages", "stop"), [case[:4] for case in CORPUS], ids=[c[0] for c in CORPUS]
)
def test_the_corpus(name, text, messages, stop, server):
    whole, streamed = asyncio.run(both(*server, tokens(text)))
    expected, status = expected_of(messages, stop)
    if name == "cut in a header":  # what came before is whole
        expected = [(*item[:2], "completed") for item in expected]
    assert seen(whole) == seen(streamed) == (expected, status)


@given(st.lists(st.one_of(st.sampled_from(CONTROL), st.sampled_from(WORDS)), max_size=40))
@settings(max_examples=30, deadline=None)
def test_any_tokens_have_a_result(server, ids):
    whole, streamed = asyncio.run(both(*server, ids, strict=False))
    first = next((i for i, token in enumerate(ids) if token in FULL.stop_ids), None)
    parsed = parse(ids if first is None else ids[: first + 1], FULL, ["calc"])
    messages = [(m.channel, m.recipient, m.content) for m in parsed.messages]
    expected, status = expected_of(messages, parsed.stop)
    assert seen(whole) == seen(streamed)
    # which of the last items was cut is the parser's matter
    assert [item[:2] for item in seen(whole)[0][:-1]] == [item[:2] for item in expected[:-1]]
    assert seen(whole)[1] == status
