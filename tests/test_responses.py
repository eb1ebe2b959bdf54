"""/v1/responses under the unmodified openai client: shapes, events, parameters."""

import asyncio
import json

import openai
import pydantic
import pytest
from fakes import harmony_ids
from openai.types import responses as shapes
from responding import (
    BEGIN,
    CALL,
    CUT,
    MESSAGE,
    REASONING,
    WEATHER,
    ask,
    conforms,
    kinds,
    same,
    stream,
)
from serving import ASKS, BERN, HELLO, A, E, F, R, S, call

from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()
JSON_FORMAT = {"format": {"type": "json_object"}}
GOLDEN = [
    ("plain", f"{F}Hello{R}", {}, [*BEGIN, *MESSAGE, "completed"]),
    ("reasoning", HELLO, {}, [*BEGIN, *REASONING, *MESSAGE, "completed"]),
    (
        "two thoughts",
        f"{A}One.{E}{S}{A}Two.{E}{S}{F}Hello{R}",
        {},
        [*BEGIN, *REASONING, *REASONING, *MESSAGE, "completed"],
    ),
    (
        "tool call",
        ASKS,
        {"tools": [WEATHER]},
        [*BEGIN, *REASONING, *MESSAGE, *CALL, "completed"],
    ),
    (
        "json",
        f'{A}Hm.{E}{S}<|channel|>final <|constrain|>json<|message|>{{"a": 1}}{R}',
        {"text": JSON_FORMAT},
        [*BEGIN, *REASONING, *MESSAGE, "completed"],
    ),
    (
        "length in the answer",
        HELLO,
        {"max_output_tokens": 12},
        [*BEGIN, *REASONING, *MESSAGE, "incomplete"],
    ),
    ("length in the reasoning", HELLO, {"max_output_tokens": 4}, [*BEGIN, *REASONING, "incomplete"]),
    ("length in the header", HELLO, {"max_output_tokens": 2}, [*BEGIN, "incomplete"]),
    (
        "length in a call",
        ASKS,
        {"tools": [WEATHER], "max_output_tokens": CUT},
        [*BEGIN, *REASONING, *MESSAGE, *CALL, "incomplete"],
    ),
    ("empty", f"{F}{R}", {}, [*BEGIN, "completed"]),
    ("no arguments", call("weather", ""), {"tools": [{**WEATHER, "strict": False}]}, [*BEGIN, *CALL, "completed"]),
]  # fmt: skip


def test_the_strict_check_finds_what_is_wrong():
    good = {"type": "response.output_text.delta", "content_index": 0, "delta": "x", "item_id": "i", "logprobs": [], "output_index": 0, "sequence_number": 3}  # fmt: skip
    conforms(good, shapes.ResponseStreamEvent)
    for bad in (
        {**good, "sequence_number": "3"},
        {**good, "more": 1},
        {**good, "logprobs": [{"token": "a", "logprob": -1.0, "bytes": [97]}]},
        {k: v for k, v in good.items() if k != "item_id"},
    ):
        with pytest.raises((pydantic.ValidationError, AssertionError)):
            conforms(bad, shapes.ResponseStreamEvent)


@pytest.mark.parametrize(
    ("script", "body", "expected"), [g[1:] for g in GOLDEN], ids=[g[0] for g in GOLDEN]
)
def test_golden_events(client, script, body, expected):
    api, _ = client(script, repeat=True)
    events = stream(api, **body)
    assert kinds(events) == expected
    response = events[-1]["response"]
    # what is not streamed, and what is in the store, is the same
    whole = ask(api, **body)
    assert same(whole, response)
    assert json.loads(api.responses.with_raw_response.retrieve(response["id"]).text) == response
    # the events add up to the response
    items = {}
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items[event["output_index"]] = [event["item"], "", event["item"]["id"]]
        elif kind.endswith(".delta"):
            items[event["output_index"]][1] += event["delta"]
            assert event["item_id"] == items[event["output_index"]][2]
        elif kind.endswith((".done", ".added")) and "item_id" in event:
            assert event["item_id"] == items[event["output_index"]][2]
        if kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == items[event["output_index"]][1]
        if kind == "function_call_arguments.done":
            assert event["arguments"] == items[event["output_index"]][1]
        if kind == "output_item.done":
            assert event["item"] == response["output"][event["output_index"]]
            item = event["item"]
            text = item["content"][0]["text"] if "content" in item else item["arguments"]
            assert text == items[event["output_index"]][1]
    assert len(items) == len(response["output"])
    incomplete = response["status"] == "incomplete"
    assert response["incomplete_details"] == (
        {"reason": "max_output_tokens"} if incomplete else None
    )
    assert [item["status"] for item in response["output"]][:-1] == ["completed"] * (len(items) - 1)


def test_what_the_output_says(client):
    api, _ = client(ASKS)
    response = ask(api, tools=[WEATHER])
    thought, said, called = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "I need it."}]
    assert thought["summary"] == []
    assert said["phase"] == "commentary"
    assert said["content"][0]["text"] == "I look."
    assert (called["name"], called["arguments"], called["status"]) == ("weather", BERN, "completed")
    assert called["call_id"].startswith("call_")
    usage = response["usage"]
    assert usage["output_tokens"] == len(harmony_ids(ASKS))
    assert usage["output_tokens_details"]["reasoning_tokens"] == len(FULL.encode("I need it.")) + 1
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]


def test_the_stream_helper_and_parse(client):
    class Sum(pydantic.BaseModel):
        terms: list[int]
        total: int

    text = '{"terms": [1, 2], "total": 3}'
    script = f"{A}Easy.{E}{S}<|channel|>final <|constrain|>json<|message|>{text}{R}"
    api, engine = client(script, repeat=True)
    answer = api.responses.parse(model="scripted", input="1+2?", text_format=Sum)
    assert answer.output_parsed == Sum(terms=[1, 2], total=3)
    assert len(engine.requests[0].masks) == 1
    with api.responses.stream(model="scripted", input="1+2?", text_format=Sum) as events:
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(deltas) == final.output_text == text
    assert final.output_parsed.total == 3


def test_the_stream_helper_parses_calls(client):
    api, _ = client(ASKS)
    with api.responses.stream(model="scripted", input="hi", tools=[WEATHER]) as events:
        snapshots = [
            e.snapshot for e in events if e.type == "response.function_call_arguments.delta"
        ]
        final = events.get_final_response()
    assert snapshots[-1] == BERN
    assert final.output[-1].parsed_arguments == {"city": "Bern"}


def test_asynchronous_client(client):
    api, _ = client(HELLO, repeat=True)

    async def go():
        async with openai.AsyncOpenAI(base_url=str(api.base_url), api_key="none") as other:
            made = other.responses.stream(model="scripted", input="hi")
            async with made as events:
                return (await events.get_final_response()).output_text

    assert asyncio.run(go()) == "Hello world"


def test_logprobs(client):
    text = "Grüße 語 🙂!"
    api, _ = client(f"{A}Think.{E}{S}{F}{text}{R}", repeat=True)
    include = ["message.output_text.logprobs"]
    whole = ask(api, include=include, top_logprobs=2)
    logprobs = whole["output"][1]["content"][0]["logprobs"]
    assert bytes(b for entry in logprobs for b in entry["bytes"]).decode() == text
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    events = stream(api, include=include, top_logprobs=2)
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    [done] = [e["logprobs"] for e in events if e["type"] == "response.output_text.done"]
    assert [entry for part in deltas for entry in part] == done
    assert [(e["token"], e["logprob"]) for e in done] == [
        (e["token"], e["logprob"]) for e in logprobs
    ]
    assert ask(api)["output"][1]["content"][0]["logprobs"] == []


def test_obfuscated_deltas_have_even_lengths(client):
    api, _ = client(HELLO, repeat=True)
    options = {"include_obfuscation": True}
    body = {"model": "scripted", "input": "hi", "stream": True, "stream_options": options}
    deltas = [e for e in api.responses.create(**body) if e.type.endswith(".delta")]
    assert {len(e.delta) + len(e.obfuscation) for e in deltas} == {16}


def test_tool_choice_and_parameters_reach_the_turn(client):
    forecast = {**WEATHER, "name": "forecast"}
    api, engine = client(lambda request: [call("forecast", BERN)])
    named = ask(
        api, tools=[WEATHER, forecast], tool_choice={"type": "function", "name": "forecast"}
    )
    assert named["tool_choice"] == {"type": "function", "name": "forecast"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "forecast"}]}  # fmt: skip
    ask(api, tools=[WEATHER, forecast], tool_choice=allowed)
    assert "type weather" not in FULL.decode(engine.requests[1].prompt)
    assert all(request.masks for request in engine.requests)
    whole = ask(
        api,
        tools=[{**WEATHER, "name": "forecast"}],
        temperature=0.5,
        top_p=0.25,
        max_output_tokens=99,
        reasoning={"effort": "high", "summary": "auto"},
        metadata={"a": "b"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="flex",
        max_tool_calls=3,
        parallel_tool_calls=False,
        truncation="disabled",
        extra_body={"seed": 7, "min_p": 0.1},
    )
    request = engine.requests[2]
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.25)
    assert (request.sampling.seed, request.sampling.min_p) == (7, 0.1)
    assert request.max_new_tokens == 99
    assert "Reasoning: high" in FULL.decode(request.prompt)
    shown = {key: whole[key] for key in ("temperature", "top_p", "max_output_tokens", "metadata", "user", "safety_identifier", "prompt_cache_key", "max_tool_calls", "parallel_tool_calls", "service_tier")}  # fmt: skip
    assert shown == {"temperature": 0.5, "top_p": 0.25, "max_output_tokens": 99, "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "max_tool_calls": 3, "parallel_tool_calls": False, "service_tier": "default"}  # fmt: skip
