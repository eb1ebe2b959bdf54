"""Block sizes of the kernels: a model of the card, or what was measured on it.

The model, for an H200 (4.8 TB/s, 132 multiprocessors): bytes in flight have to be bandwidth times
latency, 4.8e12 * 0.7e-6 / 132 = 25 KB a multiprocessor. A step of few rows holds 32 outputs by 64
bytes, 2 KB, of which three are in flight in each program, and five or six programs share a
multiprocessor: 30 to 36 KB. An A100 (2.0 TB/s, 108) needs 13 KB, an L4 (0.3 TB/s, 58) 4 KB.
"""

import dataclasses

import jax

from gptoss_jax.kernels import tuning


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the work is cut. All but `together` are powers of two, depths at least 16.

    Attributes:
      outputs: Outputs of a program where a block has few rows; gate and up are two outputs.
      depth: Packed bytes of an output in a step of its loop, two inputs each.
      warps: Of a program.
      stages: Steps in flight.
      many: From so many rows a block on, the other four hold.
      many_outputs, many_depth, many_warps, many_stages: As above.
      most_rows: Of a block.
      together: Pairs (row, expert) up to which a program finds its own rows among all; above it
        they are sorted.
      attention_rows: (query, head) pairs of a program in a prefill, at most; with 64 slots the
        scores and sums of 128 are 128 registers a thread.
      attention_slots: Of a step: 64 are 16 KB of keys and values with heads of 64, three of them
        in flight.
      attention_warps: Of a program.
      attention_programs: That a decode step's slots are split for; 256 are about two for each
        multiprocessor of an H200.
      dense_depth: Inputs of a step of a norm and product of one row.
      dense_programs: That one row's product has at least, if its outputs are so many.
      dense_outputs: Outputs of a program for more rows.
      dense_warps, dense_stages: Of a norm and product.
    """

    outputs: int = 32
    depth: int = 64
    warps: int = 2
    stages: int = 4
    many: int = 32
    many_outputs: int = 128
    many_depth: int = 32
    many_warps: int = 8
    many_stages: int = 3
    most_rows: int = 256
    together: int = 1024
    attention_rows: int = 128
    attention_slots: int = 64
    attention_warps: int = 4
    attention_programs: int = 256
    dense_depth: int = 1024
    dense_programs: int = 256
    dense_outputs: int = 32
    dense_warps: int = 4
    dense_stages: int = 4


@dataclasses.dataclass(frozen=True)
class Tile:
    """One program's share: `Tuning` for a number of rows."""

    rows: int
    outputs: int
    depth: int
    warps: int
    stages: int


LEAST_ROWS = 16  # that tensor cores take
SMALL_SHARED_MEMORY = ("L4", "RTX", "A10G", "NVIDIA A10", "L40")  # 100 KB a multiprocessor


def model(kind: str) -> Tuning:
    """Block sizes for a card nobody measured, by JAX's name of it."""
    if "A100" in kind or "A30" in kind:  # 164 KB of shared memory, no products of 64 rows at once
        return Tuning(stages=3, many_outputs=64, many_warps=4, most_rows=128)
    if any(name in kind for name in SMALL_SHARED_MEMORY):
        return Tuning(stages=3, most_rows=64, many_outputs=64, many_warps=4, many_stages=2)
    return Tuning()


def at_hand() -> Tuning:
    """For the card that a program which is traced now is for: the mesh's where that says, else the
    one at hand, else an H200.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform in ("gpu", "cuda"):
        return model(device.device_kind)
    if jax.default_backend() != "gpu":
        return Tuning()
    return tuning.find("gpu", model(tuning.kind("gpu")))


def tile(
    pairs: int, experts: int, chosen: Tuning, exact: bool = False, single: bool = False
) -> Tile:
    """The crossover between single rows, groups of rows and a prefill, by shape alone.

    A block has twice as many rows as an expert gets on average, so that few experts need two: 16 at
    least (what tensor cores take), `most_rows` at most. The model of it, for an H200:

    One row stands in a tensor core's 16, all the same. The card must unpack 9.0e12 values a second
    to keep up with its memory and issues 3.0e13 instructions, 3.3 a value, half integer. The
    whole loop compiles to 3.8 a value for one row and 4.4 for 16, 2.0 and 2.4 of them integer
    (tests/measure_instructions.py); unpacking is 2.25. Two warps of 64 outputs would take 3.4, but
    a multiprocessor would have six warps or four for its four schedulers, where it now has twelve
    or six. Ordinary arithmetic would be 2 more; a tensor core is next to nothing up to about 200
    rows (206 operations a byte).

    A prefill unpacks from registers too. Unpacking to memory first would write and read 2 + 2 bytes
    a value, 0.7 ms a layer of 20b, where 8,192 rows take 1.7 ms at a tensor core's full rate.

    Args:
      pairs: (row, choice) pairs.
      experts: Over which they are spread.
      chosen: Of the card.
      exact: float32 operands, which ordinary arithmetic multiplies: no more than 16 rows at once.
      single: All pairs are of one row, whose experts differ: a block has one.
    """
    average = -(-pairs // experts)
    most = LEAST_ROWS if exact else chosen.most_rows
    rows = min(most, max(LEAST_ROWS, 1 << (2 * average - 1).bit_length()))
    rows = 1 if single else rows
    if rows >= chosen.many:
        return Tile(rows, chosen.many_outputs, chosen.many_depth, chosen.many_warps,
                    chosen.many_stages)  # fmt: skip
    return Tile(rows, chosen.outputs, chosen.depth, chosen.warps, chosen.stages)
