"""Responses on disk or in memory: one SQLite file, bounded in number, size and age.

Knows responses, their input items and their events as JSON, and how one continues another. Refuses
to know HTTP, the model and how responses are made.

What `put` has taken survives the end of the process and of the machine (write-ahead log,
synchronous FULL), whole or not at all. One process at a time has a file open. Ages count from the
last use: continuing a response is a use of everything before it, so that the front of a
conversation never goes before its end. What is deleted is overwritten with zeros.
"""

import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptOssError

APPLICATION_ID = 0x6770746A  # "gptj": tells our files from other programs' databases
RUNNING = ("queued", "in_progress")
LARGEST = 2**62

# Each brings a file from the version of its place to the next; PRAGMA user_version counts them.
MIGRATIONS = (
    """
    CREATE TABLE responses (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        previous TEXT,
        status TEXT NOT NULL,
        used REAL NOT NULL,
        bytes INTEGER NOT NULL,
        response TEXT NOT NULL,
        input TEXT NOT NULL,
        events BLOB
    );
    CREATE INDEX by_use ON responses (used, seq, bytes);
    CREATE TABLE items (
        id TEXT PRIMARY KEY,
        response TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE INDEX items_by_response ON items (response);
    """,
)

_CHAIN = """
    WITH RECURSIVE chain (id, depth) AS (
        SELECT id, 0 FROM responses WHERE id = :id AND used > :since
        UNION ALL
        SELECT earlier.id, depth + 1
        FROM chain JOIN responses later ON later.id = chain.id
        JOIN responses earlier ON earlier.id = later.previous
    )
"""


class NotStored(GptOssError):
    """There is no such response: never stored, deleted or expired. `id` is the one missing."""

    def __init__(self, id: str, message: str):
        super().__init__(message)
        self.id = id


@dataclasses.dataclass(frozen=True)
class Stored:
    """A response as the API shows it, what it was given, and what was streamed of it.

    Attributes:
      response: The response object; its id, status and previous_response_id are looked at.
      input: Its own input items, each with an id; not those of the responses before it.
      events: The events of its stream in order, or None if they are not kept.
    """

    response: dict[str, Any]
    input: Sequence[dict[str, Any]] = ()
    events: Sequence[dict[str, Any]] | None = None


class Store:
    """Responses by id. May be used from any thread.

    Args:
      path: The file, made if it is not there (readable by its owner only); None for memory.
      max_responses: Most responses; then those not used for longest go. The newest always stays.
      max_bytes: Most bytes of JSON (events compressed); likewise.
      max_age: Seconds after the last use.
      clock: Seconds, as time.time.

    Raises GptOssError if the file is not ours, of a newer version, damaged, or in use by another
    process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_responses: int = 10_000,
        max_bytes: int = 512_000_000,
        max_age: float = 30 * 86_400,
        clock: Callable[[], float] = time.time,
    ):
        self.path = None if path is None else Path(path)
        self.max_responses, self.max_bytes, self.max_age = max_responses, max_bytes, max_age
        self._clock = clock
        self._lock = threading.Lock()
        self._sql = _open(self.path)
        with self._transaction():
            self._evict()

    def put(self, stored: Stored) -> None:
        """Keeps a response, in place of an earlier one of the same id. It is safe when this
        returns.
        """
        response = stored.response
        body, given = _dumps(response), _dumps(list(stored.input))
        events = None if stored.events is None else zlib.compress(_dumps(stored.events).encode(), 1)
        row = {
            "id": response["id"],
            "previous": response.get("previous_response_id"),
            "status": response["status"],
            "used": self._clock(),
            "bytes": len(body.encode()) + len(given.encode()) + len(events or b""),
            "response": body,
            "input": given,
            "events": events,
        }
        items = [
            (item["id"], row["id"])
            for item in [*stored.input, *response.get("output", ())]
            if item.get("id")
        ]
        columns = ", ".join(row)
        values = ", ".join(f":{name}" for name in row)
        changes = ", ".join(f"{name} = excluded.{name}" for name in row if name != "id")
        with self._transaction() as sql:
            sql.execute(
                f"INSERT INTO responses ({columns}) VALUES ({values}) "
                f"ON CONFLICT (id) DO UPDATE SET {changes}",
                row,
            )
            sql.execute("DELETE FROM items WHERE response = ?", (row["id"],))
            sql.executemany("INSERT OR REPLACE INTO items (id, response) VALUES (?, ?)", items)
            sql.execute(
                f"{_CHAIN} UPDATE responses SET used = :used WHERE id IN (SELECT id FROM chain)",
                {"id": row["id"], "since": -LARGEST, "used": row["used"]},
            )
            self._evict(keep=row["id"])

    def get(self, id: str) -> Stored:
        """The response; NotStored if there is none."""
        with self._lock:
            row = self._sql.execute(
                "SELECT response, input, events FROM responses WHERE id = ? AND used > ?",
                (id, self._since()),
            ).fetchone()
        if row is None:
            raise NotStored(
                id, f"there is no response {id[:100]!r}: it was never stored, or is gone"
            )
        return _stored(row)

    def chain(self, id: str) -> list[Stored]:
        """The response and all that it continues, oldest first; without events.

        NotStored if it, or one before it, is not there.
        """
        with self._lock:
            rows = self._sql.execute(
                f"{_CHAIN} SELECT response, input, NULL, previous FROM chain "
                "JOIN responses USING (id) ORDER BY depth DESC",
                {"id": id, "since": self._since()},
            ).fetchall()
        if not rows:
            raise NotStored(
                id, f"there is no response {id[:100]!r}: it was never stored, or is gone"
            )
        missing = rows[0][3]
        if missing is not None:
            raise NotStored(
                missing,
                f"response {id!r} continues {missing!r}, which is gone: send the conversation as "
                "input items",
            )
        return [_stored(row) for row in rows]

    def item(self, id: str) -> dict[str, Any] | None:
        """The input or output item of this id, in whatever response; None if there is none."""
        with self._lock:
            row = self._sql.execute(
                "SELECT responses.response, input, NULL FROM items "
                "JOIN responses ON responses.id = items.response WHERE items.id = ? AND used > ?",
                (id, self._since()),
            ).fetchone()
        if row is None:
            return None
        stored = _stored(row)
        items = [*stored.input, *stored.response.get("output", ())]
        return next((item for item in items if item.get("id") == id), None)

    def delete(self, id: str) -> bool:
        """Forgets a response and its items; False if there was none."""
        with self._transaction() as sql:
            since = self._since()
            found = sql.execute("DELETE FROM responses WHERE id = ? AND used > ?", (id, since))
            return found.rowcount > 0

    def running(self) -> list[Stored]:
        """Responses that are neither finished nor failed. Right after opening: those that the end
        of the last process interrupted.
        """
        with self._lock:
            rows = self._sql.execute(
                f"SELECT response, input, events FROM responses WHERE status IN {RUNNING} "
                "ORDER BY seq"
            ).fetchall()
        return [_stored(row) for row in rows]

    def __len__(self) -> int:
        with self._lock:
            count = self._sql.execute(
                "SELECT count(*) FROM responses WHERE used > ?", (self._since(),)
            )
            return count.fetchone()[0]

    def close(self) -> None:
        with self._lock:
            self._sql.close()

    def _since(self) -> float:
        return self._clock() - self.max_age

    def _evict(self, keep: str | None = None) -> None:
        """Deletes what is too old, then what is least used until number and size are within
        bounds.
        """
        sql = self._sql
        sql.execute("DELETE FROM responses WHERE used <= ? AND id IS NOT ?", (self._since(), keep))
        count, size = sql.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM responses"
        ).fetchone()
        if count <= self.max_responses and size <= self.max_bytes:
            return
        doomed = []
        for seq, id, own in sql.execute("SELECT seq, id, bytes FROM responses ORDER BY used, seq"):
            if count <= self.max_responses and size <= self.max_bytes:
                break
            if id != keep:
                doomed.append((seq,))
                count, size = count - 1, size - own
        sql.executemany("DELETE FROM responses WHERE seq = ?", doomed)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield self._sql
            except BaseException:
                self._sql.execute("ROLLBACK")
                raise
            self._sql.execute("COMMIT")


def _open(path: Path | None) -> sqlite3.Connection:
    """A connection to a file of the newest version."""
    if path is not None:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise GptOssError(
                f"cannot open the store {path}: {error.strerror}; give --store a file in a folder "
                "that exists and can be written"
            ) from None
    sql = sqlite3.connect(
        path or ":memory:", timeout=2, isolation_level=None, check_same_thread=False
    )
    try:
        # exclusive: a second process would take our running responses for interrupted ones
        sql.execute("PRAGMA locking_mode = EXCLUSIVE")
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("PRAGMA synchronous = FULL")
        sql.execute("PRAGMA foreign_keys = ON")
        sql.execute("PRAGMA secure_delete = ON")
        sql.execute("BEGIN IMMEDIATE")
        _migrate(sql, path)
        sql.execute("COMMIT")
    except GptOssError:
        sql.close()
        raise
    except sqlite3.Error as error:
        sql.close()
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            reason = "another process has it open: give each server a --store of its own"
        else:
            reason = f"{error}; give --store another file, or move this one away"
        raise GptOssError(f"cannot open the store {path}: {reason}") from None
    return sql


def _migrate(sql: sqlite3.Connection, path: Path | None) -> None:
    [version] = sql.execute("PRAGMA user_version").fetchone()
    [owner] = sql.execute("PRAGMA application_id").fetchone()
    [tables] = sql.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if owner != APPLICATION_ID and (owner or version or tables):
        raise GptOssError(
            f"{path} is another program's database: give --store a file that is not there yet"
        )
    if version > len(MIGRATIONS):
        raise GptOssError(
            f"the store {path} is of version {version}, this gptoss_jax knows up to "
            f"{len(MIGRATIONS)}: update gptoss_jax, or give --store another file"
        )
    for script in MIGRATIONS[version:]:
        for statement in script.split(";"):
            sql.execute(statement)
    sql.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    sql.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _stored(row: Sequence[Any]) -> Stored:
    events = None if row[2] is None else json.loads(zlib.decompress(row[2]))
    return Stored(json.loads(row[0]), json.loads(row[1]), events)


def _dumps(value: Any) -> str:
    # ASCII, so that lone surrogates are kept
    return json.dumps(value, separators=(",", ":"))
