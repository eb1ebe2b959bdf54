"""/v1/responses in the background: replayed, cancelled, failed, and cut by the server's end."""

import itertools
import json
import random
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
from openai.types import responses as shapes
from responding import (
    BEGIN,
    MESSAGE,
    REASONING,
    ask,
    conforms,
    events_of,
    kinds,
    replay,
    same,
    stream,
)
from serving import DATE, HELLO, A, E, F, R, S, app_of, served, started, until

from gptoss_jax.server.settings import ServerSettings
from gptoss_jax.server.store import Store


def test_background(client):
    api, engine = client(HELLO, repeat=True)
    engine.held.clear()
    begun = ask(api, background=True)
    assert begun["status"] == "queued"
    assert api.responses.retrieve(begun["id"]).status == "queued"
    with pytest.raises(openai.BadRequestError, match="not complete yet"):
        ask(api, previous_response_id=begun["id"])
    engine.held.set()
    until(lambda: api.responses.retrieve(begun["id"]).status == "completed")
    whole = json.loads(api.responses.with_raw_response.retrieve(begun["id"]).text)
    conforms(whole, shapes.Response)
    assert same({**ask(api), "status": "completed"}, whole)

    events = replay(api, begun["id"])
    expected = ["created", "queued", "in_progress", *REASONING, *MESSAGE, "completed"]
    assert kinds(events) == expected
    assert events[-1]["response"] == whole
    for after in (0, 5, len(events) - 2):
        assert replay(api, begun["id"], starting_after=after) == events[after + 1 :]
    with pytest.raises(openai.BadRequestError, match="in the background"):
        list(api.responses.retrieve(ask(api)["id"], stream=True))


def test_a_stream_that_broke_goes_on_where_it_was(client):
    words = " one" * 60
    api, engine = client(f"{F}{words}{R}", delay=0.005, hold_after=50)
    made = api.responses.create(model="scripted", input="hi", background=True, stream=True)
    read = list(itertools.islice(made, 20))
    made.close()
    assert engine.running  # nobody reads, and it goes on
    engine.go_on()
    rest = list(
        api.responses.retrieve(
            read[0].response.id, stream=True, starting_after=read[-1].sequence_number
        )
    )
    numbers = [event.sequence_number for event in [*read, *rest]]
    assert numbers == list(range(len(numbers)))
    deltas = [e.delta for e in [*read, *rest] if e.type == "response.output_text.delta"]
    assert "".join(deltas) == rest[-1].response.output_text == words
    # the client's own helper, from the beginning
    with api.responses.stream(response_id=read[0].response.id, starting_after=10) as events:
        assert next(iter(events)).sequence_number == 11
        assert events.get_final_response().output_text == words


def test_cancelling(client):
    api, engine = client(f"{A}Hm.{E}{S}{F}" + " on" * 3000, delay=0.002)
    begun = ask(api, background=True)
    follower = api.responses.with_streaming_response.retrieve(begun["id"], stream=True)
    with follower as raw:
        until(
            lambda: api.responses.retrieve(begun["id"]).output_text == "" and engine.generated > 20
        )
        cancelled = json.loads(api.responses.with_raw_response.cancel(begun["id"]).text)
        events = events_of("".join(raw.iter_text()))
    conforms(cancelled, shapes.Response)
    assert cancelled["status"] == "cancelled"
    assert [item["status"] for item in cancelled["output"]] == ["completed", "incomplete"]
    assert cancelled["output"][1]["content"][0]["text"].startswith(" on on")
    expected = ["created", "queued", "in_progress", *REASONING, *MESSAGE, "incomplete"]
    assert kinds(events) == expected
    assert events[-1]["response"] == cancelled
    until(lambda: engine.cancelled == [(0, 0)])
    # again, and later, it is the same
    for found in (api.responses.with_raw_response.cancel, api.responses.with_raw_response.retrieve):
        assert json.loads(found(begun["id"]).text) == cancelled


def test_cancelling_what_is_over_or_in_the_foreground(client):
    api, _ = client(HELLO, repeat=True)
    begun = ask(api, background=True)
    until(lambda: api.responses.retrieve(begun["id"]).status == "completed")
    assert api.responses.cancel(begun["id"]).status == "completed"
    with pytest.raises(openai.BadRequestError, match="in the background"):
        api.responses.cancel(ask(api)["id"])


def test_deleting_ends_what_runs(client):
    api, engine = client(f"{F}" + " on" * 3000, delay=0.002)
    begun = ask(api, background=True)
    api.responses.delete(begun["id"])
    until(lambda: engine.cancelled == [(0, 0)])
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(begun["id"])


def test_failure(client):
    api, engine = client(HELLO, repeat=True, fail_after=6)
    with pytest.raises(openai.InternalServerError, match="server failed"):
        ask(api)
    events = stream(api)
    assert kinds(events) == [*BEGIN, *REASONING, "failed"]
    failed = events[-1]["response"]
    assert failed["error"]["code"] == "server_error"
    assert "scripted" not in failed["error"]["message"]  # what broke is not told
    begun = ask(api, background=True)
    until(lambda: api.responses.retrieve(begun["id"]).status == "failed")
    assert kinds(replay(api, begun["id"])) == [
        "created",
        "queued",
        "in_progress",
        *REASONING,
        "failed",
    ]
    # the others are served as before
    engine.fail_after = None
    assert ask(api)["status"] == "completed"


def test_what_cannot_be_stored_is_not_acknowledged(client, monkeypatch):
    api, engine = client(HELLO, repeat=True)
    put, failing = Store.put, []

    def fails(store, stored):
        if stored.response["status"] in failing:
            raise sqlite3.OperationalError("database or disk is full")
        put(store, stored)

    monkeypatch.setattr(Store, "put", fails)
    failing[:] = ["completed"]
    with pytest.raises(openai.InternalServerError):
        ask(api)
    events = stream(api)
    assert kinds(events)[-1] == "failed"
    assert "completed" not in kinds(events)
    assert ask(api, store=False)["status"] == "completed"
    begun = ask(api, background=True)
    events = replay(api, begun["id"])
    assert "completed" not in kinds(events)
    found = api.responses.retrieve(begun["id"])
    assert (found.status, found.error.code) == ("failed", "server_error")
    assert events[-1]["response"]["error"] == found.error.to_dict()
    api.responses.delete(begun["id"])
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(begun["id"])
    failing[:] = ["queued"]
    with pytest.raises(openai.InternalServerError):
        ask(api, background=True)
    until(lambda: not engine.running)
    failing.clear()
    assert ask(api)["status"] == "completed"


def test_a_full_queue(client):
    api, engine = client(HELLO, repeat=True, capacity=0)
    for more in ({}, {"stream": True}, {"background": True}):
        with pytest.raises(openai.RateLimitError):
            api.responses.create(model="scripted", input="hi", **more)
    assert not engine.requests


def test_a_client_that_goes_cancels(client):
    api, engine = client(f"{F}" + " on" * 3000, delay=0.002)
    made = api.responses.create(model="scripted", input="hi", stream=True)
    id = next(iter(made)).response.id
    made.close()
    until(lambda: engine.cancelled == [(0, 0)])
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(id)


def test_what_ran_in_the_background_when_the_server_ended_has_failed(tmp_path):
    settings = ServerSettings(date=DATE, store=str(tmp_path / "responses.db"))
    app, engine = app_of(f"{F}" + " on" * 3000, delay=0.002, settings=settings)
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
        ended = ask(api, background=True)["id"]
        until(lambda: api.responses.retrieve(ended).status == "in_progress")
    until(lambda: engine.cancelled == [(0, 0)])
    engine.close(0)
    app, engine = app_of(HELLO, settings=settings)
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
        found = api.responses.retrieve(ended)
        assert (found.status, found.error.code) == ("failed", "server_error")
        assert kinds(replay(api, ended, starting_after=4))[-1] == "failed"
    engine.close(0)


SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from fakes import ScriptedEngine
from serving import HELLO
from gptoss_jax.cli.serve import bind, serve
from gptoss_jax.server.settings import ServerSettings
engine = ScriptedEngine(HELLO, repeat=True, delay=0.001)
serve(engine, ServerSettings(store=sys.argv[2]), bind("127.0.0.1", 0))
"""


def talk(base, name, told):
    """One client: asks until the server is gone; `told` gets what it was told, by id."""
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=20) as api:
        previous = None
        for number in itertools.count():
            more = {
                "model": "scripted",
                "input": f"{name} {number}",
                "previous_response_id": previous,
            }
            try:
                if number % 3 == 0:
                    answer = api.responses.create(**more)
                elif number % 3 == 1:
                    *_, last = api.responses.create(**more, stream=True)
                    if last.type != "response.completed":
                        continue
                    answer = last.response
                else:
                    begun = api.responses.create(**more, background=True)
                    told[begun.id] = (begun.to_dict(), number)
                    answer = api.responses.retrieve(begun.id)
            except openai.APIConnectionError:
                return
            told[answer.id] = (answer.to_dict(), number)
            previous = answer.id if answer.status == "completed" else previous


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_what_clients_were_told_survives_sigkill(tmp_path, kills):
    """Clients of a server that is killed; what they were told is there in the next one."""
    path, told, chance = tmp_path / "responses.db", {}, random.Random(kills)
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent), str(path)]
    for _ in range(kills):
        enough = len(told) + 10
        with started(command) as (server, address):
            base = f"{address}/v1"
            threads = [threading.Thread(target=talk, args=(base, name, told)) for name in "abc"]
            for thread in threads:
                thread.start()
            until(lambda enough=enough: len(told) > enough, seconds=30)
            assert all(thread.is_alive() for thread in threads), "a client lost the server"
            time.sleep(chance.uniform(0, 0.2))
            server.kill()
            assert server.wait() == -signal.SIGKILL
        for thread in threads:
            thread.join(30)
    app, engine = app_of(HELLO, settings=ServerSettings(date=DATE, store=str(path)))
    with served(app) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as api:
        for id, (answer, _) in told.items():
            found = api.responses.retrieve(id).to_dict()
            conforms(json.loads(json.dumps(found)), shapes.Response)
            if answer["status"] == "completed":
                assert found == answer
            else:  # told of as running: it has come to its end, or been cut
                assert found["status"] in ("completed", "failed")
                assert found["created_at"] == answer["created_at"]
        last = max(told, key=lambda id: (told[id][0]["status"] == "completed", told[id][1]))
        api.responses.create(model="scripted", input="and?", previous_response_id=last)
    engine.close(0)
