"""What the server's tests share: an application over a scripted engine, in this process or behind a
port, its clients, and an agent of OpenAI's SDK."""

import asyncio
import contextlib
import json
import socket
import subprocess
import threading
import time

import httpx
import openai
import pytest
import uvicorn
from fakes import ScriptedEngine

from gptoss_jax.server.app import create_app
from gptoss_jax.server.settings import ServerSettings

DATE = "2026-01-01"
F = "<|channel|>final<|message|>"
A = "<|channel|>analysis<|message|>"
P = "<|channel|>commentary<|message|>"
E, S, R, C = "<|end|>", "<|start|>assistant", "<|return|>", "<|call|>"
HELLO = f"{A}Think.{E}{S}{F}Hello world{R}"
USER = [{"role": "user", "content": "hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def call(name, arguments, stop=C):
    """A call as the model writes it."""
    return (
        f" to=functions.{name}<|channel|>commentary <|constrain|>json<|message|>{arguments}{stop}"
    )


BERN = json.dumps({"city": "Bern"})
ASKS = f"{A}I need it.{E}{S}{P}I look.{E}{S}{call('weather', BERN)}"


def app_of(*scripts, settings=None, **engine):
    """An application and its engine."""
    engine = ScriptedEngine(*scripts, **engine)
    return create_app(engine, settings or ServerSettings(date=DATE)), engine


def local(app, **more):
    """A client of an application in this process."""
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://server", timeout=30, **more)


async def chat(app, **body):
    """The answer of /v1/chat/completions."""
    async with local(app) as client:
        return await client.post("/v1/chat/completions", json={"messages": USER, **body})


def events(text):
    """The JSON of server-sent events, [DONE] checked and left out."""
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def summed(chunks, number=0):
    """A choice as the sum of its chunks: message, finish_reason, logprobs."""
    message, calls, logprobs, reason = {}, {}, None, None
    for chunk in chunks:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            if choice["index"] != number:
                continue
            assert reason is None, "a delta after the finish_reason"
            reason = choice["finish_reason"]
            if choice["logprobs"]:
                logprobs = (logprobs or []) + choice["logprobs"]["content"]
            for key, value in choice["delta"].items():
                if key == "tool_calls":
                    for part in value:
                        place = calls.setdefault(part["index"], {"function": {"arguments": ""}})
                        place["function"]["arguments"] += part["function"]["arguments"]
                        place["function"].update(
                            {k: v for k, v in part["function"].items() if k == "name"}
                        )
                        place.update({k: v for k, v in part.items() if k in ("id", "type")})
                elif key == "function_call":
                    place = message.setdefault(key, {"name": "", "arguments": ""})
                    place["name"] += value.get("name", "")
                    place["arguments"] += value["arguments"]
                else:
                    message[key] = message.get(key, "") + value
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message, reason, logprobs


@contextlib.contextmanager
def served(app, **config):
    """The application behind a port of this machine; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on", **config))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def started(command):
    """A program that serves as `gptoss serve` does, from when it listens; yields it and its
    address. It has ended afterwards, whatever happens.
    """
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as p:
        try:
            lines = iter(p.stdout.readline, "")
            said = next((line for line in lines if "served at" in line), None)
            assert said, p.stderr.read()
            yield p, said.split()[-1]
        finally:
            if p.poll() is None:
                p.kill()
                p.communicate()


@contextlib.contextmanager
def clients():
    """Makes openai clients of servers that replay scripts; with the engines."""
    with contextlib.ExitStack() as stack:

        def make(*scripts, key="none", settings=None, **engine):
            app, made = app_of(*scripts, settings=settings, **engine)
            base = f"{stack.enter_context(served(app))}/v1"
            api = stack.enter_context(openai.OpenAI(base_url=base, api_key=key, max_retries=0))
            return api, made

        yield make


def agent_does_a_tool_loop(monkeypatch, kind, streamed, **more):
    """An agent of OpenAI's SDK asks for the weather, gets it and answers.

    Args:
      kind: Name of the SDK's model, which says what the agent speaks.
      streamed: Does it read the model's events?
      more: What the SDK's runner takes.

    Returns:
      The prompt that the model is given after the tool's result.
    """
    agents = pytest.importorskip("agents")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return f"rain in {city}"

    app, engine = app_of(ASKS, f"{A}Done.{E}{S}{F}It rains.{R}")

    async def go(address):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as api:
            model = getattr(agents, kind)("scripted", api)
            agent = agents.Agent("guide", instructions="Be kind.", model=model, tools=[weather])
            if not streamed:
                return (await agents.Runner.run(agent, "Weather in Bern?", **more)).final_output
            run = agents.Runner.run_streamed(agent, "Weather in Bern?", **more)
            async for _ in run.stream_events():
                pass
            return run.final_output

    with served(app) as address:
        assert asyncio.run(go(address)) == "It rains."
    assert asked == ["Bern"]
    prompt = engine.tokenizer.decode(engine.requests[1].prompt)
    assert "rain in Bern<|end|>" in prompt
    assert "Be kind." in prompt
    return prompt


def until(condition, seconds=10.0):
    """Waits until something holds, and gives it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.005)
    return found
