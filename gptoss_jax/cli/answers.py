"""The output of a long run: one JSON object a line, safe against interruption, continued where it
stopped.

    answers.jsonl            the answers and nothing else; locked while a run writes to it
    answers.jsonl.run.json   what they are answers of: input, model, settings

A batch is appended and synced as a whole; a torn last line is cut off when the run is continued.
What is done is what stands in the file. Knows files; knows nothing of what an answer holds but what
it answers, and whether it has an `error`.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptOssError

SAMPLES, SAMPLE = 64, 4096


def fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes and 64 samples of 4 KiB of each file of a checkpoint.

    It tells checkpoints apart without reading gigabytes; a change of a few bytes may escape it,
    except in our own layout, whose manifest holds the checksums of all arrays.
    """
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = file.relative_to(folder), file.stat().st_size
        if any(part.startswith(".") for part in name.parts):  # the Hub's notes on a download
            continue
        total.update(f"{name.as_posix()} {size}\n".encode())
        whole = size <= SAMPLES * SAMPLE
        with file.open("rb") as opened:
            for i in range(1 if whole else SAMPLES):
                opened.seek(i * (size - SAMPLE) // (SAMPLES - 1))
                total.update(opened.read(size if whole else SAMPLE))
    return total.hexdigest()


class Answers:
    """The output file of a run, locked; `close` it.

    Args:
      path: The file; made if it is not there.
      ids: Of all prompts as text, in the order of the input.
      wanted: What the answers are to be of: {"input": {...}, "model": {...}, "settings": {...}}.
      compared: The entries that must agree, beside all settings: ("input", "sha256"), ...
      adopted: Settings that are taken from the run that is continued where `wanted` has None.
      overwrite: Forget what is there.
      key: Where an answer has the id of its prompt.
      beside: File that says what the answers are of; by default PATH.run.json.

    Attributes:
      record: What the run that is continued began with; None if there is none.
      done: The ids answered so far.
      failed: How many of them with an error.

    Raises:
      GptOssError: Another run writes to the file, or it holds answers of another model, input or
        other settings, or something that is no answer.
    """

    def __init__(
        self,
        path: Path,
        ids: Sequence[str],
        wanted: Mapping[str, Any],
        compared: Sequence[tuple[str, str]],
        adopted: Sequence[str] = (),
        overwrite: bool = False,
        key: str = "id",
        beside: Path | None = None,
    ):
        self.path = path = path.expanduser().resolve()
        self.beside = beside or path.with_name(f"{path.name}.run.json")
        self.key = key
        self.order = {key: number for number, key in enumerate(ids)}
        self.places: dict[str, tuple[int, int]] = {}  # offset and length of every answer
        self.record: dict[str, Any] | None = None
        self.failed = 0
        self.file = _locked(path)
        try:
            if overwrite:
                os.ftruncate(self.file, 0)
            self.size = os.fstat(self.file).st_size
            if self.size:
                self.record = self._agreed(wanted, compared, adopted)
                self._read()
        except BaseException:
            os.close(self.file)
            raise

    @property
    def done(self) -> list[str]:
        return list(self.places)

    def begin(self, record: Mapping[str, Any]) -> None:
        """Writes what the answers are of, unless a run is continued."""
        if self.record is None:
            self.record = dict(record)
            text = json.dumps(self.record, ensure_ascii=False, indent=2) + "\n"
            replace(self.beside, [text.encode("utf-8", "backslashreplace")])

    def append(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Adds answers; they are on the disk when this returns."""
        data = b""
        for answer in answers:
            row = _encode(answer)
            self.places[str(answer[self.key])] = (self.size + len(data), len(row))
            self.failed += answer.get("error") is not None
            data += row
        try:
            at = self.size
            while at < self.size + len(data):
                at += os.pwrite(self.file, data[at - self.size :], at)
            os.fsync(self.file)
        except OSError:
            os.ftruncate(self.file, self.size)
            raise
        self.size += len(data)

    def finish(self) -> None:
        """Puts the answers into the order of the input, if they are not."""
        keys = sorted(self.places, key=lambda key: self.places[key])
        wanted = sorted(keys, key=self.order.__getitem__)
        if keys != wanted:
            places = [self.places[key] for key in wanted]
            replace(self.path, (os.pread(self.file, length, at) for at, length in places))

    def close(self) -> None:
        """Lets others at the file; removes it if nothing came of it."""
        if self.record is None and self.size == 0:
            self.path.unlink(missing_ok=True)
        os.close(self.file)

    def _agreed(self, wanted, compared, adopted) -> dict[str, Any]:
        """The record of the run that made the file, if it is the wanted one."""
        try:
            record = json.loads(self.beside.read_text(encoding="utf-8"))
            old = [record[part][key] for part, key in compared]
            settings = dict(record["settings"])
        except FileNotFoundError:
            raise GptOssError(
                f"{self.path} holds something already, and {self.beside.name}, which says what, is "
                "not there: use --overwrite to replace it, or another output"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise GptOssError(
                f"{self.beside} is damaged: use --overwrite to start again, or another output"
            ) from None
        new = [wanted[part][key] for part, key in compared]
        differing = [
            _another(part, record[part].get("name"), wanted[part].get("name"))
            for (part, _), before, now in zip(compared, old, new, strict=True)
            if before != now
        ]
        asked = {
            key: value
            for key, value in wanted["settings"].items()
            if value is not None or key not in adopted
        }
        differing += [
            f"{key} {json.dumps(settings.get(key))}, not {json.dumps(value)}"
            for key, value in asked.items()
            if settings.get(key) != value
        ]
        if differing:
            raise GptOssError(
                f"{self.path} was begun with {'; '.join(differing)}: continue with the same, use "
                "--overwrite to start again, or another output"
            )
        return record

    def _read(self) -> None:
        """Notes what is done, and cuts off a last line that was not written to its end."""
        data, at = self.path.read_bytes(), 0
        for number, row in enumerate(data.splitlines(keepends=True) if data else (), 1):
            answer = _decode(row, self.key)
            last = at + len(row) == len(data)
            if answer is None and last:
                os.ftruncate(self.file, at)
                os.fsync(self.file)
                self.size = at
                return
            key = str(answer[self.key]) if answer is not None else None
            if answer is None or key not in self.order or key in self.places:
                what = "is no answer" if answer is None or key not in self.order else "comes twice"
                raise GptOssError(
                    f"{self.path} line {number}: {_short(row)} {what} of this run: mend the file, "
                    "or use --overwrite to start again"
                )
            self.places[key] = (at, len(row))
            self.failed += answer.get("error") is not None
            at += len(row)


def _locked(path: Path) -> int:
    import fcntl  # not on Windows

    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise GptOssError(f"{path} is not a plain file: give one as output")
    if not path.parent.is_dir():
        raise GptOssError(f"{path.parent}: no such folder: make it first")
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino != path.stat().st_ino:  # the other run has just finished
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(file)
        raise GptOssError(
            f"another run is writing {path}: wait for its end, or use another output"
        ) from None
    return file


def _another(part: str, before: str, now: str) -> str:
    what = f"another content of {now}" if before == now else f"{before}, not {now}"
    return f"{part} {what}" if before != now else what


def replace(path: Path, rows: Iterable[bytes]) -> None:
    """The file with new content, whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.writelines(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _encode(answer: Mapping[str, Any]) -> bytes:
    text = json.dumps(answer, ensure_ascii=False)
    for rare in "\x85\u2028\u2029":  # str.splitlines takes them for the end of a line
        text = text.replace(rare, f"\\u{ord(rare):04x}")
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        return json.dumps(answer).encode() + b"\n"


def _decode(row: bytes, key: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(row)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and key in answer and row[-1:] == b"\n" else None


def _short(row: bytes) -> str:
    text = row.decode("utf-8", "replace").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."
