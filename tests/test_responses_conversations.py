"""Conversations over /v1/responses: continued, sent whole, stored, and in OpenAI's agents SDK."""

import asyncio
import itertools
import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import responses as shapes
from responding import CUT, WEATHER, ask, conforms
from serving import (
    ASKS,
    BERN,
    DATE,
    HELLO,
    A,
    C,
    E,
    F,
    P,
    R,
    S,
    agent_does_a_tool_loop,
    app_of,
    call,
    local,
    served,
)

from gptoss_jax.chat import ChatSettings, Tool, from_openai
from gptoss_jax.chat.render import render
from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()


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
    shown = ChatSettings(date=DATE, instructions="Be kind.", tools=[Tool("weather", WEATHER["description"], parameters)])  # fmt: skip
    for length, prompt in ((1, prompts[0][0]), (3, prompts[0][1]), (5, prompts[0][2])):
        assert render(from_openai(conversation[:length]), FULL, shown) == prompt
    # reasoning is kept in the tool loop, and dropped after its answer
    assert "I need it." in FULL.decode(prompts[0][1])
    assert "I need it." not in FULL.decode(prompts[0][2])


def test_input_tokens_are_those_of_the_prompt(client):
    api, engine = client(HELLO)
    body = {"model": "scripted", "input": "hi", "instructions": "Be kind.", "tools": [WEATHER]}
    counted = api.responses.input_tokens.count(**body)
    assert not engine.requests
    assert counted.input_tokens == ask(api, **body)["usage"]["input_tokens"]
    assert counted.input_tokens == len(engine.requests[0].prompt)
    with pytest.raises(openai.BadRequestError, match="never compacted"):
        api.responses.compact(model="scripted", input="hi")


def test_instructions_are_not_carried_over(client):
    api, engine = client(HELLO, repeat=True)
    first = ask(api, instructions="Speak Latin.")
    second = ask(api, previous_response_id=first["id"])
    assert second["instructions"] is None
    assert "Speak Latin." in FULL.decode(engine.requests[0].prompt)
    assert "Speak Latin." not in FULL.decode(engine.requests[1].prompt)
    assert "Hello world" in FULL.decode(engine.requests[1].prompt)


def test_half_a_call_is_no_call_in_the_next_turn(client):
    api, engine = client(ASKS, HELLO)
    first = ask(api, tools=[WEATHER], max_output_tokens=CUT)
    assert first["output"][-1]["status"] == "incomplete"
    ask(api, tools=[WEATHER], previous_response_id=first["id"], input="Go on.")
    assert "to=functions.weather" not in FULL.decode(engine.requests[1].prompt)


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


def test_a_conversation_lives_through_the_server_s_end(tmp_path):
    owner = ServerSettings(date=DATE, store=str(tmp_path / "responses.db"))
    ids = []
    for number in range(4):
        if number != 2:  # the third server is the second application, started again
            app, engine = app_of(HELLO, repeat=True, settings=owner)
        with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
            previous = ids[-1] if ids else None
            ids.append(ask(api, input=f"turn {number}", previous_response_id=previous)["id"])
            found = [api.responses.retrieve(id).output_text for id in ids]
            assert found == ["Hello world"] * len(ids)
        prompt = FULL.decode(engine.requests[-1].prompt)
        assert all(f"turn {k}" in prompt for k in range(number + 1))


def test_agents_sdk_does_a_tool_loop(monkeypatch):
    for streamed, chained in itertools.product((False, True), (False, True)):
        more = {"auto_previous_response_id": True} if chained else {}
        prompt = agent_does_a_tool_loop(monkeypatch, "OpenAIResponsesModel", streamed, **more)
        assert "I need it." in prompt


@pytest.fixture(scope="module")
def scripted():
    app, engine = app_of()
    yield app, engine
    engine.close(0)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
steps = st.tuples(
    st.lists(words, max_size=2),  # thoughts
    st.none() | words,  # what is said before a call
    st.integers(0, 2),  # calls; none is an answer
    words,  # the answer, or the user's next words
)


@given(st.lists(steps, min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_any_conversation_is_the_same_continued_and_whole(scripted, conversation):
    app, engine = scripted
    tool = {**WEATHER, "strict": False}
    scripts = []
    for thoughts, said, calls, text in conversation:
        parts = [f"{A}{thought}{E}{S}" for thought in thoughts]
        if calls and said is not None:
            parts.append(f"{P}{said}{E}{S}")
        made = [call("weather", json.dumps({"city": f"{text}{n}"}), E) for n in range(calls)]
        made[-1:] = [part.removesuffix(E) + C for part in made[-1:]]
        scripts.append("".join([*parts, S.join(made) if calls else f"{F}{text}{R}"]))

    async def talk(whole):
        engine.scripts, engine.at, before = scripts, 0, len(engine.requests)
        async with local(app) as client:
            previous, history, new = None, [], [{"role": "user", "content": "hi"}]
            for _, _, calls, text in conversation:
                body = {"input": [*history, *new], "tools": [tool], "store": not whole}
                if not whole:
                    body |= {"input": new, "previous_response_id": previous}
                answer = await client.post("/v1/responses", json=body)
                assert answer.status_code == 200, answer.text
                previous, output = answer.json()["id"], answer.json()["output"]
                history += [*new, *output]
                new = [
                    {"type": "function_call_output", "call_id": item["call_id"], "output": text}
                    for item in reversed(output)  # in any order
                    if item["type"] == "function_call"
                ]
                assert len(new) == calls
                new = new or [{"role": "user", "content": text}]
        return [list(request.prompt) for request in engine.requests[before:]]

    assert asyncio.run(talk(True)) == asyncio.run(talk(False))
