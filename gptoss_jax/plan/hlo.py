"""Collectives in a compiled module's text: how many, of which kind, how many bytes."""

import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Collectives of one step.

    A loop counts as often as it says, a loop of unknown length (the decode loop) once; of a
    conditional's branches all count. Bytes are those of the largest array at each operation on one
    device, the whole message.

    Args:
      text: `compiled.as_text()`.

    Returns:
      kind -> {"count", "bytes"}; kinds that do not occur are left out.
    """
    bodies, entry = _computations(text)
    found: dict[str, dict[str, int]] = {}
    for line, times in _lines(bodies, entry, 1):
        match = _OPERATION.match(line)
        if not match:
            continue
        kind = match[2].removesuffix("-start")
        if kind in KINDS:
            row = found.setdefault(kind, {"count": 0, "bytes": 0})
            row["count"] += times
            row["bytes"] += times * max(map(_size, _ARRAY.findall(match[1])), default=0)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = None if line.startswith((" ", "HloModule")) else _HEAD.match(line)
        if head:
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _lines(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in bodies.get(name, ()):
        yield line, times
        if "reduce(" in line or ("scatter(" in line and "reduce-scatter(" not in line):
            continue  # they call an addition
        trips = _TRIPS.search(line)
        inner = times * int(trips[1]) if trips and " while(" in line else times
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
            yield from _lines(bodies, other, inner)


def _size(array: tuple[str, str]) -> int:
    dtype, shape = array
    size = _BYTES.get(dtype, 4)
    for axis in shape.split(","):
        size *= int(axis) if axis else 1
    return size
