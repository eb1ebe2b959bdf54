"""Show what a checkpoint holds: names, types, shapes, sizes, what is missing, surplus or damaged.

Reads headers only, in any layout, unless --verify is given. Exit code 1 if the checkpoint could not
be loaded.
"""

import dataclasses
import json
import re
import sys
from typing import Any

import tyro


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of `gptoss inspect`."""

    path: tyro.conf.Positional[str]
    """A folder in any layout, a Hub id that is already in the cache, or gpt-oss-tiny."""
    all: bool = False
    """One line for every array; by default layers that are alike share one."""
    verify: bool = False
    """Also read all data: compare checksums (Orbax), look for NaN scales (other layouts)."""
    json: bool = False
    """Print one JSON object, for programs."""


def run(arguments: Arguments) -> int:
    """Prints the description; 1 if there are problems."""
    from gptoss_jax import hub

    offline = arguments.path != hub.TINY or None
    found = describe(hub.resolve(arguments.path, offline=offline), verify=arguments.verify)
    if arguments.json:
        json.dump(found, sys.stdout)
        print()
    else:
        _print(found, arguments.all)
    return 1 if found["problems"] else 0


def describe(folder, *, verify: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, as plain data.

    Args:
      folder: In any layout.
      verify: Read all data and check it; otherwise only headers are read.

    Returns:
      layout, source and revision (Orbax), config, total_bytes, parameters (values, not counting
      scales), tensors (path, letters, tensor in the file, dtype, shape, bytes) and problems
      (sentences; empty if it can be loaded).

    Raises:
      GptOssError: The folder holds no checkpoint, or its files cannot be understood.
    """
    from gptoss_jax import checkpoint
    from gptoss_jax.errors import GptOssError

    opened = checkpoint.open_checkpoint(folder)
    problems = opened.problems()
    if verify and not problems:
        for array in opened.arrays():
            try:
                for _ in array.pieces():
                    pass
            except GptOssError as error:
                problems.append(str(error))
    tensors = []
    for leaf in opened.leaves:
        entry = opened.entry(leaf)
        if entry is not None:
            dtype, shape, nbytes = entry
            row = {"path": leaf.name, "letters": leaf.letters, "tensor": leaf.tensor}
            tensors.append({**row, "dtype": dtype, "shape": list(shape), "bytes": nbytes})
    manifest = getattr(opened, "manifest", {})
    orbax = bool(manifest)
    return {
        "path": str(opened.folder),
        "layout": f"orbax, {opened.layout} experts" if orbax else _LAYOUTS[opened.layout],
        "source": manifest.get("source"),
        "revision": manifest.get("revision"),
        "config": dataclasses.asdict(opened.config),
        "total_bytes": sum(tensor["bytes"] for tensor in tensors),
        "parameters": sum(
            leaf.size * (2 if leaf.packed else 1)
            for leaf in opened.leaves
            if leaf.path[-1] != "scales"
        ),
        "tensors": tensors,
        "problems": problems,
    }


_LAYOUTS = {
    "mxfp4": "Hugging Face, MXFP4 experts",
    "bfloat16": "Hugging Face, bfloat16 experts",
    "original": "OpenAI's original",
}


def _print(found: dict[str, Any], every: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    source = f"  from {found['source']}" if found["source"] else ""
    source += f" at {found['revision'][:12]}" if found["revision"] else ""
    console.print(f"{found['path']}: {found['layout']}{source}", markup=False)
    table = Table("parameter", "axes", "shape", "type", "bytes", "tensor", box=None, pad_edge=False)
    table.columns[4].justify = "right"
    rows = found["tensors"] if every else _alike(found["tensors"])
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        size = f"{row['bytes']:,}"
        table.add_row(row["path"], row["letters"], shape, row["dtype"], size, row["tensor"])
    console.print(table, markup=False)
    billions = found["parameters"] / 1e9
    count = f"{billions:.2f} billion" if billions >= 0.1 else f"{found['parameters']:,}"
    console.print(
        f"{len(found['tensors'])} arrays, {count} parameters, {found['total_bytes']:,} bytes"
    )
    for problem in found["problems"]:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)


def _alike(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which layers that agree in everything but their number are one: layers.*.mlp.norm."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in tensors:
        key = (re.sub(r"\.\d+\.", ".*.", row["path"]), row["dtype"], *row["shape"])
        groups.setdefault(key, []).append(row)
    found = []
    for (path, *_), rows in groups.items():
        tensor = re.sub(r"\.\d+\.", ".*.", rows[0]["tensor"])
        same = {"path": path, "tensor": tensor, "bytes": sum(row["bytes"] for row in rows)}
        found.append({**rows[0], **same} if rows[1:] else rows[0])
    return found
