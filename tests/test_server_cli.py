"""`gptoss serve` as a program: it says where it is, answers, drains on SIGTERM, and says in one line
what is wrong."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import started, until

GPTOSS = [sys.executable, "-m", "gptoss_jax.cli.main"]


SCRIPTED = """
import sys, threading
sys.path.insert(0, {tests!r})
from fakes import ScriptedEngine
from gptoss_jax.cli.serve import bind, serve
from gptoss_jax.server.settings import ServerSettings
words = "<|channel|>final<|message|>" + " word" * 300 + "<|return|>"
engine = ScriptedEngine(words, repeat=True, delay={delay}, hold_after={hold})
def go_on():
    sys.stdin.readline()
    engine.go_on()
threading.Thread(target=go_on, daemon=True).start()
sys.exit(serve(engine, ServerSettings(drain_seconds={drain}), bind('127.0.0.1', 0)))
"""


def program(*options):
    """The running program and its address."""
    return started(
        [*GPTOSS, "serve", "--port", "0", "--slots", "2", "--date", "2026-01-01", *options]
    )


def scripted(drain, delay=0.005, hold=None):
    """The same without a model; after `hold` steps it waits for a line."""
    tests = str(Path(__file__).parent)
    code = SCRIPTED.format(tests=tests, drain=drain, delay=delay, hold=hold)
    return started([sys.executable, "-c", code])


def chat(address, **more):
    body = {"messages": [{"role": "user", "content": "hi"}], **more}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)


def test_sigterm_lets_the_running_finish():
    with ThreadPoolExecutor() as pool, scripted(drain=60, hold=100) as (program, address):
        asked = pool.submit(chat, address)
        until(lambda: "slots_busy 1.0" in httpx.get(f"{address}/metrics").text)
        program.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{address}/health").status_code == 503)
        assert chat(address).json()["error"]["code"] == "shutting_down"
        program.stdin.write("\n")
        program.stdin.flush()
        assert asked.result().json()["usage"]["completion_tokens"] == 304
        assert program.wait(20) == 0


def test_sigterm_ends_what_does_not_finish_in_time():
    with scripted(drain=0.2, delay=0.05) as (program, address):
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            program.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-2:]
        assert json.loads(last[0][6:])["error"]["code"] == "shutting_down"
        assert last[1] == "data: [DONE]"
        assert program.wait(20) == 0


@pytest.mark.slow
def test_ctrl_c_is_130():
    with scripted(drain=5) as (program, address):
        assert chat(address, max_tokens=3).status_code == 200
        program.send_signal(signal.SIGINT)
        assert program.wait(20) == 130


@pytest.mark.slow
def test_serve_answers_and_drains():
    options = ("--max-context", "640", "--log")
    with ThreadPoolExecutor() as pool, program(*options) as (running, address):
        body = {"messages": [{"role": "user", "content": "What is 7 + 5?"}], "temperature": 0}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["model"] == "gpt-oss-tiny"
        assert answer["choices"][0]["message"]["content"] == "7 + 5 = 12"
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}

        long = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True}
        asked = pool.submit(httpx.post, f"{address}/v1/completions", json=long, timeout=120)
        busy = "gptoss_engine_slots_busy 1.0"
        until(lambda: busy in httpx.get(f"{address}/metrics").text)
        running.send_signal(signal.SIGTERM)
        assert asked.result().status_code == 200
        assert asked.result().json()["usage"]["completion_tokens"] == 500
        assert running.wait(30) == 0
        log = running.stdout.read()
        assert log.count("/v1/chat/completions gpt-oss-tiny 200") == 1
        assert "7 + 5" not in log


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--adapter", "nonsense"], "NAME=FOLDER"),
        (["--port", "1000000"], "--port"),
        (["--date", "tomorrow"], "YYYY-MM-DD"),
        (["--max-n", "0"], "max_n"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes_are_one_line(options, said, monkeypatch, capsys):
    from gptoss_jax.cli.main import main

    monkeypatch.delenv("GPTOSS_API_KEYS", raising=False)
    assert main(["serve", *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("gptoss serve: ")]) == 1
    assert said in error[-1]


def test_a_port_in_use_is_said_before_the_model_is_loaded(capsys):
    from gptoss_jax.cli.main import main
    from gptoss_jax.cli.serve import bind

    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert f"port {port}" in said
    assert "gpt-oss-tiny" not in said


WITHOUT = """
import sys
for finder in sys.meta_path:
    def find(name, *rest, known=finder.find_spec):
        return None if name.split(".")[0] in ("fastapi", "starlette") else known(name, *rest)
    finder.find_spec = find
from gptoss_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [["serve"], ["batch", "in.jsonl", "out"]])
def test_without_the_extra_it_says_what_to_install(command, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    said = f"gptoss {command[0]}: it needs fastapi: pip install 'gptoss_jax[serve]'"
    assert ran.stderr.strip().endswith(said)
    assert len(ran.stderr.strip().splitlines()) == 1
