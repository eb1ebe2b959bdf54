"""Several processes: the tokens of one, each reads its own part, and the end of one, or a difference
between them, ends all with its reason.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import children
import hosts_program
import jax
import numpy as np
import pytest

from gptoss_jax import checkpoint, convert, hosts, hub, loading, sharding
from gptoss_jax.cli import processes
from gptoss_jax.cli.generate import Arguments
from gptoss_jax.cli.loading import ModelArguments
from gptoss_jax.cluster import Place
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import load_tokenizer

TINY = hub.resolve(hub.TINY)
GPTOSS = ("-m", "gptoss_jax.cli.main")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*words, devices=4):
    """A process of simulated devices; its output and errors are read by `end`."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(hosts_program.CLUSTERS)
    }
    environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    environ["JAX_PLATFORMS"] = "cpu"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return children.start([sys.executable, *map(str, words)], env=environ, **pipes)


def end(process, timeout=240, stdin=""):
    try:
        out, err = process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def pair(*words, first=(), second=(), devices=(4, 4)):
    """`gptoss` in two processes."""
    where = ("--coordinator-address", f"127.0.0.1:{free_port()}")
    return [
        start(*GPTOSS, *words, *where, "--process-id", i, *own, devices=devices[i])
        for i, own in enumerate((first or ("--num-processes", 2), second or ("--num-processes", 2)))
    ]


def run_jobs(tmp_path, jobs):
    """What two processes say of hosts_program's jobs."""
    address, outs = f"127.0.0.1:{free_port()}", [tmp_path / "0.json", tmp_path / "1.json"]
    program = Path(hosts_program.__file__)
    running = [start(program, address, 2, i, json.dumps(jobs), out) for i, out in enumerate(outs)]
    for process in running:
        code, _, err = end(process)
        assert code == 0, err
    found = [json.loads(out.read_text()) for out in outs]
    for answer in found:
        assert answer["processes"] == 2
        assert answer["line"] == "a line of process 0"
    return [answer["jobs"] for answer in found]


def assert_same_work(found, expected):
    assert found[0]["drawn"] == found[1]["drawn"]
    for one in found:
        assert one["tokens"] == expected["tokens"]
        for row, wanted in zip(one["logits"], expected["logits"], strict=True):
            np.testing.assert_allclose(row, wanted, rtol=0, atol=1e-4 * np.std(wanted))


@pytest.fixture(scope="module")
def expected():
    return hosts_program.work(loading.load(TINY, mesh={}))


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    return convert.convert(TINY, tmp_path_factory.mktemp("hosts") / "orbax")


def job(folder, mesh, work=False):
    return {"folder": str(folder), "mesh": mesh, "work": work}


def test_two_processes_make_the_tokens_of_one_and_read_their_part(tmp_path, expected, orbax):
    """On expert=8 a process reads half of the experts' bytes, and the rest once, in any layout."""
    jobs = [job(TINY, "expert=4,data=2", True), job(TINY, "expert=8"), job(orbax, "expert=8")]
    found = run_jobs(tmp_path, jobs)
    assert_same_work([jobs[0] for jobs in found], expected)
    for number, folder in ((1, TINY), (2, orbax)):
        opened = checkpoint.open_checkpoint(folder)
        for leaf in opened.leaves:
            spread = leaf.letters[0] == "E" and leaf.path[3] not in ("router", "router_bias")
            whole = leaf.size * opened.dtype(leaf).itemsize
            for jobs in found:
                assert jobs[number]["read"][leaf.name] == (whole // 2 if spread else whole)


@pytest.mark.slow
def test_another_mesh_and_layout(tmp_path, expected, orbax):
    saved = tmp_path / "saved"
    wanted = {**job(orbax, "tensor=2,expert=2,data=2", True), "save": str(saved)}
    jobs = run_jobs(tmp_path, [wanted])
    assert_same_work([found[0] for found in jobs], expected)
    # saved by both together, read again by one: the same bytes
    ours, theirs = (checkpoint.load_params(folder)[1] for folder in (saved, orbax))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


LONG = ("generate", "--raw", "1", "--seed", "1", "--max-new-tokens", "1500")


@pytest.mark.parametrize(
    ("victim", "loading"),
    [
        (1, False),
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
    ],
)
def test_the_death_of_one_ends_the_other(victim, loading):
    running = pair(*LONG)
    if loading:
        running[0].stderr.readline()  # they have met
        time.sleep(0.5)
    else:
        running[0].stdout.read(2)  # it generates
    running[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code, _, err = end(running[1 - victim], 60)
    seconds = time.monotonic() - began
    print(f"process {1 - victim} ended {seconds:.2f} s after process {victim}")
    assert code == 1
    assert seconds < 10
    assert err.splitlines()[-1] == (
        f"gptoss: process {1 - victim} of 2: process {victim} of 2 has died; the others stop: "
        "start all of them again"
    )
    end(running[victim])


@pytest.mark.slow
def test_an_interrupted_process_ends_the_other():
    running = pair(*LONG)
    running[0].stdout.read(2)
    running[1].send_signal(signal.SIGINT)
    code, _, err = end(running[0], 60)
    assert code == 1
    assert "process 0 of 2: process 1 of 2 was interrupted; the others stop" in err
    assert end(running[1], 60)[0] == 130


@pytest.mark.slow
def test_one_command_line_speaks(expected):
    """The prompt is process 0's; the other one says nothing."""
    words = ("generate", "-", "--raw", "--temperature", "0", "--max-new-tokens", "6", "--json")
    running = pair(*words, "--mesh", "expert=4,data=2")
    threads = [threading.Thread(target=end, args=(running[1], 240, "other"))]
    threads[0].start()
    code, out, err = end(running[0], stdin=hosts_program.PROMPTS[0])
    threads[0].join()
    assert code == running[1].returncode == 0, err
    tokenizer = load_tokenizer(TINY)
    assert json.loads(out)["text"] == tokenizer.decode(expected["tokens"][0])


@pytest.mark.slow
def test_a_conversation_of_two_processes():
    """Process 0's lines are answered, as by one process; process 1 is silent to the end."""
    lines = "/effort low\n12+34\n/new\nhello\n"
    words = ("chat", "--temperature", "0", "--hide-reasoning")
    running = pair(*words, "--mesh", "expert=8")
    alone = end(start(*GPTOSS, *words), stdin=lines)
    running[1].stdin.close()
    running[1].stdin = None
    code, out, err = end(running[0], stdin=lines)
    assert (code, out) == alone[:2], err
    assert "12 + 34 = 46" in out
    assert end(running[1], 60) == (0, "", "")


@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_a_count_that_differs_is_refused_in_both(counts):
    first, second = (("--num-processes", count) for count in counts)
    running = pair("generate", "hi", first=first, second=second)
    reason = (
        f"process 0 was started as one of {counts[0]} processes, process 1 as one of {counts[1]}: "
        "start all with the same --num-processes\n"
    )
    assert end(running[0], 60) == (1, "", f"gptoss generate: {reason}")
    whose = f"process 1 of {counts[1]}: "
    assert end(running[1], 60) == (1, "", f"gptoss generate: {whose}{reason}")


def met(places, settings, timeout=10):
    """What `connect` says in every place, before JAX is asked to join; threads for processes."""
    errors = [None] * len(places)
    everyone = threading.Barrier(len(places))

    def one(i):
        place = places[i]
        try:
            sockets = (hosts._call if place.index else hosts._answer)(
                place, time.monotonic() + timeout
            )
            wires = hosts._Wires(place, sockets)
            problem = hosts._differs(wires, settings[i])
            wires.leaving = True
            errors[i] = problem
            everyone.wait(timeout)
            for wire in sockets.values():
                with contextlib.suppress(OSError):
                    wire.shutdown(socket.SHUT_RDWR)
        except GptOssError as error:
            errors[i] = str(error)
            everyone.abort()
        except threading.BrokenBarrierError:
            pass

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * timeout)
        assert not thread.is_alive()
    return errors


def test_settings_that_differ_are_named_in_all():
    address = f"127.0.0.1:{free_port()}"
    places = [Place(address, 3, i) for i in range(3)]
    assert met(places, [{"--mesh": "expert=8"}] * 3) == [None] * 3
    settings = [{"--mesh": "expert=8"}, {"--mesh": "expert=8"}, {"--mesh": None}]
    message = (
        "--mesh is 'expert=8' in process 0 and None in process 2: start all processes with the same"
    )
    assert met(places, settings) == [message] * 3


def test_who_is_missing_is_named_in_all():
    address = f"127.0.0.1:{free_port()}"
    places = [Place(address, 4, i) for i in (0, 2)]
    message = (
        f"2 of 4 processes came to {address}, missing 1, 3: start all with the same --num-processes"
    )
    assert met(places, [{}, {}], timeout=5) == [message] * 2


def test_two_of_the_same_number_are_refused():
    address = f"127.0.0.1:{free_port()}"
    places = [Place(address, 3, i) for i in (0, 1, 1)]
    message = (
        "two processes were started with --process-id 1 (the second from 127.0.0.1): "
        "give each its own, 0 to 2"
    )
    assert met(places, [{}] * 3) == [message] * 3


def test_nobody_is_there():
    place = Place(f"127.0.0.1:{free_port()}", 2, 1)
    with pytest.raises(GptOssError) as error:
        hosts._call(place, time.monotonic() + 0.5)
    assert str(error.value) == (
        f"process 0 of 2 does not answer at {place.address} (Connection refused): "
        "start it there, or correct the coordinator address"
    )


def test_a_stranger_is_not_let_in():
    address = f"127.0.0.1:{free_port()}"
    found = []

    def answer():
        found.append(hosts._answer(Place(address, 2, 0), time.monotonic() + 20))

    thread = threading.Thread(target=answer)
    thread.start()
    host, port = address.split(":")
    for _ in range(100):
        try:
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                break
        except ConnectionRefusedError:
            time.sleep(0.05)
    ours = hosts._call(Place(address, 2, 1), time.monotonic() + 10)
    thread.join()
    assert list(found[0]) == [1]
    ours[0].close()
    found[0][1].close()


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(GptOssError) as error:
            hosts._answer(Place(f"here:{port}", 2, 0), time.monotonic() + 1)
    assert str(error.value) == (
        f"process 0 cannot take port {port} of here:{port} (Address already in use): "
        "choose another port, in all processes"
    )


def test_alone_nothing_happens(monkeypatch):
    monkeypatch.setattr(hosts, "connect", None)
    arguments = Arguments("hi", model=ModelArguments(num_processes=1))
    with processes.together("generate", arguments):
        assert hosts.place() is None
        assert hosts.speaks()
        assert hosts.same(3) == hosts.from_first(lambda: 3) == 3
        hosts.compare({})


def test_options_that_have_to_agree():
    found = processes.options(Arguments("hi", model=ModelArguments("m", process_id=1)))
    assert found["--prompt"] == "hi"
    assert found["--model"] == "m"
    assert found["--seed"] is None
    assert found["--stop"] == "()"
    assert not {"--process-id", "--num-processes", "--coordinator-address"} & found.keys()


def test_tensor_stays_near():
    config = GptOssConfig.preset("gpt-oss-120b")
    assert sharding.default_sizes(config, 16, near=4) == {"expert": 4, "tensor": 4}
    assert sharding.default_sizes(config, 16) == {"expert": 2, "tensor": 8}
