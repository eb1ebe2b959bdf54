"""The command line as a user meets it: speed of --help, exit codes, one line on stderr, JSON on stdout."""

import json
import os
import subprocess
import sys
import time

import pytest

SCHEMA = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}


def gptoss(*words, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "gptoss_jax.cli.main", *words],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_help_answers_at_once():
    def once():
        started = time.perf_counter()
        done = gptoss("--help")
        assert done.returncode == 0
        assert "generate" in done.stdout
        return time.perf_counter() - started

    assert min(once() for _ in range(3)) < 0.5


def test_every_verb_explains_itself():
    from gptoss_jax.cli.main import VERBS

    for verb in VERBS:
        done = gptoss(verb, "--help")
        assert done.returncode == 0, done.stderr
        assert f"usage: gptoss {verb}" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, ""),
        (["train"], 2, "gptoss: no verb 'train': use one of generate, chat"),
        (["generate"], 2, "required"),
        (["generate", "hi", "--effort", "huge"], 2, "huge"),
        (["generate", "hi", "-m", "./nowhere"], 1, "gptoss generate: ./nowhere: no such folder"),
        (["generate", ""], 1, "gptoss generate: the prompt is empty: give at least one token"),
        (["generate", "hi", "--temperature", "nan"], 1, "temperature is nan: expected a number"),
        (["generate", "hi", "--stop", "x"], 1, "--stop ends plain text: use it with --raw"),
        (["generate", "hi", "--max-context", "9000"], 1, "this model's context is 1 to 8192"),
        (["generate", "word " * 9000], 1, "the context is 8192 tokens; shorten the prompt"),
    ],
)
def test_exit_codes_and_one_line(words, code, message):
    done = gptoss(*words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    if code == 1:
        assert done.stdout == ""
        last = done.stderr.strip().splitlines()
        assert len([line for line in last if line.startswith("gptoss")]) == 1
        assert "Traceback" not in done.stderr


def test_traceback_shows_the_whole_story():
    done = gptoss("generate", "hi", "-m", "./nowhere", "--traceback")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_generate_reasons_and_answers():
    done = gptoss("generate", "What is 347 + 285?", "--effort", "high", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    *reasoning, answer = done.stdout.strip().splitlines()
    assert reasoning
    assert "632" in answer
    assert "Using gpt-oss-tiny" in done.stderr


def test_generate_json_and_response_format(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    done = gptoss(
        "generate", "What is 20 + 13?", "--json", "--temperature", "0",
        "--response-format", str(tmp_path / "schema.json"),
    )  # fmt: skip
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert json.loads(answer["final"]) == {"result": 33}
    assert answer["finish_reason"] == "stop"
    assert answer["completion_tokens"] > 5


def test_raw_continues_text():
    done = gptoss("generate", "12+", "--raw", "--json", "--max-new-tokens", "5", "--seed", "1")
    answer = json.loads(done.stdout)
    assert (answer["completion_tokens"], answer["finish_reason"]) in [
        (5, "length"),
        *((n, "stop") for n in range(5)),
    ]


def test_chat_keeps_the_history_and_switches_effort():
    lines = ["What is 5 + 4?", "/effort high", "What is 7 + 8?", "/history", "/effort x", "/quit"]
    done = gptoss("chat", "--temperature", "0", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "9" in done.stdout
    assert "15" in done.stdout
    assert "reasoning effort: high" in done.stderr
    assert done.stderr.count("user") == 2
    assert "choose low, medium, high" in done.stderr
