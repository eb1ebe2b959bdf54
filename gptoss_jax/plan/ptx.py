"""What NVIDIA's assembler says of the kernels of a program compiled for a card that is not there:
registers, shared memory, and what it moved to memory for want of registers.
"""

import dataclasses
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
      name: Of its entry.
      registers: Of a thread.
      shared: Bytes of a block, static, or what Triton asks for at its start.
      spilled: Bytes that a thread stores in memory because its registers are full.
      file: Its PTX.
    """

    name: str
    registers: int
    shared: int
    spilled: int
    file: Path


def options(folder: Path) -> dict[str, Any]:
    """Compiler options that leave every kernel's PTX in a folder."""
    return {
        "xla_dump_to": str(folder),
        "xla_dump_emitter_re": ".*",
        "xla_gpu_dump_llvmir": True,
    }


def tool(name: str) -> Path | None:
    """A program of CUDA's: beside jax's plugin, or on the path; None if there is none."""
    roots = [Path(p) for p in importlib.import_module("jax_plugins").__path__]
    beside = [p.parent / "nvidia" / "cu13" / "bin" / name for p in roots]
    found = next((p for p in beside if p.exists()), None) or shutil.which(name)
    return None if found is None else Path(found)


def kernels(folder: Path) -> list[Kernel]:
    """Of all PTX that `options` left.

    Raises:
      FileNotFoundError: There is no ptxas.
    """
    found = []
    for file in sorted(folder.glob("*.ptx")):
        name = re.search(r"\.entry (\w+)", file.read_text())
        if name is not None:
            found.append(_assembled(file, name[1]))
    return found


def assemble(file: Path, cubin: Path) -> str:
    """Makes a file for the card of a PTX file; what ptxas said.

    Raises:
      FileNotFoundError: There is no ptxas.
      subprocess.CalledProcessError: It refuses the file.
    """
    ptxas, target = tool("ptxas"), re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)
    if ptxas is None or target is None:
        raise FileNotFoundError(f"no ptxas for {file}: pip install 'jax[cuda13]'")
    command = [str(ptxas), "-v", f"-arch={target[1]}", str(file), "-o", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _assembled(file: Path, name: str) -> Kernel:
    said = assemble(file, file.with_suffix(".cubin"))
    asked = []
    for log in file.parent.glob(f"*.{name}.triton-to-llvm.txt"):
        asked += map(int, re.findall(r"ttg\.shared = (\d+)", log.read_text()))
    return Kernel(
        name,
        _number(r"Used (\d+) registers", said),
        max([_number(r"(\d+) bytes smem", said), *asked]),
        _number(r"(\d+) bytes spill stores", said),
        file,
    )


def _number(pattern: str, said: str) -> int:
    found = re.search(pattern, said)
    return int(found[1]) if found else 0
