"""/v1/responses under the unmodified openai client: shapes, events, conversations, background."""

import asyncio
import contextlib
import itertools
import json
from typing import Annotated, get_args, get_origin

import openai
import pydantic
import pytest
from fakes import harmony_ids
from openai._models import BaseModel as OpenAIModel
from openai.types import responses as shapes
from serving import DATE, HELLO, A, E, F, P, R, S, app_of, call, served, until

from gptoss_jax.chat import ChatSettings, Tool, from_openai
from gptoss_jax.chat.render import render
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
BERN = json.dumps({"city": "Bern"})
ASKS = f"{A}I need it.{E}{S}{P}I look.{E}{S}{call('weather', BERN)}"
CUT = len(harmony_ids(ASKS)) - 3  # tokens of it that end inside the arguments

# what OpenAI's types do not have, and OpenAI's service and ours send
BESIDE = {"Response": {"store"}}


@pytest.fixture
def client():
    """Makes clients of servers that replay scripts."""
    with contextlib.ExitStack() as stack:

        def make(*scripts, settings=None, **engine):
            app, made = app_of(*scripts, settings=settings, **engine)
            stack.callback(made.close, 0)
            address = stack.enter_context(served(app))
            base = f"{address}/v1"
            api = stack.enter_context(openai.OpenAI(base_url=base, api_key="none", max_retries=0))
            return api, made

        yield make


def conforms(value, kind):
    """Valid under one of OpenAI's types, strictly: right types, and no key that the type lacks."""
    pydantic.TypeAdapter(kind).validate_python(value, strict=True)
    assert not (unknown := list(beside(value, kind))), unknown


def beside(value, kind):
    """Keys of `value` that no type of `kind` has."""
    if get_origin(kind) is Annotated:
        yield from beside(value, get_args(kind)[0])
    elif isinstance(value, list):
        for item in value:
            options = [get_args(k)[0] for k in options_of(kind) if get_origin(k) is list]
            yield from min((list(beside(item, k)) for k in options), key=len)
    elif isinstance(value, dict):
        models = [k for k in options_of(kind) if isinstance(k, type) and issubclass(k, OpenAIModel)]
        fitting = [m for m in models if fits(value, m)]
        if fitting:
            yield from min((list(unknown_keys(value, m)) for m in fitting), key=len)


def options_of(kind):
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) is None or get_origin(kind) in (list, dict):
        return [kind]
    return [o for k in get_args(kind) for o in options_of(k)]


def fits(value, model):
    try:
        model.model_validate(value, strict=True)
        return True
    except pydantic.ValidationError:
        return False


def unknown_keys(value, model):
    fields = {f.alias or name: f.annotation for name, f in model.model_fields.items()}
    for key, inner in value.items():
        if key in fields:
            yield from beside(inner, fields[key])
        elif key not in BESIDE.get(model.__name__, ()):
            yield f"{model.__name__}.{key}"


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


def ask(api, **body):
    """The answer's JSON as it was sent, checked against OpenAI's type."""
    body = {"model": "scripted", "input": "hi", **body}
    raw = api.responses.with_raw_response.create(**body)
    answer = json.loads(raw.text)
    conforms(answer, shapes.Response)
    return answer


def events_of(text):
    """The events of a stream as they were sent, each checked against OpenAI's types."""
    out = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
        conforms(out[-1], shapes.ResponseStreamEvent)
    assert [event["sequence_number"] for event in out] == list(
        range(out[0]["sequence_number"], out[0]["sequence_number"] + len(out))
    )
    return out


def stream(api, **body):
    body = {"model": "scripted", "input": "hi", "stream": True, **body}
    with api.responses.with_streaming_response.create(**body) as raw:
        return events_of("".join(raw.iter_text()))


def replay(api, id, **more):
    """The events of a response made in the background."""
    with api.responses.with_streaming_response.retrieve(id, stream=True, **more) as raw:
        return events_of("".join(raw.iter_text()))


def kinds(events):
    """Their types, deltas in a row as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for name, _ in itertools.groupby(names)]


def same(first, second):
    """Two responses but for ids and times."""

    def bare(value):
        if isinstance(value, dict):
            skipped = ("id", "call_id", "created_at", "completed_at", "background", "usage")
            return {k: bare(v) for k, v in value.items() if k not in skipped}
        return [bare(item) for item in value] if isinstance(value, list) else value

    return bare(first) == bare(second)


BEGIN = ["created", "in_progress"]
REASONING = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done"]  # fmt: skip
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"]  # fmt: skip
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]  # fmt: skip
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


def test_continuing_is_sending_everything(client):
    """A conversation over previous_response_id, the same sent whole as items, and by references,
    make the same prompts; and these are what the library renders."""
    tail = f"{A}Now I know.{E}{S}{F}It rains.{R}"
    scripts = [ASKS, tail, HELLO, f"{A}Last.{E}{S}{F}Bye{R}"]
    turns = ["Weather in Bern?", None, "Thanks!", "Bye!"]
    more = {"tools": [WEATHER], "instructions": "Be kind.", "model": "scripted"}

    def inputs(turn, answer):
        if turn is not None:
            return [{"role": "user", "content": turn}]
        call_id = answer.output[-1].call_id
        return [{"type": "function_call_output", "call_id": call_id, "output": "rain"}]

    prompts = []
    for way in ("previous", "whole", "references", "packed"):
        api, engine = client(*scripts)
        answer, history = None, []
        for turn in turns:
            new = inputs(turn, answer)
            if way == "previous":
                previous = None if answer is None else answer.id
                answer = api.responses.create(input=new, previous_response_id=previous, **more)
                continue
            include = ["reasoning.encrypted_content"] if way == "packed" else []
            store = way == "references"
            answer = api.responses.create(
                input=[*history, *new], include=include, store=store, **more
            )
            history += new
            if way == "whole":
                history += answer.output
            elif way == "references":
                history += [{"type": "item_reference", "id": item.id} for item in answer.output]
            else:
                kept = [item.to_dict() for item in answer.output]
                for item in kept:
                    if item["type"] == "reasoning":
                        item["content"] = []
                history += kept
        prompts.append([list(request.prompt) for request in engine.requests])
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]

    call_message = {
        "role": "assistant",
        "reasoning": "I need it.",
        "content": "I look.",
        "tool_calls": [{"id": "c", "function": {"name": "weather", "arguments": BERN}}],
    }
    conversation = [
        {"role": "user", "content": "Weather in Bern?"},
        call_message,
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
        {"role": "assistant", "reasoning": "Now I know.", "content": "It rains."},
        {"role": "user", "content": "Thanks!"},
    ]
    parameters = WEATHER["parameters"]
    settings = ChatSettings(date=DATE, instructions="Be kind.", tools=[Tool("weather", WEATHER["description"], parameters)])  # fmt: skip
    for length, prompt in ((1, prompts[0][0]), (3, prompts[0][1]), (5, prompts[0][2])):
        assert render(from_openai(conversation[:length]), FULL, settings) == prompt
    # reasoning is kept in the tool loop, and dropped after its answer
    assert "I need it." in FULL.decode(prompts[0][1])
    assert "I need it." not in FULL.decode(prompts[0][2])


def test_instructions_are_not_carried_over(client):
    api, engine = client(HELLO, repeat=True)
    first = ask(api, instructions="Speak Latin.")
    second = ask(api, previous_response_id=first["id"])
    assert second["instructions"] is None
    assert "Speak Latin." in FULL.decode(engine.requests[0].prompt)
    assert "Speak Latin." not in FULL.decode(engine.requests[1].prompt)
    assert "Hello world" in FULL.decode(engine.requests[1].prompt)


def test_input_items(client):
    api, _ = client(ASKS, HELLO)
    first = api.responses.create(model="scripted", input="Weather?", tools=[WEATHER])
    new = [
        {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": [{"type": "input_text", "text": "rain"}]},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "and"}, {"type": "input_text", "text": " now?"}]},
    ]  # fmt: skip
    second = api.responses.create(
        model="scripted", input=new, tools=[WEATHER], previous_response_id=first.id
    )
    raw = json.loads(api.responses.input_items.with_raw_response.list(second.id, order="asc").text)
    conforms(raw, shapes.ResponseItemList)
    assert [item["type"] for item in raw["data"]] == ["function_call_output", "message", "message"]
    assert raw["data"][2]["content"][1] == {"type": "input_text", "text": " now?"}
    ids = [item["id"] for item in raw["data"]]
    pages = api.responses.input_items.list(second.id, order="asc", limit=1)
    assert [item.id for item in pages] == ids  # the client asks for one page after the other
    assert [item.id for item in api.responses.input_items.list(second.id)] == ids[::-1]
    with pytest.raises(openai.BadRequestError):
        api.responses.input_items.list(second.id, after="msg_nothing")
    with pytest.raises(openai.BadRequestError):
        api.responses.input_items.list(second.id, limit=1000)


def test_deleting_and_not_storing(client):
    api, _ = client(HELLO, repeat=True)
    kept, not_kept = ask(api), ask(api, store=False)
    child = ask(api, previous_response_id=kept["id"])
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(not_kept["id"])
    api.responses.delete(kept["id"])
    for again in (
        lambda: api.responses.retrieve(kept["id"]),
        lambda: api.responses.delete(kept["id"]),
        lambda: api.responses.cancel(kept["id"]),
        lambda: api.responses.input_items.list(kept["id"]),
        lambda: list(api.responses.retrieve(kept["id"], stream=True)),
    ):
        with pytest.raises(openai.NotFoundError):
            again()
    for id, gone in ((not_kept["id"], not_kept["id"]), (child["id"], kept["id"])):
        with pytest.raises(openai.BadRequestError, match=gone) as caught:
            ask(api, previous_response_id=id)
        assert caught.value.code == "previous_response_not_found"


def test_background(client):
    api, engine = client(HELLO, repeat=True)
    engine.held.clear()
    begun = ask(api, background=True)
    assert begun["status"] == "queued"
    assert api.responses.retrieve(begun["id"]).status == "queued"
    with pytest.raises(openai.BadRequestError, match="not complete yet"):
        ask(api, previous_response_id=begun["id"])
    engine.held.set()
    until(lambda: api.responses.retrieve(begun["id"]).status == "completed")
    whole = json.loads(api.responses.with_raw_response.retrieve(begun["id"]).text)
    conforms(whole, shapes.Response)
    assert same({**ask(api), "status": "completed"}, whole)

    events = replay(api, begun["id"])
    expected = ["created", "queued", "in_progress", *REASONING, *MESSAGE, "completed"]
    assert kinds(events) == expected
    assert events[-1]["response"] == whole
    for after in (0, 5, len(events) - 2):
        assert replay(api, begun["id"], starting_after=after) == events[after + 1 :]
    with pytest.raises(openai.BadRequestError, match="in the background"):
        list(api.responses.retrieve(ask(api)["id"], stream=True))


def test_a_stream_that_broke_goes_on_where_it_was(client):
    words = " one" * 60
    api, engine = client(f"{F}{words}{R}", delay=0.005)
    made = api.responses.create(model="scripted", input="hi", background=True, stream=True)
    read = list(itertools.islice(made, 20))
    made.close()
    assert engine.running  # nobody reads, and it goes on
    rest = list(
        api.responses.retrieve(
            read[0].response.id, stream=True, starting_after=read[-1].sequence_number
        )
    )
    numbers = [event.sequence_number for event in [*read, *rest]]
    assert numbers == list(range(len(numbers)))
    deltas = [e.delta for e in [*read, *rest] if e.type == "response.output_text.delta"]
    assert "".join(deltas) == rest[-1].response.output_text == words
    # the client's own helper, from the beginning
    with api.responses.stream(response_id=read[0].response.id, starting_after=10) as events:
        assert next(iter(events)).sequence_number == 11
        assert events.get_final_response().output_text == words


def test_cancelling(client):
    api, engine = client(f"{A}Hm.{E}{S}{F}" + " on" * 3000, delay=0.002)
    begun = ask(api, background=True)
    follower = api.responses.with_streaming_response.retrieve(begun["id"], stream=True)
    with follower as raw:
        until(
            lambda: api.responses.retrieve(begun["id"]).output_text == "" and engine.generated > 20
        )
        cancelled = json.loads(api.responses.with_raw_response.cancel(begun["id"]).text)
        events = events_of("".join(raw.iter_text()))
    conforms(cancelled, shapes.Response)
    assert cancelled["status"] == "cancelled"
    assert [item["status"] for item in cancelled["output"]] == ["completed", "incomplete"]
    assert cancelled["output"][1]["content"][0]["text"].startswith(" on on")
    expected = ["created", "queued", "in_progress", *REASONING, *MESSAGE, "incomplete"]
    assert kinds(events) == expected
    assert events[-1]["response"] == cancelled
    until(lambda: engine.cancelled == [(0, 0)])
    # again, and later, it is the same
    for found in (api.responses.with_raw_response.cancel, api.responses.with_raw_response.retrieve):
        assert json.loads(found(begun["id"]).text) == cancelled


def test_cancelling_what_is_over_or_in_the_foreground(client):
    api, _ = client(HELLO, repeat=True)
    begun = ask(api, background=True)
    until(lambda: api.responses.retrieve(begun["id"]).status == "completed")
    assert api.responses.cancel(begun["id"]).status == "completed"
    with pytest.raises(openai.BadRequestError, match="in the background"):
        api.responses.cancel(ask(api)["id"])


def test_deleting_ends_what_runs(client):
    api, engine = client(f"{F}" + " on" * 3000, delay=0.002)
    begun = ask(api, background=True)
    api.responses.delete(begun["id"])
    until(lambda: engine.cancelled == [(0, 0)])
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(begun["id"])


def test_failure(client):
    api, engine = client(HELLO, repeat=True, fail_after=6)
    with pytest.raises(openai.InternalServerError, match="server failed"):
        ask(api)
    events = stream(api)
    assert kinds(events) == [*BEGIN, *REASONING, "failed"]
    failed = events[-1]["response"]
    assert failed["error"]["code"] == "server_error"
    assert "scripted" not in failed["error"]["message"]  # what broke is not told
    begun = ask(api, background=True)
    until(lambda: api.responses.retrieve(begun["id"]).status == "failed")
    assert kinds(replay(api, begun["id"])) == [
        "created",
        "queued",
        "in_progress",
        *REASONING,
        "failed",
    ]
    # the others are served as before
    engine.fail_after = None
    assert ask(api)["status"] == "completed"


def test_a_full_queue(client):
    api, engine = client(HELLO, repeat=True, capacity=0)
    for more in ({}, {"stream": True}, {"background": True}):
        with pytest.raises(openai.RateLimitError):
            api.responses.create(model="scripted", input="hi", **more)
    assert not engine.requests


def test_a_client_that_goes_cancels(client):
    api, engine = client(f"{F}" + " on" * 3000, delay=0.002)
    made = api.responses.create(model="scripted", input="hi", stream=True)
    id = next(iter(made)).response.id
    made.close()
    until(lambda: engine.cancelled == [(0, 0)])
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(id)


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


MESSAGE_ITEM = {"role": "user", "content": "hi"}
REFUSED = [
    ({"nonsense": 1}, "nonsense"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"context_management": []}, "context_management"),
    ({"n": 2}, "n"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"truncation": "auto"}, "truncation"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"effort": "none"}}, "reasoning.effort"),
    ({"reasoning": {"effort": "minimal"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"include": ["web_search_call.results"]}, "include.0"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{**WEATHER, "name": "a b"}]}, "tools.0.name"),
    ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "name": "other"}, "tools": [WEATHER]}, "tool_choice"),
    ({"background": True, "store": False}, "background"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"temperature": 3}, "temperature"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"metadata": {str(k): "v" for k in range(17)}}, "metadata"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"model": "gpt-5"}, "model"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
    ({"input": [{**MESSAGE_ITEM, "channel": "final"}]}, "input.0.channel"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content"),
    ({"input": [MESSAGE_ITEM, {"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input.1.call_id"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]}, "input.0"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "a.b", "arguments": "{}"}]}, "input.0.name"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
    ({"input": [{**MESSAGE_ITEM, "id": "m"}, {**MESSAGE_ITEM, "id": "m"}]}, "input.1"),
    ({"input": [{"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "x"}]}]}, "input.0.content"),
    ({"input": [{"type": "reasoning", "encrypted_content": "gAAAAB"}]}, "input.0.encrypted_content"),
    ({"input": [{"type": "reasoning", "encrypted_content": "gptoss1.AAAA"}]}, "input.0.encrypted_content"),
    ({"input": "long " * 5000}, "input"),
]  # fmt: skip


@pytest.fixture(scope="module")
def one_server():
    app, engine = app_of(HELLO, repeat=True)
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:  # fmt: skip
        yield api, engine
    engine.close(0)


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)])  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(one_server, body, param):
    api, engine = one_server
    before = len(engine.requests)
    with pytest.raises(openai.APIStatusError) as caught:
        api.post("/responses", cast_to=object, body={"model": "scripted", "input": "hi", **body})
    assert caught.value.status_code in (400, 404)
    place = caught.value.param
    assert place == param or place.startswith(f"{param}."), (place, caught.value.message)
    assert len(engine.requests) == before


def test_null_is_absent(one_server):
    api, _ = one_server
    names = ["instructions", "previous_response_id", "store", "background", "stream", "stream_options", "include", "reasoning", "text", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens", "temperature", "top_p", "top_logprobs", "truncation", "metadata", "user", "service_tier", "conversation", "prompt", "moderation", "context_management", "seed"]  # fmt: skip
    body = {"model": "scripted", "input": "hi", **dict.fromkeys(names)}
    assert api.post("/responses", cast_to=object, body=body)["status"] == "completed"


def test_half_a_call_is_no_call_in_the_next_turn(client):
    api, engine = client(ASKS, HELLO)
    first = ask(api, tools=[WEATHER], max_output_tokens=CUT)
    assert first["output"][-1]["status"] == "incomplete"
    ask(api, tools=[WEATHER], previous_response_id=first["id"], input="Go on.")
    assert "to=functions.weather" not in FULL.decode(engine.requests[1].prompt)


def test_a_conversation_lives_through_the_server_s_end(tmp_path):
    settings = ServerSettings(date=DATE, store=str(tmp_path / "responses.db"))
    ids = []
    for number in range(3):
        app, engine = app_of(HELLO, repeat=True, settings=settings)
        with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
            previous = ids[-1] if ids else None
            ids.append(ask(api, input=f"turn {number}", previous_response_id=previous)["id"])
            assert [api.responses.retrieve(id).output_text for id in ids] == ["Hello world"] * len(
                ids
            )
        prompt = FULL.decode(engine.requests[0].prompt)
        assert all(f"turn {k}" in prompt for k in range(number + 1))
        engine.close(0)


def test_what_ran_in_the_background_when_the_server_ended_has_failed(tmp_path):
    settings = ServerSettings(date=DATE, store=str(tmp_path / "responses.db"))
    app, engine = app_of(f"{F}" + " on" * 3000, delay=0.002, settings=settings)
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
        ended = ask(api, background=True)["id"]
        until(lambda: api.responses.retrieve(ended).status == "in_progress")
    until(lambda: engine.cancelled == [(0, 0)])
    engine.close(0)
    app, engine = app_of(HELLO, settings=settings)
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
        found = api.responses.retrieve(ended)
        assert (found.status, found.error.code) == ("failed", "server_error")
        assert kinds(replay(api, ended, starting_after=4))[-1] == "failed"
    engine.close(0)


def test_agents_sdk_does_a_tool_loop(monkeypatch):
    agents = pytest.importorskip("agents")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return f"rain in {city}"

    for streamed, chained in itertools.product((False, True), (False, True)):
        app, engine = app_of(ASKS, f"{A}Done.{E}{S}{F}It rains.{R}")
        with served(app) as address:

            async def go(address=address, streamed=streamed, chained=chained):
                async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as api:
                    model = agents.OpenAIResponsesModel("scripted", api)
                    agent = agents.Agent(
                        "guide", instructions="Be kind.", model=model, tools=[weather]
                    )
                    more = {"auto_previous_response_id": True} if chained else {}
                    if not streamed:
                        run = await agents.Runner.run(agent, "Weather in Bern?", **more)
                        return run.final_output
                    run = agents.Runner.run_streamed(agent, "Weather in Bern?", **more)
                    async for _ in run.stream_events():
                        pass
                    return run.final_output

            assert asyncio.run(go()) == "It rains."
        second = FULL.decode(engine.requests[1].prompt)
        assert "rain in Bern<|end|>" in second
        assert "I need it." in second
        assert "Be kind." in second
        engine.close(0)
    assert asked == ["Bern"] * 4
