"""`gptoss batch`: OpenAI's form in and out, the server's own answers, and files that no interruption
makes lose or double anything.
"""

import asyncio
import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import children
import numpy as np
import pytest
from fakes import ScriptedEngine
from serving import A, E, F, R, S, local

import gptoss_jax as gj
from gptoss_jax.cli import batch
from gptoss_jax.cli.batches import own_seed
from gptoss_jax.cli.main import main
from gptoss_jax.server import batch_ray, batch_requests
from gptoss_jax.server.app import create_app
from gptoss_jax.tokenizer import load_tokenizer

FULL = load_tokenizer()
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
DATE = "2026-11-21"
OPTIONS = ("--seed", "5", "--date", DATE, "--slots", "4")


def line(custom_id, url=CHAT, **body):
    if url == CHAT and "messages" not in body:
        body["messages"] = [{"role": "user", "content": f"hi {custom_id}"}]
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(folder, lines):
    rows = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    (folder / "in.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder / "in.jsonl")


def run(folder, *options, out="out"):
    return main(["batch", str(folder / "in.jsonl"), str(folder / out), *options])


def read(path):
    return [json.loads(row) for row in path.read_text().splitlines()]


def ids(path):
    return [row["custom_id"] for row in read(path)] if path.exists() else []


def visible(row):
    """An answer without what differs from one time to the next."""
    body = dict(row["response"]["body"])
    body["output"] = [{**item, "id": ""} for item in body.get("output", ())]
    drop = ("id", "created", "created_at", "completed_at")
    return row["custom_id"], {key: value for key, value in body.items() if key not in drop}


@dataclasses.dataclass
class Loaded:
    """What `load_model` gives the verb here."""

    params: dict
    name: str = "scripted"


def telling(request):
    """Scripts that tell the prompt's last words and the seed, so that answers can be told apart."""
    text = FULL.decode(list(request.prompt))
    asked = text.split("<|message|>")[-1].split("<|end|>")[0]
    return [
        f"{A}So.{E}{S}{F}{asked} {request.sampling.seed} {n}{R}" for n in range(request.sampling.n)
    ]


@pytest.fixture
def engines(monkeypatch):
    """The verb gets scripted engines; `make` says which, `made` holds those it got."""
    found = types.SimpleNamespace(made=[], make=lambda: ScriptedEngine(telling, max_context=4096))

    def load_model(options, quiet=False, adapters=None):
        dtype = np.dtype(options.dtype or "float32")
        return Loaded({"embedding": np.zeros(1, dtype)})

    def start_engine(model, slots):
        found.made.append(found.make())
        found.made[-1].name = model.name
        return found.made[-1]

    monkeypatch.setattr(batch, "load_model", load_model)
    monkeypatch.setattr(batch_requests, "start_engine", start_engine)
    return found


LINES = [
    line("b"),
    line("a", n=2, seed=7),
    line("text", TEXT, prompt="go on", max_tokens=5),
    line("old", RESPONSES, input="hi"),
    line("wrong", temperature=9),
    line("what", model="gpt-4o"),
    line("ä\ud800", RESPONSES, input=[{"role": "user", "content": "hi"}]),
]
DONE = ["b", "a", "text", "old", "ä\ud800"]


def test_answers_are_the_server_s_in_openai_s_form(engines, tmp_path, capsys):
    write(tmp_path, [*LINES[:2], "   ", *LINES[2:]])
    assert run(tmp_path, *OPTIONS, "--json") == 1
    out = tmp_path / "out"
    said = capsys.readouterr()
    answers, errors = read(out / "output.jsonl"), read(out / "errors.jsonl")
    assert [row["custom_id"] for row in answers] == DONE
    assert [row["custom_id"] for row in errors] == ["wrong", "what"]
    for row in [*answers, *errors]:
        assert list(row) == ["id", "custom_id", "response", "error"]
        assert list(row["response"]) == ["status_code", "request_id", "body"]
        assert row["error"] is None
        assert row["id"].startswith("batch_req_")
    assert len({row["id"] for row in [*answers, *errors]}) == 7
    assert {row["response"]["status_code"] for row in answers} == {200}
    assert [row["response"]["status_code"] for row in errors] == [400, 404]
    assert errors[0]["response"]["body"]["error"]["param"] == "temperature"
    # the same bodies through the server itself, with the seeds that the run folds
    engine = ScriptedEngine(telling, name="gpt-oss-tiny")
    app = create_app(engine, batch_requests.settings_of(DATE))

    async def served():
        async with local(app) as client:
            for one in LINES:
                body = {"seed": own_seed(5, one["custom_id"]) >> 1, **one["body"]}
                if one["url"] == RESPONSES:
                    body["store"] = False
                headers = {"content-type": "application/json"}
                got = await client.post(one["url"], content=json.dumps(body), headers=headers)
                yield {"custom_id": one["custom_id"], "response": {"body": got.json()}}

    async def all_served():
        return [row async for row in served()]

    expected = dict(map(visible, asyncio.run(all_served())))
    for row in [*answers, *errors]:
        custom_id, body = visible(row)
        for key in ("usage",):  # what is cached depends on what ran before
            for side in (body, expected[custom_id]):
                for details in ("prompt_tokens_details", "input_tokens_details"):
                    (side.get(key) or {}).pop(details, None)
        assert body == expected[custom_id]
    assert answers[1]["response"]["body"]["choices"][1]["message"]["content"] == "hi a 7 1"
    summary = json.loads(said.out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["request_counts"] == {"total": 7, "completed": 5, "failed": 2}
    assert summary["error_file"] == str(out / "errors.jsonl")
    assert "2 of 7 requests failed: see" in said.err
    assert sorted(os.listdir(out)) == ["errors.jsonl", "output.jsonl", "run.json", "summary.json"]


def test_a_long_answer_keeps_no_other_waiting(engines, tmp_path):
    """As many at once as twice the slots, never more, and the first, which is long, holds up none."""
    running = []

    def seen(request):
        (script,) = telling(request)
        at_work = engines.made[0].running
        running.append([one.number for one in at_work])
        if len(running) == 40:  # the long one ends when all others have begun
            del at_work[0].scripts[0][at_work[0].places[0] + 1 :]
        return [f"{F}{'long ' * 3000}{R}"] if "hi q0 " in script else [script]

    engines.make = lambda: ScriptedEngine(seen, delay=0.001)
    write(tmp_path, [line(f"q{i}") for i in range(40)])
    assert run(tmp_path, *OPTIONS) == 0
    assert max(map(len, running)) == 7  # and the new one
    assert len(running) == 40
    assert all(0 in numbers for numbers in running[1:])
    assert ids(tmp_path / "out" / "output.jsonl") == [f"q{i}" for i in range(40)]
    assert not (tmp_path / "out" / "errors.jsonl").exists()


@pytest.mark.parametrize("way", ["ctrl-c", "sigterm", "disk"])
def test_interrupted_and_continued(engines, tmp_path, monkeypatch, capsys, way):
    """Nothing lost, nothing doubled, the order of the input, and the answers of an uninterrupted run."""
    lines = [line(f"q{i}", **({"temperature": 9} if i % 7 == 3 else {})) for i in range(40)]
    write(tmp_path, lines)
    write_row, count = os.pwrite, itertools.count()

    def interrupted(file, data, at):
        if next(count) != 5:
            return write_row(file, data, at)
        if way == "disk":
            write_row(file, data[: len(data) // 2], at)
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write_row(file, data, at)
        os.kill(os.getpid(), signal.SIGTERM if way == "sigterm" else signal.SIGINT)
        time.sleep(0.2)
        return written

    monkeypatch.setattr(os, "pwrite", interrupted)
    options = ("--slots", "2")
    engines.make = lambda: ScriptedEngine(telling, delay=0.0005)
    heeded = signal.getsignal(signal.SIGINT)
    # as a shell has it for what it runs in the background; these tests may be run there too
    ignored = way == "sigterm"
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        assert run(tmp_path, *options) == (1 if way == "disk" else 130)
    finally:
        signal.signal(signal.SIGINT, heeded)
    said = capsys.readouterr().err
    assert (
        "No space left on device"
        if way == "disk"
        else "of 40 requests are answered; the same command goes on"
    ) in said
    monkeypatch.setattr(os, "pwrite", write_row)
    out = tmp_path / "out"
    before = ids(out / "output.jsonl") + ids(out / "errors.jsonl")
    assert 4 <= len(before) < 40
    assert len(set(before)) == len(before)
    assert not (out / "summary.json").exists()
    seed = json.loads((out / "run.json").read_text())["settings"]["seed"]
    first = {row["custom_id"]: row for row in read(out / "output.jsonl")}
    with (out / "output.jsonl").open("ab") as file:
        file.write(b'{"id": "x", "custom_id": "q39", "resp')
    assert run(tmp_path, *options, "--json") == 1  # seven requests are wrong
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered_before"], summary["answered"]) == (len(before), 40 - len(before))
    assert ids(out / "output.jsonl") == [f"q{i}" for i in range(40) if i % 7 != 3]
    assert ids(out / "errors.jsonl") == [f"q{i}" for i in range(40) if i % 7 == 3]
    now = {row["custom_id"]: row for row in read(out / "output.jsonl")}
    assert {key: now[key] for key in first} == first  # kept, not made again
    for key, row in now.items():
        text = row["response"]["body"]["choices"][0]["message"]["content"]
        assert text == f"hi {key} {own_seed(seed, key) >> 1} 0"
    made = len(engines.made)
    assert run(tmp_path, *options) == 1
    assert f"{out}: all 40 requests are answered already" in capsys.readouterr().out
    assert len(engines.made) == made  # nothing left to do, nothing loaded
    assert all(engine.closed for engine in engines.made)


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import test_batch
from gptoss_jax.cli import batch
from gptoss_jax.cli.main import main
from gptoss_jax.server import batch_requests
batch.load_model = lambda *_, **__: test_batch.Loaded({{"embedding": test_batch.np.zeros(1, "float32")}})
batch_requests.start_engine = lambda *_: test_batch.ScriptedEngine(test_batch.telling, delay=0.002)
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_continued(engines, tmp_path, capsys):
    """SIGKILL in the middle; until then a second run of the same command is refused."""
    write(tmp_path, [line(f"q{i}") for i in range(300)])
    output = tmp_path / "out" / "output.jsonl"
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--slots", "1"]
    program = children.HOLDS_AFTER_THREE + PROGRAM.format(tests=str(Path(__file__).parent))
    process = children.holding(program, *words)
    assert run(tmp_path) == 1
    assert f"another run is writing {output}" in capsys.readouterr().err
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(output.read_bytes().split(b"\n")) - 1
    assert 0 < done < 300
    assert run(tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["answered_before"] == done
    assert ids(output) == [f"q{i}" for i in range(300)]


def test_a_full_queue_is_waited_for(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_requests, "WAIT", 0.005)
    engines.make = lambda: ScriptedEngine(telling, capacity=3)
    write(tmp_path, [line(f"q{i}") for i in range(30)])
    assert run(tmp_path, *OPTIONS) == 0
    assert ids(tmp_path / "out" / "output.jsonl") == [f"q{i}" for i in range(30)]


def test_what_the_engine_fails_on_is_asked_again(engines, tmp_path, capsys):
    """Twice; then it is an error, which --retry-failed asks again."""
    asked = []

    def broken(times):
        def scripts(request):
            asked.append(FULL.decode(list(request.prompt)).count("hi q1<"))
            engine.fail_after = 0 if asked[-1] and sum(asked) <= times else None
            return telling(request)

        engine = ScriptedEngine(scripts)
        return engine

    write(tmp_path, [line(f"q{i}") for i in range(3)])
    out, one = tmp_path / "out", ("--slots", "1", "--seed", "1", "--date", DATE)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(batch, "_Here", OneAtATime)
    try:
        engines.make = lambda: broken(2)
        assert run(tmp_path, *one) == 0
        assert sum(asked) == 3
        asked.clear()
        engines.make = lambda: broken(99)
        assert run(tmp_path, *one, "--overwrite") == 1
        assert sum(asked) == 3
        (error,) = read(out / "errors.jsonl")
        assert (error["custom_id"], error["response"]["status_code"]) == ("q1", 500)
        assert ids(out / "output.jsonl") == ["q0", "q2"]
        asked.clear()
        assert run(tmp_path, *one) == 1
        assert not asked  # what has failed has its answer
        engines.make = lambda: broken(0)
        assert run(tmp_path, *one, "--retry-failed") == 0
        assert sum(asked) == len(asked) == 1
    finally:
        monkey.undo()
    assert ids(out / "output.jsonl") == ["q0", "q1", "q2"]
    assert not (out / "errors.jsonl").exists()
    capsys.readouterr()


class OneAtATime(batch._Here):
    """Requests one after the other, so that a script knows whose turn it is."""

    def answers(self, asked, settings):
        self.requests.at_once = 1
        return super().answers(asked, settings)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes): {: expected"),
        ('"hi"', 'line 2: found "hi": expected {"custom_id": "...", "method": "POST"'),
        ("[" * 5000, "line 2: not JSON (nested too deeply): [[["),
        ('{"custom_id": "x", "custom_id": "y"}', "line 2: the key 'custom_id' comes twice"),
        ('{"custom_id": "x", "body": {"top_p": NaN}}', "line 2: it holds NaN, which is not JSON"),
        ({**line("x"), "priority": 1}, 'line 2: unknown key "priority": expected'),
        ({"custom_id": "x"}, "line 2: method is missing: expected"),
        ({**line("x"), "custom_id": 7}, "line 2: custom_id is 7: expected text, not empty"),
        (line("a"), 'line 2: custom_id "a" is that of line 1 too: give each its own'),
        ({**line("x"), "method": "GET"}, 'line 2: method is "GET": expected "POST"'),
        (line("x", "/v1/embeddings"), 'line 2: url is "/v1/embeddings": expected one of /v1/chat'),
        ({**line("x"), "body": []}, "line 2: body is []: expected an object"),
        (line("x", stream=True), "line 2: body.stream is true: leave it out: an answer of a batch"),
        (line("x", RESPONSES, background=True), "line 2: body.background is true: leave it out"),
        (line("x", RESPONSES, store=True), "line 2: body.store is true: leave it out: answers of"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_before_loading(engines, tmp_path, capsys, bad, message):
    path = write(tmp_path, [line("a"), bad, line("b")])
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"gptoss batch: {path} {message}")
    assert len(said.splitlines()) == 1
    assert not engines.made
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_bad_files_and_options(engines, tmp_path, capsys):
    def refused(*options, **keywords):
        capsys.readouterr()
        assert run(tmp_path, *options, **keywords) == 1
        return capsys.readouterr().err

    assert "in.jsonl: no such file: give a file with one request a line" in refused()
    write(tmp_path, ["", " "])
    assert "in.jsonl holds no requests" in refused()
    (tmp_path / "in.jsonl").write_bytes(b'{"custom_id": "\xff"}\n')
    assert "in.jsonl line 1: not UTF-8" in refused()
    write(tmp_path, ["{", "[", line("a"), "}"])
    assert "line 1: not JSON" in (said := refused())
    assert "(2 more bad lines)" in said
    write(tmp_path, [line("a")])
    assert "is a file: give a folder for the answers" in refused(out="in.jsonl")
    assert "--slots is 0: expected a positive integer" in refused("--slots", "0")
    assert "--actors and --actor-resources need --ray" in refused("--actors", "2")
    assert "expected a date as YYYY-MM-DD, got 'today'" in refused("--date", "today")
    assert "--adapter x: give each as NAME=FOLDER" in refused("--adapter", "x")
    assert "./no: no such folder" in refused("--model", "./no", out="new")
    assert not (tmp_path / "new").exists()
    assert not engines.made


def test_an_output_of_something_else_is_refused(engines, tmp_path, capsys):
    write(tmp_path, [line("a"), line("b", temperature=9)])
    out = tmp_path / "out"
    assert run(tmp_path, *OPTIONS) == 1
    files = {name: (out / name).read_bytes() for name in os.listdir(out)}

    def refused(*options):
        capsys.readouterr()
        assert run(tmp_path, *options) == 1
        assert len(engines.made) == 1
        assert {name: (out / name).read_bytes() for name in os.listdir(out)} == files
        return capsys.readouterr().err

    assert "output.jsonl was begun with seed 5, not 6: continue with the same" in refused(
        "--seed", "6"
    )
    assert 'was begun with name "gpt-oss-tiny", not "mine"' in refused("--name", "mine")
    assert 'was begun with date "2026-11-21", not "2026-11-22"' in refused("--date", "2026-11-22")
    row = (out / "errors.jsonl").read_bytes()
    files["output.jsonl"] += row
    (out / "output.jsonl").write_bytes(files["output.jsonl"])
    assert "'b' stands in both" in refused()
    files["output.jsonl"] += b'{"custom_id": "z"}\n'
    (out / "output.jsonl").write_bytes(files["output.jsonl"])
    assert 'line 3: {"custom_id": "z"} is no answer of this run: mend the file' in refused()
    write(tmp_path, [line("a")])
    assert "was begun with another content of" in refused()
    assert run(tmp_path, *OPTIONS, "--overwrite") == 0
    assert ids(out / "output.jsonl") == ["a"]
    assert not (out / "errors.jsonl").exists()


def test_gpt_oss_tiny(tmp_path, capsys):
    """The real engine works the sums out."""
    pairs = [(12, 7), (5, 4), (30, 41), (20, 68), (7, 5), (17, 25)]
    pairs += [(33, 44), (61, 8), (9, 9), (52, 36), (81, 13), (3, 64)]
    write(tmp_path, [
        line(f"q{i}", messages=[{"role": "user", "content": f"What is {a} + {b}?"}],
             temperature=0, reasoning_effort="high", max_completion_tokens=100)
        for i, (a, b) in enumerate(pairs)
    ])  # fmt: skip
    assert run(tmp_path, "--slots", "8", "--date", DATE, "--max-context", "512", "--json") == 0
    for row, (a, b) in zip(read(tmp_path / "out" / "output.jsonl"), pairs, strict=True):
        body = row["response"]["body"]
        assert body["choices"][0]["message"]["content"] == f"{a} + {b} = {a + b}"
        assert body["model"] == "gpt-oss-tiny"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["dtype"] == "float32"
    summary = json.loads(capsys.readouterr().out)
    assert summary["completion_tokens"] == sum(
        row["response"]["body"]["usage"]["completion_tokens"]
        for row in read(tmp_path / "out" / "output.jsonl")
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["in", "out", "--ray"], ["in", "out", "--ray="]),
        (["--ray", "in", "out"], ["--ray=", "in", "out"]),
        (["in", "out", "--ray", "--actors", "2"], ["in", "out", "--ray=", "--actors", "2"]),
        (["in", "out", "--ray", "10.0.0.1:6379"], ["in", "out", "--ray", "10.0.0.1:6379"]),
        (["in", "out", "--ray=ray://h:10001"], ["in", "out", "--ray=ray://h:10001"]),
    ],
)
def test_ray_may_stand_alone(words, expected):
    assert batch.expand(words) == expected


def test_an_address_where_no_cluster_is(engines, tmp_path, capsys):
    pytest.importorskip("ray")
    write(tmp_path, [line("a")])
    assert run(tmp_path, "--ray", "127.0.0.1:1") == 1
    assert "no Ray cluster at 127.0.0.1:1: start one" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_ray_that_is_not_there(engines, tmp_path, capsys, monkeypatch):
    write(tmp_path, [line("a")])
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(tmp_path, "--ray") == 1
    assert "--ray needs Ray: pip install 'gptoss_jax[ray]'" in capsys.readouterr().err
    assert batch_ray.resources_of("GPU=1, TPU=4") == {"GPU": 1.0, "TPU": 4.0}
    for text in ("GPU", "GPU=x", "=1", "GPU=-1", "GPU=inf", ""):
        with pytest.raises(gj.GptOssError, match="give NAME=NUMBER, such as GPU=1"):
            batch_ray.resources_of(text)


def processes(mark):
    """Processes with a word in their environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
            except OSError:
                continue
    return found


def all_end(mark):
    """Ray's helpers look for their parent only now and then."""
    end = time.monotonic() + 180
    while left := processes(mark):
        assert time.monotonic() < end, left
        time.sleep(0.2)


def sums(count):
    return [
        line(f"q{i}", reasoning_effort="high",
             messages=[{"role": "user", "content": f"What is {37 * i % 900} + {91 * i % 800}?"}])
        for i in range(count)
    ]  # fmt: skip


def started(folder, mark, *options):
    words = ["batch", str(folder / "in.jsonl"), str(folder / "out"), *options]
    return subprocess.Popen(
        [sys.executable, "-m", "gptoss_jax.cli.main", *words],
        env={**os.environ, "XLA_FLAGS": "", "GPTOSS_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def more_than(count, output, process, seconds=600):
    """Waits until a run has more answers than that."""
    end = time.monotonic() + seconds
    while not output.exists() or output.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, capsys):
    """gpt-oss-tiny, killed at eight random places: the answers of a run that nobody killed."""
    write(tmp_path, sums(400))
    output, random = tmp_path / "out" / "output.jsonl", np.random.default_rng(0)
    for number in range(8):
        before = output.read_bytes().count(b"\n") if output.exists() else 0
        process = started(tmp_path, "killed", *OPTIONS)
        more_than(before, output, process)
        time.sleep(float(random.uniform(0, 0.6)))
        process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][number % 3])
        process.communicate()
        done = ids_of_whole_lines(output)
        assert len(done) == len(set(done))
        assert before < len(done) < 400
    assert run(tmp_path, *OPTIONS) == 0
    assert run(tmp_path, *OPTIONS, out="straight") == 0
    assert [*map(without_cached, read(output))] == [
        *map(without_cached, read(tmp_path / "straight" / "output.jsonl"))
    ]
    capsys.readouterr()


def ids_of_whole_lines(path):
    return [json.loads(row)["custom_id"] for row in path.read_bytes().split(b"\n")[:-1]]


def without_cached(row):
    custom_id, body = visible(row)
    usage = {k: v for k, v in body["usage"].items() if k != "prompt_tokens_details"}
    return custom_id, {**body, "usage": usage}


@pytest.mark.slow
def test_ray_loses_and_doubles_nothing(tmp_path, capsys):
    """Two actors; the program is killed, then an actor: the answers of one machine."""
    pytest.importorskip("ray")
    write(tmp_path, sums(60))
    output, mark = tmp_path / "out" / "output.jsonl", f"batch-{os.getpid()}-{time.time_ns()}"
    options = ("--ray", "--actors", "2", "--seed", "5", "--date", DATE, "--slots", "3")
    process = started(tmp_path, mark, *options)
    try:
        more_than(0, output, process)
        process.kill()
        process.communicate()
        all_end(mark)
        before = ids_of_whole_lines(output)
        assert 0 < len(before) < 60
        process = started(tmp_path, mark, *options, "--json")
        more_than(len(before), output, process)
        actors = [pid for pid, what in processes(mark).items() if "Answerer" in what]
        assert len(actors) == 2
        os.kill(actors[0], signal.SIGKILL)
        said, heard = process.communicate(timeout=600)
        assert process.returncode == 0, heard
        assert json.loads(said)["answered_before"] == len(before)
        all_end(mark)
    finally:
        process.kill()
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)
    assert ids(output) == [f"q{i}" for i in range(60)]
    assert run(tmp_path, *OPTIONS, out="here") == 0
    assert [*map(without_cached, read(output))] == [
        *map(without_cached, read(tmp_path / "here" / "output.jsonl"))
    ]
    # and what Ray began, one machine may go on with
    assert run(tmp_path, *OPTIONS) == 0
    assert "all 60 requests are answered already" in capsys.readouterr().out
