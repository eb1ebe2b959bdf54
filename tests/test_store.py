"""The store of responses: against a dict, against SIGKILL, and against files that are not ours."""

import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import children
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gptoss_jax.errors import GptOssError
from gptoss_jax.server import store as store_module
from gptoss_jax.server.store import NotStored, Store, Stored


def record(id, previous=None, text="hello", status="completed", events=None):
    response = {
        "id": id,
        "status": status,
        "previous_response_id": previous,
        "output": [{"type": "message", "id": f"msg_{id}", "text": text}],
    }
    return Stored(response, [{"type": "message", "id": f"in_{id}", "text": text[::-1]}], events)


def test_what_is_put_comes_back(tmp_path):
    events = [{"type": "response.created", "sequence_number": 0, "odd": "\ud800 é 語"}]
    stored = record("resp_1", text="é \ud800 \x00 語", events=events)
    path = tmp_path / "responses.db"
    for store in (Store(), Store(path)):
        store.put(stored)
        assert store.get("resp_1") == stored
        assert store.item("msg_resp_1") == stored.response["output"][0]
        assert store.item("in_resp_1") == stored.input[0]
        assert store.item("msg_2") is None
        store.close()
    store = Store(path)
    assert store.get("resp_1") == stored
    assert path.stat().st_mode & 0o077 == 0
    store.close()


def test_a_later_put_replaces_the_response_and_its_items():
    store = Store()
    store.put(record("resp_1", status="in_progress"))
    assert [stored.response["id"] for stored in store.running()] == ["resp_1"]
    done = Stored({"id": "resp_1", "status": "completed", "output": [{"id": "msg_new"}]}, [])
    store.put(done)
    assert store.get("resp_1") == done
    assert len(store) == 1
    assert store.running() == []
    assert store.item("msg_new") == {"id": "msg_new"}
    assert store.item("msg_resp_1") is None
    store.close()


def test_a_deleted_response_leaves_no_text_in_the_file(tmp_path):
    path = tmp_path / "responses.db"
    store = Store(path)
    store.put(record("resp_1", text="the-secret-word " * 50, events=[{"delta": "other"}]))
    store.put(record("resp_2", text="public-word " * 50))
    assert store.delete("resp_1")
    assert not store.delete("resp_1")
    store.close()  # the log goes into the file
    left = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"public-word" in left
    assert b"the-secret-word" not in left
    assert b"resp_1" not in left


def test_a_conversation_with_a_hole_says_where_it_is():
    store = Store()
    for id, previous in [("a", None), ("b", "a"), ("c", "b"), ("d", "c")]:
        store.put(record(id, previous))
    assert [stored.response["id"] for stored in store.chain("d")] == ["a", "b", "c", "d"]
    assert store.chain("b") == [record("a"), record("b", "a")]
    store.delete("b")
    with pytest.raises(NotStored, match="continues 'b', which is gone") as caught:
        store.chain("d")
    assert caught.value.id == "b"
    assert store.get("d") == record("d", "c")
    with pytest.raises(NotStored, match="no response 'zzz'"):
        store.chain("zzz")
    store.close()


def test_using_a_conversation_keeps_all_of_it():
    now = [0.0]
    store = Store(max_responses=4, clock=lambda: now[0])
    for id, previous in [("a", None), ("x", None), ("b", "a"), ("y", None), ("c", "b")]:
        now[0] += 1
        store.put(record(id, previous))
    # x is younger than a, but a has been continued
    assert [len(store.chain(id)) for id in "abcy"] == [1, 2, 3, 1]
    with pytest.raises(NotStored):
        store.get("x")
    store.close()


def test_size_is_bounded_and_the_newest_stays():
    store = Store(max_bytes=10_000)
    for number in range(50):
        store.put(record(f"r{number}", text="x" * 1000))
    assert 3 <= len(store) <= 5
    store.put(record("large", text="x" * 50_000))
    assert store.get("large")
    assert len(store) == 1
    store.close()


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_file_that_is_no_database_is_refused(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(GptOssError, match="cannot open the store"):
        Store(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "cookies.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE cookies (name)")
    other.close()
    with pytest.raises(GptOssError, match="another program's database"):
        Store(path)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("cookies",)]
    other.close()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(GptOssError, match=r"No such file or directory.*--store"):
        Store(tmp_path / "nowhere" / "responses.db")
    with pytest.raises(GptOssError, match="cannot open the store"):
        Store(tmp_path)


def test_two_processes_cannot_share_a_file(tmp_path):
    path = tmp_path / "responses.db"
    store = Store(path)
    code = f"from gptoss_jax.server.store import Store; Store({str(path)!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process has it open" in other.stderr
    store.close()
    Store(path).close()


def test_versions_migrate_and_newer_ones_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "responses.db"
    store = Store(path)
    store.put(record("resp_1"))
    store.close()
    added = (*store_module.MIGRATIONS, "ALTER TABLE responses ADD COLUMN note TEXT DEFAULT 'none'")
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", added)
        store = Store(path)
        assert store.get("resp_1") == record("resp_1")
        store.put(record("resp_2"))
        store.close()
        with sqlite3.connect(path) as plain:
            assert plain.execute("PRAGMA user_version").fetchone() == (len(added),)
            assert plain.execute("SELECT note FROM responses").fetchall() == [("none",)] * 2
        plain.close()
    with pytest.raises(GptOssError, match=f"version {len(added)}.*update gptoss_jax"):
        Store(path)


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "responses.db"
    Store(path).close()
    broken = (
        *store_module.MIGRATIONS,
        "ALTER TABLE responses ADD COLUMN note TEXT; SELECT 1 FROM nowhere",
    )
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "MIGRATIONS", broken)
        with pytest.raises(GptOssError, match="nowhere"):
            Store(path)
    store = Store(path)
    store.put(record("resp_1"))
    store.close()


def test_many_threads(tmp_path):
    store = Store(tmp_path / "responses.db")
    failures = []

    def work(name):
        try:
            previous = None
            for number in range(12):
                id = f"{name}{number}"
                store.put(record(id, previous))
                assert len(store.chain(id)) == number + 1
                previous = id
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == 48
    store.close()


WRITER = r"""
import sys
from gptoss_jax.server.store import Store
tests, path, start = sys.argv[1:]
sys.path.insert(0, tests)
from test_store import crash_record
store = Store(path)
for number in range(int(start), 100_000):
    for status in ("in_progress", "completed"):
        store.put(crash_record(number, status))
        print(f"{number} {status}\n", end="", flush=True)
"""


def crash_record(number, status):
    """Continues the one before in runs of 20; from one page of the file to many."""
    text = f"{number} {status} " * (1 + number * 37 % 900)
    previous = f"r{number - 1}" if number % 20 else None
    return record(f"r{number}", previous, text, status, [{"type": status, "delta": text}])


@pytest.mark.parametrize(
    "kills", [4, pytest.param(20, marks=pytest.mark.slow)], ids=lambda kills: f"{kills} kills"
)
def test_every_acknowledged_response_survives_sigkill(tmp_path, kills):
    path = tmp_path / "responses.db"
    chance = random.Random(kills)
    acknowledged = {}
    for _ in range(kills):
        tests, start = str(Path(__file__).parent), str(max(acknowledged, default=-1) + 1)
        command = [sys.executable, "-c", WRITER, tests, str(path), start]
        writer = children.start(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        lines = chance.randrange(1, 60)
        timer = threading.Timer(20, writer.kill)
        timer.start()
        for line in writer.stdout:
            if line.endswith("\n"):  # else the kill has cut the acknowledgement itself
                number, status = line.split()
                acknowledged[int(number)] = status
            lines -= 1
            if lines == 0:  # it goes on writing; the kill falls anywhere
                threading.Timer(chance.uniform(0, 0.01), writer.kill).start()
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        timer.cancel()

        store = Store(path)
        for number, status in list(acknowledged.items()):
            found = store.get(f"r{number}")
            # the update that was under way may have come through as well
            assert found in [crash_record(number, status), crash_record(number, "completed")]
            assert found == crash_record(number, status) or number == max(acknowledged)
            acknowledged[number] = found.response["status"]
        last = max(acknowledged)
        assert len(store) in (last + 1, last + 2)
        if len(store) == last + 2:  # written whole, but not acknowledged
            assert store.get(f"r{last + 1}") == crash_record(last + 1, "in_progress")
            acknowledged[last + 1] = "in_progress"
        for stored in store.running():  # as the server does when it starts
            store.put(crash_record(int(stored.response["id"][1:]), "completed"))
            acknowledged[int(stored.response["id"][1:])] = "completed"
        check = store._sql.execute("PRAGMA integrity_check").fetchone()
        assert check == ("ok",)
        store.close()


class AgainstADict(RuleBasedStateMachine):
    """The same calls on the store and on a plain list of (record, last use)."""

    @initialize(count=st.integers(1, 6), size=st.sampled_from([700, 3000, 10**9]))
    def start(self, count, size):
        self.folder = tempfile.TemporaryDirectory()
        self.now, self.age = 1000.0, 50.0
        self.bounds = {"max_responses": count, "max_bytes": size, "max_age": self.age}
        self.model = {}  # id -> [record, last use, place]
        self.places = 0
        self.open()

    def open(self):
        self.store = Store(Path(self.folder.name) / "r.db", **self.bounds, clock=lambda: self.now)
        self.store._sql.execute("PRAGMA synchronous = OFF")  # durability is tested above

    def alive(self):
        return {id: row for id, row in self.model.items() if row[1] > self.now - self.age}

    @staticmethod
    def size(stored):
        return sum(len(store_module._dumps(part)) for part in (stored.response, list(stored.input)))

    def evict(self, keep=None):
        self.model = {
            id: row for id, row in self.model.items() if id == keep or row[1] > self.now - self.age
        }
        order = sorted(self.model, key=lambda id: (self.model[id][1], self.model[id][2]))
        for id in order:
            total = sum(self.size(row[0]) for row in self.model.values())
            if (
                len(self.model) <= self.bounds["max_responses"]
                and total <= self.bounds["max_bytes"]
            ):
                break
            if id != keep:
                del self.model[id]

    def ancestors(self, id):
        out = []
        while id in self.model:
            out.append(id)
            id = self.model[id][0].response["previous_response_id"]
        return out, id

    @rule(
        number=st.integers(0, 7),
        back=st.integers(1, 7),
        text=st.text(max_size=30),
        status=st.sampled_from(["completed", "in_progress", "failed"]),
    )
    def put(self, number, back, text, status):
        # responses continue earlier numbers only: there are no cycles
        previous = f"r{number - back}" if number - back >= 0 else None
        stored = record(f"r{number}", previous, text, status)
        self.store.put(stored)
        place = self.model[f"r{number}"][2] if f"r{number}" in self.model else self.places
        self.places += 1
        self.model[f"r{number}"] = [stored, self.now, place]
        for id in self.ancestors(f"r{number}")[0]:
            self.model[id][1] = self.now
        self.evict(keep=f"r{number}")

    @rule(number=st.integers(0, 7))
    def delete(self, number):
        expected = f"r{number}" in self.alive()
        assert self.store.delete(f"r{number}") == expected
        if expected:
            del self.model[f"r{number}"]

    @rule(seconds=st.floats(0.5, 30))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def reopen(self):
        self.store.close()
        self.open()
        self.evict()

    @rule(number=st.integers(0, 7))
    def chain(self, number):
        id = f"r{number}"
        ids, missing = self.ancestors(id)
        if id not in self.alive() or missing is not None:
            with pytest.raises(NotStored) as caught:
                self.store.chain(id)
            assert caught.value.id == (missing if id in self.alive() else id)
            return
        assert self.store.chain(id) == [self.model[id][0] for id in reversed(ids)]

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def holds_the_same(self):
        alive = self.alive()
        assert len(self.store) == len(alive)
        for number in range(8):
            id = f"r{number}"
            if id in alive:
                assert self.store.get(id) == alive[id][0]
                assert self.store.item(f"msg_{id}") == alive[id][0].response["output"][0]
                assert self.store.item(f"in_{id}") == alive[id][0].input[0]
            else:
                with pytest.raises(NotStored):
                    self.store.get(id)
                assert self.store.item(f"msg_{id}") is None

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(
    max_examples=300 if "--slow" in sys.argv else 20, stateful_step_count=30, deadline=None
)
