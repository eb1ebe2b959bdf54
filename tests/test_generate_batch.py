"""`gptoss generate --input`: answers that neither batch nor interruption changes, files that lose and
double nothing, and every refusal.
"""

import hashlib
import json
import os
import signal

import children
import pytest

import gptoss_jax as gj
from gptoss_jax import steps
from gptoss_jax.cli import answers as answers_file
from gptoss_jax.cli import batch_generate, batches
from gptoss_jax.cli.main import main
from gptoss_jax.errors import GptOssError

DATE = "2026-11-21"
LINES = [
    {"prompt": "What is 12 + 7?"},
    {"prompt": "Who are you?", "id": "who", "reasoning_effort": "low", "metadata": {"kind": 1}},
    {"messages": [{"role": "user", "content": "What is 5 + 4?"},
                  {"role": "assistant", "content": "5 + 4 = 9"},
                  {"role": "user", "content": "What is 31 - 8?"}], "seed": 11},
    {"prompt": "What is 347 + 285?", "reasoning_effort": "high", "max_new_tokens": 9},
    {"prompt": "Hello!", "id": 40, "temperature": 0.0},
    {"prompt": "What is 90 - 34?", "instructions": "Be brief."},
    {"prompt": "Tell me about the sea."},
]  # fmt: skip
IDS = [1, "who", 4, 5, 40, 7, 8]  # line 3 is blank
OPTIONS = ("--seed", "5", "--date", DATE, "--max-new-tokens", "40", "--batch-size", "4")


@pytest.fixture(scope="module")
def model():
    return gj.load("gpt-oss-tiny")


@pytest.fixture
def loaded(model, monkeypatch):
    """The verb gets the model that is there already; how often is counted."""
    calls = []

    def load_model(options, quiet=False, adapter=None):
        calls.append(options)
        return model

    monkeypatch.setattr(batch_generate, "load_model", load_model)
    return calls


def write(path, lines=LINES):
    rows = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    if lines is LINES:
        rows.insert(2, "  ")
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def generate(folder, *options, name="a.jsonl"):
    return main(
        ["generate", "--input", str(folder / "p.jsonl"), "--output", str(folder / name), *options]
    )


def read(path):
    return [json.loads(row) for row in path.read_text().splitlines()]


def own_seed(seed, name):
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def test_answers_are_those_of_a_chat_with_each_prompt(model, loaded, tmp_path, capsys):
    write(tmp_path / "p.jsonl")
    assert generate(tmp_path, *OPTIONS, "--json") == 0
    said = capsys.readouterr()
    found = read(tmp_path / "a.jsonl")
    assert [row["id"] for row in found] == IDS
    for row, line in zip(found, LINES, strict=True):
        seed = line.get("seed", own_seed(5, row["id"]))
        chat = gj.Chat(
            model,
            reasoning_effort=line.get("reasoning_effort", "medium"),
            instructions=line.get("instructions"),
            date=DATE,
            sampling=gj.Sampling(temperature=line.get("temperature", 1.0), seed=seed),
            max_new_tokens=line.get("max_new_tokens", 40),
        )
        reply = chat.send(line.get("prompt") or line["messages"])
        for key in ("final", "analysis", "finish_reason", "prompt_tokens", "completion_tokens"):
            assert row[key] == getattr(reply, key), (row, key)
        assert (row["seed"], row["tool_calls"], row["repairs"]) == (seed, [], reply.repairs)
        assert row.get("metadata") == line.get("metadata")
    assert found[0]["text"].startswith("<|channel|>analysis<|message|>")
    assert found[0]["text"].endswith("<|return|>")
    assert found[3]["finish_reason"] == "length"
    assert found[3]["completion_tokens"] == 9
    summary = json.loads(said.out)
    assert said.err == ""
    assert (summary["prompts"], summary["answered"], summary["failed"]) == (7, 7, 0)
    assert summary["completion_tokens"] == sum(row["completion_tokens"] for row in found)
    record = json.loads((tmp_path / "a.jsonl.run.json").read_text())
    assert (
        record["input"]["sha256"] == hashlib.sha256((tmp_path / "p.jsonl").read_bytes()).hexdigest()
    )
    assert record["settings"]["dtype"] == "float32"


def test_interrupted_torn_and_continued_with_another_batch_size(
    loaded, tmp_path, monkeypatch, capsys
):
    """The same bytes as without interruption; seed and date are those of the beginning."""
    write(tmp_path / "p.jsonl")
    options = ("--max-new-tokens", "40")
    answer, rounds = batch_generate.answer, []

    def interrupted(*arguments):
        rounds.append(arguments)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return answer(*arguments)

    monkeypatch.setattr(batch_generate, "answer", interrupted)
    assert generate(tmp_path, *options, "--batch-size", "3") == 130
    assert (
        "3 of 7 prompts are answered; the same command goes on from there"
        in capsys.readouterr().err
    )
    first = (tmp_path / "a.jsonl").read_bytes()
    assert len(first.splitlines()) == 3
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"id": 1, "final": "hal')
    record = json.loads((tmp_path / "a.jsonl.run.json").read_text())["settings"]
    monkeypatch.setattr(batch_generate.secrets, "randbits", lambda bits: pytest.fail("a new seed"))
    assert generate(tmp_path, *options, "--batch-size", "1") == 0
    assert [len(arguments[0]) for arguments in rounds[2:]] == [1, 1, 1, 1]
    assert loaded[1].dtype == "float32"
    monkeypatch.undo()
    monkeypatch.setattr(batch_generate, "load_model", lambda *_, **__: gj.load())
    seed = ("--seed", str(record["seed"]), "--date", record["date"], "--batch-size", "4")
    assert generate(tmp_path, *options, *seed, name="b.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    capsys.readouterr()
    assert generate(tmp_path, *options) == 0
    assert "all 7 prompts are answered already" in capsys.readouterr().out
    assert len(loaded) == 2  # nothing left to do, nothing loaded


def test_killed_and_continued(loaded, tmp_path, capsys):
    """SIGKILL in the middle; until then a second run beside it is refused."""
    write(tmp_path / "p.jsonl", [{"prompt": f"What is {i} + 7?", "id": f"q{i}"} for i in range(30)])
    options = ("--seed", "1", "--date", DATE, "--effort", "high", "--max-new-tokens", "64")
    words = ["generate", "--input", "p.jsonl", "--output", "a.jsonl", "--batch-size", "1", *options]
    program = (
        f"{children.HOLDS_AFTER_THREE}from gptoss_jax.cli.main import main; main(sys.argv[1:])"
    )
    environ, output = {**os.environ, "XLA_FLAGS": ""}, tmp_path / "a.jsonl"
    process = children.holding(program, *words, cwd=tmp_path, env=environ)
    assert generate(tmp_path, *options) == 1
    assert f"another run is writing {output}" in capsys.readouterr().err
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = len(output.read_bytes().splitlines())
    assert done == 3
    assert generate(tmp_path, *options, "--batch-size", "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["answered_before"] == done
    assert generate(tmp_path, *options, "--batch-size", "4", name="b.jsonl") == 0
    assert output.read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_batch_is_compiled_once(model, loaded, tmp_path, monkeypatch):
    """Five batches, the last of one row, one row too long: the programs of the first batch."""
    write(tmp_path / "p.jsonl", [{"prompt": f"What is {i} + {i}?"} for i in range(17)])
    sizes, answer = [], batch_generate.answer

    def counted(*arguments):
        rows = answer(*arguments)
        sizes.append((steps.prefill._cache_size(), steps.decode._cache_size()))
        return rows

    monkeypatch.setattr(batch_generate, "answer", counted)
    assert generate(tmp_path, *OPTIONS) == 0
    assert len(sizes) == 5
    assert len(set(sizes)) == 1


def test_a_mesh_gives_the_answers_of_one_device(loaded, tmp_path, capsys, monkeypatch):
    write(tmp_path / "p.jsonl")
    assert generate(tmp_path, *OPTIONS) == 0
    monkeypatch.undo()
    mesh = ("--mesh", "expert=2,tensor=2,data=2")
    assert generate(tmp_path, *OPTIONS, *mesh, "--json", name="b.jsonl") == 0
    assert read(tmp_path / "b.jsonl") == read(tmp_path / "a.jsonl")
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["mesh"] == {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}


def test_raw_text(model, loaded, tmp_path):
    lines = [{"prompt": "12+34="}, {"prompt": "100-", "max_new_tokens": 3}, {"prompt": "7+8=15\n"}]
    write(tmp_path / "p.jsonl", lines)
    options = ("--raw", "--temperature", "0", "--stop", "\n", "--max-new-tokens", "12")
    assert generate(tmp_path, *options) == 0
    for row, line in zip(read(tmp_path / "a.jsonl"), lines, strict=True):
        limit = line.get("max_new_tokens", 12)
        wanted = model.generate(line["prompt"], gj.Sampling(temperature=0), limit, ["\n"])
        assert (row["text"], row["finish_reason"]) == (wanted.text, wanted.finish_reason)
        assert row.keys() == {
            "id", "text", "finish_reason", "prompt_tokens", "completion_tokens", "seed"
        }  # fmt: skip


def test_a_tool_is_called_and_a_prompt_that_does_not_fit_fails_alone(loaded, tmp_path, capsys):
    calculator = {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluates an arithmetic expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
    lines = [{"prompt": "word " * 9000}, {"prompt": "What is 347 * 285?", "tools": [calculator]}]
    lines.append({"prompt": "Hello!"})
    write(tmp_path / "p.jsonl", lines)
    assert generate(tmp_path, "--temperature", "0") == 1
    assert "1 of 3 prompts failed: their lines in" in capsys.readouterr().err
    failed, called, _ = read(tmp_path / "a.jsonl")
    assert failed["finish_reason"] == "error"
    assert "do not fit: the context is 8192 tokens" in failed["error"]
    assert called["finish_reason"] == "tool_calls"
    (call,) = called["tool_calls"]
    assert call["function"]["name"] == "calculator"
    assert json.loads(call["function"]["arguments"]) == {"expression": "347*285"}
    assert generate(tmp_path, "--temperature", "0") == 1  # and is not asked again
    assert len(loaded) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes): {: expected"),
        ('"hi"', 'line 2: found "hi": expected {"prompt": ...} or {"messages": ...}'),
        ({"text": "hi"}, "line 2: unknown key 'text': expected id, prompt, max_new_tokens"),
        ({"id": 3}, "line 2: found keys ['id']: expected {\"prompt\": ...} or"),
        ({"prompt": "a", "messages": []}, "line 2: found both prompt and messages: expected"),
        ({"prompt": ""}, 'line 2: prompt is "": expected text, not empty'),
        ({"prompt": "a", "id": True}, "line 2: id is true: expected text or an integer"),
        ({"prompt": "a", "id": 1}, "line 2: id 1 is the id of line 1 too: give each its own"),
        ({"prompt": "a", "id": "1"}, "line 2: id '1' is the id of line 1 too: give each its own"),
        ({"prompt": "a", "temperature": -1}, "line 2: temperature is -1: expected a number from 0"),
        ({"prompt": "a", "top_p": "x"}, "line 2: top_p is 'x': expected a number above 0"),
        ({"prompt": "a", "max_new_tokens": 0}, "line 2: max_new_tokens is 0: expected a positive"),
        ({"prompt": "a", "reasoning_effort": "huge"}, "line 2: unknown reasoning effort 'huge'"),
        ({"messages": [{"role": "x"}]}, "line 2: message 0: unknown role 'x'"),
        ({"messages": "hi"}, 'line 2: messages is "hi": expected a list of messages'),
        ({"prompt": "a", "tools": [{"type": "web"}]}, "line 2: tools of type 'web' are not"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_before_loading(loaded, tmp_path, capsys, line, message):
    path = write(tmp_path / "p.jsonl", [{"prompt": "What is 1 + 1?"}, line])
    assert generate(tmp_path) == 1
    assert capsys.readouterr().err.startswith(f"gptoss generate: {path} {message}")
    assert not loaded
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_bad_files(loaded, tmp_path, capsys):
    def refused(*options, **keywords):
        capsys.readouterr()
        assert generate(tmp_path, *options, **keywords) == 1
        return capsys.readouterr().err

    assert "p.jsonl: no such file: give a file with one JSON object a line" in refused()
    (tmp_path / "p.jsonl").write_text("\n\n")
    assert "p.jsonl holds no prompts" in refused()
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert "p.jsonl line 1: not UTF-8" in refused()
    write(tmp_path / "p.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    assert "line 1: 'messages' is of conversations: with --raw leave it out" in refused("--raw")
    assert "--input and --output are both" in refused(name="p.jsonl")
    assert "no such folder: make it first" in refused(name="none/a.jsonl")
    assert "max_new_tokens is 0: expected a positive integer" in refused("--max-new-tokens", "0")
    assert not loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "p"], "--input needs --output"),
        (["hi", "--input", "p", "--output", "a"], "either a prompt or --input, not both"),
        (["hi", "--output", "a"], "--output and --overwrite need --input"),
        (["--input", "p", "--output", "a", "--hide-reasoning"], "is for one prompt"),
        (["--input", "p", "--output", "a", "--batch-size", "0"], "--batch-size is 0: expected"),
    ],
)
def test_wrong_usage(words, message, capsys):
    assert main(["generate", *words]) == 2
    assert message in capsys.readouterr().err


def test_an_output_of_something_else_is_refused(loaded, tmp_path, capsys, monkeypatch):
    write(tmp_path / "p.jsonl")
    output, beside = tmp_path / "a.jsonl", tmp_path / "a.jsonl.run.json"
    assert generate(tmp_path, *OPTIONS) == 0
    good, record = output.read_bytes(), beside.read_bytes()

    def refused(*options):
        capsys.readouterr()
        assert generate(tmp_path, *OPTIONS, *options) == 1
        assert len(loaded) == 1
        return capsys.readouterr().err

    begun = f"{output} was begun with"
    assert f"{begun} temperature 1.0, not 0.5: continue with the same" in refused(
        "--temperature", "0.5"
    )
    assert f"{begun} seed 5, not 6" in refused("--seed", "6")
    assert f'{begun} effort "medium", not "low"; raw false, not true' not in refused(
        "--effort", "low"
    )
    assert f'{begun} dtype "float32", not "bfloat16"' in refused("--dtype", "bfloat16")
    assert f"{begun} max_context null, not 900" in refused("--max-context", "900")
    monkeypatch.setattr(batch_generate, "fingerprint", lambda folder: "0")
    assert f"{begun} another content of gpt-oss-tiny" in refused()
    monkeypatch.undo()
    monkeypatch.setattr(batch_generate, "load_model", lambda *_, **__: pytest.fail("loaded"))
    text = (tmp_path / "p.jsonl").read_text()
    write(tmp_path / "p.jsonl", [*LINES, {"prompt": "one more"}])
    assert f"{begun} another content of {tmp_path / 'p.jsonl'}" in refused()
    (tmp_path / "p.jsonl").write_text(text)
    rows = good.splitlines(keepends=True)
    for data, message in [
        (good + rows[2], f"line 8: {rows[2].decode()[:57]}... comes twice of this run"),
        (rows[0] + b"notes\n" + rows[1], "line 2: notes is no answer of this run"),
        (rows[0] + b'{"id": 99}\n' + rows[1], 'line 2: {"id": 99} is no answer of this run'),
    ]:
        output.write_bytes(data)
        assert f"{output} {message}" in refused()
        assert output.read_bytes() == data
    beside.write_text("{}")
    assert "a.jsonl.run.json is damaged" in refused()
    beside.unlink()
    assert "a.jsonl.run.json, which says what, is not there" in refused()
    monkeypatch.undo()
    assert generate(tmp_path, *OPTIONS, "--overwrite") == 0
    assert output.read_bytes() == good
    assert beside.read_bytes() == record


def test_torn_at_every_byte(tmp_path):
    """What is kept are the whole lines; with the rest answered again nothing is lost or doubled."""
    wanted = {"input": {"sha256": 1, "name": "p"}, "settings": {"seed": 1}}
    rows = [{"id": 7, "final": "a\r\u2028\x85ü"}, {"id": "x", "final": "\ud800"}, {"id": "y"}]

    def opened():
        return answers_file.Answers(tmp_path / "a", ["y", "7", "x"], wanted, [("input", "sha256")])

    answers = opened()
    answers.begin(wanted)
    answers.append(rows)
    answers.close()
    whole = (tmp_path / "a").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 3
    for size in range(len(whole) + 1):
        for junk in (b"", b"\0\0\0\0", b"\0\0\n"):
            (tmp_path / "a").write_bytes(whole[:size] + junk)
            answers = opened()
            kept = sum(end <= size for end in ends)
            assert answers.done == [str(row["id"]) for row in rows[:kept]]
            answers.append(rows[kept:])
            assert (tmp_path / "a").read_bytes() == whole
            answers.close()
    answers = opened()
    answers.finish()
    assert [row["id"] for row in read(tmp_path / "a")] == ["y", 7, "x"]
    answers.close()


def test_batches_sort_a_window_by_length_and_keep_the_order_inside():
    lines = [
        batches.Line(i, i, "x" * n, (), None, None, 1) for i, n in enumerate([9, 1, 8, 2, 7, 3])
    ]
    found = list(batches.batches(lines, 2, lambda line: batches.Job(line, list(line.text), None)))
    assert [[job.line.id for job in batch] for batch in found] == [[1, 3], [4, 5], [0, 2]]


def test_fingerprint(tmp_path):
    def made(name, data=b"a" * 1_000_000, config="{}"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_text(config)
        return answers_file.fingerprint(folder)

    first = made("a")
    assert made("b") == first
    (tmp_path / "b" / ".cache").mkdir()
    (tmp_path / "b" / ".cache" / "notes").write_text("x")
    assert answers_file.fingerprint(tmp_path / "b") == first
    changed = b"a" * 500_000 + b"b" * 20_000 + b"a" * 480_000
    assert len({first, made("c", changed), made("d", config="[]"), made("e", b"a" * 999_999)}) == 4


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path, monkeypatch):
    answers = answers_file.Answers(tmp_path / "a", ["1", "2"], {}, [])
    answers.begin({})
    answers.append([{"id": 1}])
    write = os.pwrite

    def full(file, data, at):
        write(file, data[:4], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        answers.append([{"id": 2}])
    assert (tmp_path / "a").read_bytes() == b'{"id": 1}\n'
    answers.close()


def test_a_batch_too_large_for_the_device_says_what_to_do(model, tmp_path):
    class Full:
        tokenizer = model.tokenizer

        def generate(self, *_):
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    line = batches.Line(1, 1, "x", (), None, gj.Sampling(), 1)
    with pytest.raises(GptOssError, match="does not hold a batch of 8: use a smaller --batch-size"):
        batches.answer([batches.Job(line, [1], gj.Sampling())], Full(), 8)


def test_a_limit_for_each_prompt(model):
    greedy = gj.Sampling(temperature=0, ignore_eos=True)
    found = model.generate(["1+", "2+"], greedy, [2, None], stop=["="])
    assert (len(found[0].tokens), found[0].finish_reason) == (2, "length")
    assert found[1] == model.generate("2+", greedy, None, stop=["="])
    with pytest.raises(GptOssError, match="1 values of max_new_tokens for 2 prompts: give one, or"):
        model.generate(["1+", "2+"], greedy, [2])
