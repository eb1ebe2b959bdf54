"""The server over the real engine and gpt-oss-tiny's weights: what it can do, and a short load."""

import asyncio
import json
import sys

import jax
import numpy as np
import openai
import pydantic
import pytest
from load_serving import load
from serving import DATE, served

import gptoss_jax as gj
from gptoss_jax import adapters, lora
from gptoss_jax.adapters import peft
from gptoss_jax.batching import Engine, EngineSettings
from gptoss_jax.chat import Chat
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings

LONG = "--slow" in sys.argv
QUESTION = [{"role": "user", "content": "What is 7 + 5?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """gpt-oss-tiny, and an adapter of noise that makes it write something else."""
    config = gj.load("gpt-oss-tiny").config
    settings = lora.LoraConfig(rank=2)
    draw = np.random.default_rng(0)
    shapes = lora.shapes(config, settings)
    tree = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32) / 3, shapes)
    folder = tmp_path_factory.mktemp("noise")
    peft.export(folder, adapters.Adapter(tree, settings), config)
    return gj.load("gpt-oss-tiny", max_context=512, adapters={"noise": folder})


@pytest.fixture(scope="module")
def address(model):
    engine = Engine(model, EngineSettings(slots=8))
    with served(create_app(engine, ServerSettings(date=DATE))) as address:
        yield address
    engine.close(drain=0)


@pytest.fixture
def api(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_the_answer_is_that_of_chat(api, model):
    reply = Chat(model, date=DATE, sampling=gj.Sampling(temperature=0)).send("What is 7 + 5?")
    answer = api.chat.completions.create(model="gpt-oss-tiny", messages=QUESTION, temperature=0)
    message = answer.choices[0].message
    assert message.content == reply.final == "7 + 5 = 12"
    assert message.reasoning == reply.analysis
    assert answer.usage.prompt_tokens == reply.prompt_tokens
    assert answer.usage.completion_tokens == reply.completion_tokens
    parts = api.chat.completions.create(
        model="gpt-oss-tiny", messages=QUESTION, temperature=0, stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts) == reply.final


def test_an_adapter_is_a_model(api, model):
    def ask(name):
        answer = api.chat.completions.create(
            model=name, messages=QUESTION, temperature=0, max_tokens=24, logprobs=True
        )
        return answer.choices[0].message.content, answer.model

    def alone(adapter):
        sampling = gj.Sampling(temperature=0)
        chat = Chat(model, date=DATE, sampling=sampling, max_new_tokens=24, adapter=adapter)
        reply = chat.send("What is 7 + 5?")
        return "\n".join(text for text in (reply.preamble, reply.final) if text)

    assert [name.id for name in api.models.list()] == ["gpt-oss-tiny", "noise"]
    assert ask("noise") == (alone("noise"), "noise")
    assert ask("gpt-oss-tiny") == (alone(None), "gpt-oss-tiny")
    assert ask("noise")[0] != ask("gpt-oss-tiny")[0]


def test_a_sum_by_a_tool(api):
    """gpt-oss-tiny calls tools that it is offered; whatever it does has the right shape."""
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two integers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
    answer = api.chat.completions.create(
        model="gpt-oss-tiny", messages=QUESTION, tools=[tool], tool_choice="required", temperature=0, max_tokens=300,
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    arguments = json.loads(choice.message.tool_calls[0].function.arguments)
    assert set(arguments) == {"a", "b"}


class Verdict(pydantic.BaseModel):
    """What is to come."""

    larger: bool
    total: int = pydantic.Field(ge=0, le=999)


def test_structured_answers_hold_at_any_temperature(api):
    for seed in range(4):
        answer = api.chat.completions.parse(
            model="gpt-oss-tiny", messages=QUESTION, response_format=Verdict, temperature=1.5, seed=seed, max_tokens=400,
        )  # fmt: skip
        assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_the_same_prompt_again_is_cached(api):
    rules = {"role": "system", "content": "Be kind. " * 100}

    def ask():
        answer = api.chat.completions.create(
            model="gpt-oss-tiny", messages=[rules, *QUESTION], max_tokens=2
        )
        return answer.usage

    first, second = ask(), ask()
    assert first.prompt_tokens == second.prompt_tokens > 256
    assert first.prompt_tokens_details.cached_tokens < second.prompt_tokens_details.cached_tokens
    assert second.prompt_tokens_details.cached_tokens >= 128


def test_load(address):
    seconds = 10 if LONG else 3
    report = asyncio.run(load(address, clients=24, seconds=seconds, known=10))
    assert not report.wrong, report.text()
    assert all(
        report.done[kind] > 0 for kind in ("whole", "stream", "cancel", "hang_up", "nonsense")
    )
