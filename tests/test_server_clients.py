"""The unmodified openai client and OpenAI's agents SDK against the server behind a port."""

import json

import openai
import pydantic
import pytest
from serving import (
    ASKS,
    BERN,
    HELLO,
    USER,
    WEATHER,
    A,
    E,
    F,
    R,
    S,
    agent_does_a_tool_loop,
    call,
    until,
)

from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()


def test_chat(client):
    api, engine = client(HELLO, repeat=True)
    answer = api.chat.completions.create(model="scripted", messages=USER, temperature=0, seed=1)
    message = answer.choices[0].message
    assert message.content == "Hello world"
    assert message.reasoning == "Think."
    assert message.reasoning_content == "Think."
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3
    # the client's own object goes back as history
    api.chat.completions.create(model="scripted", messages=[*USER, message, *USER])
    assert "Hello world<|end|>" in FULL.decode(engine.requests[1].prompt)


def test_stream(client):
    api, _ = client(HELLO, repeat=True)
    options = {"include_usage": True}
    chunks = list(
        api.chat.completions.create(
            model="scripted", messages=USER, stream=True, stream_options=options
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello world"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 14


def test_stream_helper(client):
    api, _ = client(ASKS, HELLO)
    tools = [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]
    with api.chat.completions.stream(model="scripted", messages=USER, tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert message.content == "I look."
    assert message.tool_calls[0].function.parsed_arguments == {"city": "Bern"}
    # what the helper made of it goes back, and the tool's result with it
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    answer = api.chat.completions.create(
        model="scripted", messages=[*USER, message, result], tools=[WEATHER]
    )
    assert answer.choices[0].message.content == "Hello world"


class Sum(pydantic.BaseModel):
    """A sum."""

    terms: list[int]
    total: int


def test_parse_into_pydantic(client):
    text = '{"terms": [1, 2], "total": 3}'
    script = f"{A}Easy.{E}{S}<|channel|>final <|constrain|>json<|message|>{text}{R}"
    api, engine = client(script, repeat=True)
    answer = api.chat.completions.parse(model="scripted", messages=USER, response_format=Sum)
    assert answer.choices[0].message.parsed == Sum(terms=[1, 2], total=3)
    assert len(engine.requests[0].masks) == 1
    with api.chat.completions.stream(
        model="scripted", messages=USER, response_format=Sum
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed.total == 3
    with pytest.raises(openai.LengthFinishReasonError):
        api.chat.completions.parse(
            model="scripted", messages=USER, response_format=Sum, max_tokens=12
        )


def test_a_tool_loop(client):
    api, engine = client(call("weather", BERN), f"{F}It rains in Bern.{R}")
    messages = list(USER)
    while True:
        answer = api.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])
        message = answer.choices[0].message
        messages.append(message)
        if answer.choices[0].finish_reason != "tool_calls":
            break
        for made in message.tool_calls:
            city = json.loads(made.function.arguments)["city"]
            result = {"role": "tool", "tool_call_id": made.id, "content": f"rain in {city}"}
            messages.append(result)
    assert message.content == "It rains in Bern."
    assert "rain in Bern<|end|>" in FULL.decode(engine.requests[1].prompt)


def test_logprobs_and_n(client):
    api, _ = client(HELLO, f"{F}Other{R}")
    answer = api.chat.completions.create(
        model="scripted", messages=USER, n=2, logprobs=True, top_logprobs=3
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello world", "Other"]
    for choice in answer.choices:
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)


def test_text_completions_and_models(client):
    api, _ = client([*FULL.encode(" world and all"), FULL.stop_ids[0]], repeat=True)
    answer = api.completions.create(model="scripted", prompt="Hello", logprobs=2, echo=False)
    assert answer.choices[0].text == " world and all"
    assert answer.choices[0].logprobs.tokens == [" world", " and", " all"]
    parts = api.completions.create(model="scripted", prompt="Hello", stream=True)
    assert "".join(part.choices[0].text for part in parts) == " world and all"
    assert [model.id for model in api.models.list()] == ["scripted"]
    assert api.models.retrieve("scripted").id == "scripted"


def test_errors_are_openai_s_exceptions(client):
    settings = ServerSettings(api_keys=("right",))
    api, _ = client(HELLO, key="wrong", settings=settings)
    with pytest.raises(openai.AuthenticationError):
        api.models.list()
    api, engine = client(HELLO, repeat=True, fail_after=5)

    def create(**more):
        return api.chat.completions.create(**{"model": "scripted", "messages": USER, **more})

    with pytest.raises(openai.NotFoundError) as found:
        create(model="gpt-4")
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as found:
        create(extra_body={"nonsense": 1})
    assert found.value.param == "nonsense"
    with pytest.raises(openai.InternalServerError):
        create()
    with pytest.raises(openai.APIError, match="server failed"):
        list(create(stream=True))
    engine.capacity = 0
    with pytest.raises(openai.RateLimitError):
        create()
    with pytest.raises(openai.BadRequestError, match="embedding"):
        api.embeddings.create(model="scripted", input="x")


def test_a_stopped_stream_cancels(client):
    api, engine = client(f"{F}" + " on" * 3000, delay=0.002)
    stream = api.chat.completions.create(model="scripted", messages=USER, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: not engine.running)
    assert engine.cancelled == [(0, 0)]


def test_agents_sdk_does_a_tool_loop(monkeypatch):
    for streamed in (False, True):
        agent_does_a_tool_loop(monkeypatch, "OpenAIChatCompletionsModel", streamed)
