"""How many instructions the experts' kernels issue for each weight in their loop: compiled for cards
that are not there, taken apart by nvdisasm, and counted by kind.

    pip install -e ".[cuda]" nvidia-cuda-nvdisasm
    JAX_PLATFORMS=cpu python tests/measure_instructions.py [--rows 1] [--cards h200 a100]

A card keeps up with its memory where this is at most its "room": instructions that its schedulers
start in the time in which its memory delivers a weight (17 / 32 bytes). Integer instructions (of
the kinds in INTEGER) have half as many places.
"""

import argparse
import collections
import functools
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.kernels.gpu import blocks, moe
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.ops import backends
from gptoss_jax.plan import hardware, programs, ptx

CLOCK = {"h200": 1.755e9, "h100": 1.755e9, "a100": 1.41e9, "l4": 2.04e9}  # boost, data sheets
LANES = 128  # instructions a multiprocessor starts in a cycle, times a warp's threads
KINDS = {
    "masks, signs (LOP3)": ("LOP3",),
    "bytes (PRMT)": ("PRMT",),
    "integer products, moves (IMAD, MOV)": ("IMAD", "MOV"),
    "scale (HMUL2, HFMA2)": ("HMUL2", "HFMA2"),
    "tensor core (HMMA, HGMMA)": ("HMMA", "HGMMA"),
    "shared memory (LDS, LDSM, STS)": ("LDS", "LDSM", "STS"),
    "memory (LDGSTS, LDG, LDGDEPBAR, DEPBAR)": ("LDGSTS", "LDG", "LDGDEPBAR", "DEPBAR"),
    "addresses (LEA, IADD3, VIADD, SHF)": ("LEA", "IADD3", "VIADD", "SHF"),
    "bounds (ISETP, SEL, VIMNMX, IMNMX)": ("ISETP", "SEL", "VIMNMX", "IMNMX"),
}
INTEGER = ("LOP3", "PRMT", "LEA", "IADD3", "VIADD", "SHF", "ISETP", "SEL", "VIMNMX", "IMNMX")
EXPERTS, WIDTH, CHOICES = 32, 2880, 4


def compiled(card: str, rows: int, folder: Path) -> list[ptx.Kernel]:
    """The kernels of gpt-oss-20b's experts."""
    device = programs.devices(hardware.parse(f"{card}:1"))[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def array(shape, dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def packed(*outputs):
        grid = EXPERTS, *outputs, WIDTH // 32
        return MxTensor(array((*grid, 16), jnp.uint8), array(grid, jnp.uint8))

    call = functools.partial(moe.mlp, alpha=1.702, limit=7.0)
    bias = array((EXPERTS, WIDTH, 2), jnp.bfloat16), array((EXPERTS, WIDTH), jnp.bfloat16)
    parts = (
        array((rows, WIDTH), jnp.bfloat16), array((rows, CHOICES), jnp.float32),
        array((rows, CHOICES), jnp.int32), packed(WIDTH, 2), bias[0], packed(WIDTH), bias[1],
    )  # fmt: skip
    with programs.in_place_of(device), backends.compiling_for("gpu"):
        lowered = jax.jit(call).trace(*parts).lower(lowering_platforms=("cuda",))
    lowered.compile(compiler_options=ptx.options(folder))
    return [one for one in ptx.kernels(folder) if one.name.startswith("experts_")]


def loop(kernel: ptx.Kernel) -> list[str]:
    """Names of the instructions of the shortest loop that multiplies: the one all weights pass."""
    tool = ptx.tool("nvdisasm")
    if tool is None:
        raise SystemExit("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    command = [str(tool), "-c", str(kernel.file.with_suffix(".cubin"))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, places, loops = [], {}, []
    for line in text.splitlines():
        label = re.match(r"^\s*(\.L_x_\d+):", line)
        found = re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([\w.]+)(.*?);", line)
        if label:
            places[label[1]] = len(names)
        elif found:
            names.append(found[1].split(".")[0])
            target = re.search(r"(\.L_x_\d+)", found[2])
            if names[-1] == "BRA" and target and target[1] in places:
                loops.append(names[places[target[1]] :])
    return min((one for one in loops if {"HMMA", "HGMMA"} & set(one)), key=len)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--cards", nargs="+", default=["h200", "a100"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"instructions a weight, {given.rows} rows, jax {jax.__version__}")
    for card in given.cards:
        device = hardware.parse(f"{card}:1").device
        room = device.cores * LANES * CLOCK[card] / (device.bandwidth / (17 / 32))
        tuned = blocks.model(programs.KNOWN_CARDS[device.capability])
        tile = blocks.tile(given.rows * CHOICES, EXPERTS, tuned, single=given.rows == 1)
        weights = tile.outputs * 2 * tile.depth / (32 * tile.warps)
        print(f"\n{card}: room for {room:.2f}; {tile}")
        with tempfile.TemporaryDirectory() as folder:
            for kernel in compiled(card, given.rows, Path(folder)):
                names = loop(kernel)
                count = collections.Counter(names)
                integer = sum(count[name] for name in INTEGER)
                print(f"  {kernel.name}: {len(names) / weights:.2f}, {integer / weights:.2f} of "
                      f"them integer; {kernel.registers} registers, {kernel.shared} bytes shared, "
                      f"{kernel.spilled} spilled")  # fmt: skip
                for kind, members in KINDS.items():
                    print(f"    {sum(count.pop(n, 0) for n in members) / weights:5.2f}  {kind}")
                print(f"    {sum(count.values()) / weights:5.2f}  the rest")


if __name__ == "__main__":
    main()
