"""/v1/responses over the real engine and gpt-oss-tiny's weights: sums, a tool loop, JSON."""

import asyncio

import openai
import pydantic
import pytest
from responding import ask, replay, same, stream
from serving import DATE, served, until

import gptoss_jax as gj
from gptoss_jax.batching import Engine, EngineSettings
from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings

SUM = {"input": "What is 7 + 5?", "temperature": 0, "model": "gpt-oss-tiny"}


@pytest.fixture(scope="module")
def model():
    return gj.load("gpt-oss-tiny", max_context=512)


@pytest.fixture(scope="module")
def api(model):
    engine = Engine(model, EngineSettings(slots=8))
    with (
        served(create_app(engine, ServerSettings(date=DATE))) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as api,
    ):
        yield api
    engine.close(drain=0)


QUESTIONS = {"What is 7 + 5?": "12", "What is 12 + 30?": "42", "What is 20 - 4?": "16"}


def conversation(api):
    """Each answer; the stream's is the same."""
    previous = None
    for question in QUESTIONS:
        body = {**SUM, "input": question, "previous_response_id": previous}
        answer = ask(api, **body)
        assert same(stream(api, **body)[-1]["response"], answer)
        previous = answer["id"]
        yield answer


def test_a_conversation(api):
    for answer, result in zip(conversation(api), QUESTIONS.values(), strict=True):
        assert answer["output"][-1]["content"][0]["text"].endswith(f" = {result}")


@pytest.mark.slow
def test_a_conversation_is_that_of_chat(api, model):
    chat = gj.Chat(model, date=DATE, sampling=gj.Sampling(temperature=0))
    for question, answer in zip(QUESTIONS, conversation(api), strict=True):
        reply = chat.send(question)
        *thoughts, said = answer["output"]
        assert said["content"][0]["text"] == reply.final
        assert "\n".join(t["content"][0]["text"] for t in thoughts) == reply.analysis
        assert answer["usage"]["input_tokens"] == reply.prompt_tokens
        assert answer["usage"]["output_tokens"] == reply.completion_tokens


def test_in_the_background(api):
    begun = ask(api, **SUM, background=True)
    until(lambda: api.responses.retrieve(begun["id"]).status == "completed")
    assert (
        replay(api, begun["id"])[-1]["response"]["output"][-1]["content"][0]["text"] == "7 + 5 = 12"
    )


def test_parse_is_always_valid(api):
    class Answer(pydantic.BaseModel):
        result: int

    body = {**SUM, "text_format": Answer, "max_output_tokens": 300}
    assert api.responses.parse(**body).output_parsed == Answer(result=12)
    schema = {"type": "json_schema", "name": "answer", "schema": Answer.model_json_schema()}
    hot = {**SUM, "text": {"format": schema}, "temperature": 1.5, "max_output_tokens": 300}
    whole = 0
    for seed in range(4):
        answer = api.responses.create(**hot, extra_body={"seed": seed})
        if answer.status == "completed":
            whole += 1
            Answer.model_validate_json(answer.output_text, strict=True)
    assert whole > 0


def test_agents_sdk_calculates(api, monkeypatch):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def calculate(expression: str) -> str:
        """Evaluates an arithmetic expression."""
        asked.append(expression)
        return "42"

    async def go():
        async with openai.AsyncOpenAI(base_url=str(api.base_url), api_key="none") as other:
            agent = agents.Agent(
                "guide",
                model=agents.OpenAIResponsesModel("gpt-oss-tiny", other),
                tools=[calculate],
                model_settings=agents.ModelSettings(temperature=0),
            )
            return (await agents.Runner.run(agent, "Calculate 6*7.")).final_output

    assert "42" in asyncio.run(go())
    assert asked == ["6*7"]
