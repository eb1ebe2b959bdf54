"""What a compiled module's text says: its collectives, the bytes that a loop moves, and the kernels
that it starts.
"""

import dataclasses
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
}
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


_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_PLACED = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_PARTS = ("dynamic-slice", "slice", "gather")  # operations that read a part of their first operand
_NOTHING = (
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional",
    "async-done", "copy-done", "all-reduce-done", "partition-id", "after-all",
)  # fmt: skip


def moved(text: str, loop: str, shares: dict[str, float]) -> dict[str, float]:
    """Bytes of a TPU's large memory that one turn of a loop reads and writes: a part of an array
    counts as that part, what lies in fast memory (S(1) in a layout) as nothing.

    Args:
      text: The compiled module's text.
      loop: A name that occurs in the loop's body and in no other computation as often (of a
        kernel).
      shares: Kernel's name -> the part of its operands that it reads, 1 where none is given.

    Returns:
      name or kind of operation -> bytes, those without any left out.
    """
    bodies, _ = _computations(text)
    body = max(bodies, key=lambda name: sum(loop in line for line in bodies[name]))
    named = {
        match[2]: match.groups()[2:]
        for match in map(_NAMED.match, bodies[body])
        if match is not None
    }
    found: dict[str, float] = {}
    for name, (result, kind, rest) in named.items():
        if kind in _NOTHING:
            continue
        kernel = name.rstrip("0123456789").rstrip(".")
        key = kernel if kind == "custom-call" else kind.removesuffix("-start")
        operands = [named[x][0] for x in _operands(rest) if x in named]
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        if kind.endswith("-start"):  # a copy into fast memory, or out of it: one side counts
            size = min(map(_size, _ARRAY.findall(result)[:2])) if _far(result) else 0
        elif kind == "dynamic-update-slice":
            size = _far(operands[1])
        elif kind in _PARTS:
            size = 2 * _far(result) or min(_size(a) for a in _ARRAY.findall(result))
        elif called and kind == "fusion":
            size = _of_fusion(bodies[called[1]], operands, result)
        else:
            size = _far(result) + shares.get(kernel, 1) * sum(map(_far, operands))
        if size:
            found[key] = found.get(key, 0) + size
    return found


def _operands(rest: str) -> list[str]:
    depth, end = 0, 0
    while depth >= 0 and end < len(rest):
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return re.findall(r"%([\w.\-]+)", rest[:end])


def _far(text: str) -> int:
    """Bytes of the arrays in a text that lie in the large memory."""
    found = (match.groups() for match in _PLACED.finditer(text))
    return sum(_size((kind, shape)) for kind, shape, place in found if "S(" not in (place or ""))


def _of_fusion(lines: list[str], operands: list[str], result: str) -> int:
    """What a fusion reads and writes: of operands that are only cut, the pieces."""
    inside = [match.groups() for match in map(_NAMED.match, lines) if match is not None]
    total, written = 0, _far(result)
    for _, name, _, kind, rest in inside:
        if kind != "parameter":
            continue
        operand = operands[int(rest.split(")")[0])]
        users = [row for row in inside if re.search(rf"%{re.escape(name)}\b", row[4])]
        firsts = [row for row in users if _operands(row[4])[:1] == [name]]
        if not _far(operand):
            continue
        if users and len(firsts) == len(users) and all(row[3] in _PARTS for row in users):
            total += sum(_size(a) for row in users for a in _ARRAY.findall(row[2]))
        elif users and all(row[3] == "dynamic-update-slice" for row in firsts) and firsts:
            written = 0  # in place: the piece is read elsewhere and written here
            total += _size(_ARRAY.findall(operands[-1])[0]) if len(operands) > 1 else 0
        else:
            total += _far(operand)
    return total + written


_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LAYER = re.compile(r"layer(\d+)/(.*)")
_NO_KERNEL = (
    *(kind for kind in _NOTHING if kind not in ("while", "conditional")),
    "copy-start",
    "add-dependency",
    "optimization-barrier",
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operation of a GPU's program that is started by itself.

    Attributes:
      name: In the module.
      kind: fusion, custom-call, copy, ...; of a custom call its target.
      layer: Of the network; None outside.
      scope: Names of the source's scopes inside the layer, and of the operation.
    """

    name: str
    kind: str
    layer: int | None
    scope: str


def kernels(text: str, loop: str = " fusion(") -> list[Kernel]:
    """Kernels that one turn of a loop starts on a GPU, in the program's order.

    What is inside nested loops and conditionals (the sampler's) is not among them: they count as
    one. A library's product may start a second kernel, which the text does not tell.

    Args:
      text: The compiled module's text.
      loop: What occurs most often in the loop's body.
    """
    bodies, _ = _computations(text)
    body = max(bodies, key=lambda name: sum(loop in line for line in bodies[name]))
    found = []
    for line in bodies[body]:
        match = _NAMED.match(line)
        if match is None or match[4] in _NO_KERNEL or match[4].endswith("-done"):
            continue
        target = re.search(r'custom_call_target="([^"]*)"', line)
        called = _CALLED.search(line)
        inside = bodies.get(called[1], []) if called else []
        scope = next(
            (path[1] for path in map(_OP_NAME.search, [line, *inside[::-1]]) if path is not None),
            "",
        )
        layer = _LAYER.search(scope)
        found.append(
            Kernel(
                match[2],
                target[1] if target else match[4],
                int(layer[1]) if layer else None,
                layer[2] if layer else scope,
            )
        )
    return found


def overlapped(text: str, loop: str = " fusion(") -> dict[str, tuple[int, int]]:
    """Collectives of one turn of a loop, and how many of them have kernels between start and end.

    Args:
      text: The compiled module's text, in the order in which it is run.
      loop: As `kernels`.

    Returns:
      kind -> how many there are, how many have other work beside them.
    """
    bodies, _ = _computations(text)
    body = max(bodies, key=lambda name: sum(loop in line for line in bodies[name]))
    lines = [match.groups() for match in map(_NAMED.match, bodies[body]) if match is not None]
    found: dict[str, tuple[int, int]] = {kind: (0, 0) for kind in KINDS}
    for i, (_, name, _, kind, _) in enumerate(lines):
        bare = kind.removesuffix("-start")
        if bare not in KINDS:
            continue
        between = []
        if bare != kind:
            ends = (j for j, row in enumerate(lines) if _operands(row[4])[:1] == [name])
            between = [row[3] for row in lines[i + 1 : next(ends, i)]]
        work = [one for one in between if one not in _NO_KERNEL and not one.endswith("-done")]
        found[bare] = found[bare][0] + 1, found[bare][1] + bool(work)
    return {kind: counts for kind, counts in found.items() if counts[0]}


def scopes(found: list[Kernel]) -> dict[str, int]:
    """Where kernels come from -> how many: "layer/qkv/products", of all layers together; of a
    Pallas kernel its name, of what XLA made its kind.
    """
    counted: dict[str, int] = {}
    for one in found:
        path = one.scope.split("/")
        made = path[-1] != "pallas_call"
        inside = [part for part in path[:-1] if "(" not in part and part not in ("while", "body")]
        name = "/".join([*(["layer"] if one.layer is not None else []), *inside])
        name = f"{name}: {one.kind}".lstrip(": ") if made else name
        counted[name] = counted.get(name, 0) + 1
    return counted
