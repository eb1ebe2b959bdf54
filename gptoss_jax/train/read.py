"""Data files and data sets -> rows, each with the place where it stands.

Knows JSONL, folders of JSONL and Hugging Face data sets. Refuses to know what the columns mean
(forms.py) and tokens.
"""

import dataclasses
import gzip
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from gptoss_jax.errors import GptOssError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}

Source = str | os.PathLike[str] | Iterable[Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as it was read; `where` is "file:line" (from 1) or "row N" (from 0)."""

    where: str
    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Examples:
    """What `read` found: the good rows, and a message for every line that could not be read."""

    rows: list[Example]
    bad: list[str] = dataclasses.field(default_factory=list)


def read(source: Source, *, split: str = "train", skip_bad: bool = False) -> Examples:
    """All rows of a source, in order.

    Args:
      source: A JSONL file (`.gz` too), a folder with `train.jsonl` (mlx-lm's names: train, valid,
        test), several of these, the id of a Hugging Face data set ("OWNER/NAME"), an object of the
        `datasets` library, or any iterable of dicts.
      split: Which part of a folder, an id or a dict of splits: train, validation or test, or a
        name that the data set has.
      skip_bad: Keep the messages of lines that cannot be read instead of raising the first.

    Returns:
      The rows; blank lines are none. Rows of the `datasets` library lose every null at any depth:
      Arrow writes the keys of all rows into each of them. Rows from elsewhere stay as they are.

    Raises:
      GptOssError with file and line: no such file, no UTF-8, no JSON, no object; an empty source.
    """
    found = Examples([])
    _read(source, split, skip_bad, found)
    if not found.rows and not found.bad:
        raise GptOssError(f"{_name(source)} holds no examples: give one JSON object a line")
    return found


def _read(source: Source, split: str, skip_bad: bool, found: Examples) -> None:
    if isinstance(source, str) and not Path(source).expanduser().exists():
        if not _HUB_ID.fullmatch(source) or Path(source).suffix in (".jsonl", ".json", ".gz"):
            raise GptOssError(
                f"{source}: no such file; give a JSONL file, a folder with {split}.jsonl, or the "
                "id of a Hugging Face data set (OWNER/NAME)"
            )
        return _read(_from_hub(source, split), split, skip_bad, found)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        for file in _files(path, split):
            _read_file(file, skip_bad, found)
        return None
    if isinstance(source, Mapping):
        return _read(_choose(cast(Mapping, source), split), split, skip_bad, found)
    arrow = type(source).__module__.partition(".")[0] == "datasets"
    for number, row in enumerate(source):
        if isinstance(row, str | os.PathLike):
            _read(cast(Source, row), split, skip_bad, found)
            continue
        where = f"row {number}"
        if not isinstance(row, Mapping):
            _fault(f"{where}: expected a dict of columns, got {_kind(row)}", skip_bad, found)
        else:
            found.rows.append(Example(where, _without_nulls(row) if arrow else row))
    return None


def _files(path: Path, split: str) -> list[Path]:
    """The file itself, or the split's files of a folder."""
    if not path.exists():
        raise GptOssError(f"{path}: no such file; give a JSONL file or a folder of them")
    if not path.is_dir():
        return [path]
    names = [f"{name}{end}" for name in _aliases(split) for end in (".jsonl", ".jsonl.gz")]
    files = [path / name for name in names if (path / name).is_file()]
    if not files:
        raise GptOssError(
            f"{path} has no {names[0]}: name the file, or call it "
            f"{', '.join(n for n in names if n.endswith('.jsonl'))}"
        )
    return files[:1]


def _aliases(split: str) -> tuple[str, ...]:
    return next((names for names in _SPLITS.values() if split in names), (split,))


def _read_file(path: Path, skip_bad: bool, found: Examples) -> None:
    """One JSONL file's lines."""
    try:
        for number, line in enumerate(_lines(path), 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                found.rows.append(Example(where, _parse(line, where)))
            except GptOssError as error:
                if not skip_bad:
                    raise
                found.bad.append(str(error))
    except (OSError, EOFError, zlib.error) as error:
        raise GptOssError(f"{path} cannot be read: {error}") from None


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        yield from cast(Iterable[bytes], file)


def _parse(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise GptOssError(
            f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise GptOssError(
            f"{where}: not JSON ({error.msg} at column {error.colno}): give one whole JSON object "
            "a line"
        ) from None
    except (RecursionError, ValueError) as error:
        raise GptOssError(f"{where}: JSON that cannot be read ({error})") from None
    if not isinstance(row, dict):
        raise GptOssError(f"{where}: expected a JSON object a line, got {_kind(row)}")
    return row


def _fault(message: str, skip_bad: bool, found: Examples) -> None:
    if not skip_bad:
        raise GptOssError(message)
    found.bad.append(message)


def _from_hub(name: str, split: str) -> Any:
    """A data set of the Hub, all its splits."""
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise GptOssError(
            f"{name} is no file here, and reading it as a Hugging Face data set needs the datasets "
            "library: pip install datasets, or save the data as JSONL"
        ) from None
    try:
        return library.load_dataset(name)
    except Exception as error:  # the library raises whatever its file systems and parsers do
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise GptOssError(
            f"the data set {name} cannot be loaded ({first}): check the id and the network, or "
            "save it as JSONL"
        ) from None


def _choose(splits: Mapping[str, Any], split: str) -> Any:
    for name in dict.fromkeys((split, *_aliases(split))):
        if name in splits and not isinstance(splits[name], str):
            return splits[name]
    raise GptOssError(f"no split {split!r} in the data set: it has {', '.join(map(str, splits))}")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "the data"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
