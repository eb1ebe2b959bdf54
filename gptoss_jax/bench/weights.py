"""Random parameters in the real format and sizes, made as fast as memory takes them.

Knows shapes and bit patterns; the values mean nothing, but stay where a trained model's are, so
that no product overflows and routing is about uniform.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax import bounds, checkpoint, hf_names, hub, libtpu, sharding
from gptoss_jax.bench.machine import free_memory
from gptoss_jax.checkpoint.stored import aligned
from gptoss_jax.config import GptOssConfig
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.loading import for_kernels, use_compilation_cache
from gptoss_jax.tokenizer import load_tokenizer

PIECE = 1 << 20  # bytes drawn at once: they are shaped while a cache has them
DEVIATION = 0.02
# Word, and where it has sign and mantissa.
PATTERNS = {
    np.dtype(jnp.bfloat16): (np.uint16, 0x807F),
    np.dtype(np.float32): (np.uint32, 0x807FFFFF),
}


def random_model(
    source: str,
    *,
    layers: int | None = None,
    mesh: sharding.Sizes | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
) -> Model:
    """A model of random parameters behind the engine; no files are needed for gpt-oss-20b and 120b.

    Args:
      source: As `config_of` takes it.
      layers: How many of its layers; by default all.
      mesh: As `load` takes it.
      dtype: "bfloat16", the default, or "float32".
      max_context: Longest sequence; by default the model's.

    Raises:
      GptOssError: There is no such model, or not so many layers.
    """
    libtpu.hush()
    use_compilation_cache()
    config, folder = config_of(source, layers)
    context = max_context or config.max_context
    if not 0 < context <= config.max_context:
        raise GptOssError(f"max_context is {context}: this model's is 1 to {config.max_context}")
    spread = sharding.choose_mesh(mesh, config)
    apart = 1  # memories: a CPU's devices share theirs
    if spread is not None and jax.default_backend() != "cpu":
        apart = spread.size
    _check_room(config, dtype or "bfloat16", apart)
    params = random_params(
        config, dtype=dtype or "bfloat16", shardings=sharding.for_loading(spread)
    )
    params = for_kernels(params, spread)
    return Model(config, params, load_tokenizer(folder), context, source, spread)


def _check_room(config: GptOssConfig, dtype: str, devices: int) -> None:
    """Refuses what would not fit: a CPU that runs out of memory ends programs of other people."""
    needed = bounds.weights(config, {}, True, dtype).total
    free = free_memory()
    if free is not None and needed > devices * free:
        raise GptOssError(
            f"{needed / 1e9:.1f} GB of parameters: {devices * free / 1e9:.1f} GB of memory are "
            f"free; use fewer layers than {config.num_layers}, or more devices"
        )


def config_of(source: str, layers: int | None = None) -> tuple[GptOssConfig, Path | None]:
    """The config of a model, and its folder if it has one.

    Args:
      source: gpt-oss-20b, gpt-oss-120b, gpt-oss-tiny, or a checkpoint's folder.
      layers: Only the first so many.

    Raises:
      GptOssError: There is no such model, or not so many layers.
    """
    folder = None
    if source == hub.TINY or Path(source).expanduser().is_dir():
        folder = hub.resolve(source)
        config = checkpoint.open_checkpoint(folder).config
    else:
        config = GptOssConfig.preset(source)
    layers = config.num_layers if layers is None else layers
    if not 0 < layers <= config.num_layers:
        raise GptOssError(f"{layers} layers: {source} has 1 to {config.num_layers}")
    kinds = config.layer_types[:layers]
    return dataclasses.replace(config, num_layers=layers, layer_types=kinds), folder


def random_params(
    config: GptOssConfig,
    *,
    packed: bool = True,
    dtype: Any = jnp.bfloat16,
    shardings: checkpoint.Shardings | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """A parameter tree as `checkpoint.load_params` gives it, of random values.

    Made leaf by leaf and in place: beside the model it needs next to nothing. Accelerators draw
    their own, other values than a CPU would.

    Args:
      config: Sizes.
      packed: Experts in MXFP4, as released; else as all the rest.
      dtype: bfloat16 or float32, of everything that is not packed.
      shardings: As `load_params` takes them.
      seed: Same seed, same parameters, on any mesh of the same kind of devices.

    Raises:
      GptOssError: The type is another one.
    """
    dtype = np.dtype(dtype)
    if dtype not in PATTERNS:
        raise GptOssError(f"dtype {dtype.name!r}: parameters are held in 'bfloat16' or 'float32'")
    arrays = {}
    for number, leaf in enumerate(hf_names.leaves(config, "mxfp4" if packed else "bfloat16")):
        if jax.default_backend() != "cpu":
            where = None if shardings is None else shardings(leaf.path, leaf.letters)
            kind = np.dtype(np.uint8) if leaf.packed else dtype
            arrays[leaf.path] = draw(leaf.shape, kind, leaf.path[-1], seed + 1000 * number, where)
            continue
        values = aligned(leaf.shape, np.dtype(np.uint8) if leaf.packed else dtype)
        fill(values, leaf.path[-1], np.random.SFC64([seed, number]))
        if shardings is None:
            array = jax.device_put(values)
        else:
            where = shardings(leaf.path, leaf.letters)
            array = jax.make_array_from_callback(
                leaf.shape, where, lambda index, values=values: values[index], dtype=values.dtype
            )
        arrays[leaf.path] = array.block_until_ready()
    return checkpoint.tree(arrays)


def draw(shape: tuple[int, ...], dtype: Any, name: Any, seed: int, where: Any = None) -> jax.Array:
    """An array as `fill` makes it, drawn on the devices, each its own part: no copy, and at most
    64 KB of temporaries (gpt-oss's arrays, compiled for v6e).

    Args:
      shape: Fewer than 2^32 values.
      dtype: uint8, bfloat16 or float32.
      name: As `fill` takes it.
      seed: Same seed, same values.
      where: Sharding or layout; None for the default device.
    """
    return _program(where)(shape, np.dtype(dtype), name, jnp.uint32(seed)).block_until_ready()


def _program(where: Any) -> Any:
    return jax.jit(_drawn, static_argnums=(0, 1, 2), out_shardings=where)


def _drawn(shape, dtype, name, seed):
    if name == "norm":
        return jnp.ones(shape, dtype)
    number, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        number = number + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    # A mixing function of 32 bits (the finaliser of MurmurHash3).
    bits = number * jnp.uint32(0x9E3779B1) + seed * jnp.uint32(0x85EBCA77)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
    if dtype not in PATTERNS:
        return ((bits & 3) + 118 if name == "scales" else bits).astype(jnp.uint8)
    # Sign, lowest bit of the exponent and mantissa are random, the rest of the exponent is not:
    # magnitudes from 2^-7 to 2^-5, and nothing is computed in another type.
    word, kept = PATTERNS[dtype]
    size = dtype.itemsize * 8
    lowest = 1 << (size - 9)
    words = (bits.astype(word) & word(kept | lowest)) | word(0x3C << (size - 8))
    return jax.lax.bitcast_convert_type(words, dtype)


@functools.cache
def _exponents(dtype: np.dtype) -> np.ndarray:
    """Words with the exponents of normally distributed values and nothing else: how many of them
    are rare is what kernels/cpu/compact.py lives on.
    """
    values = np.random.Generator(np.random.SFC64(0)).normal(0, DEVIATION, 4 * PIECE).astype(dtype)
    word, rest = PATTERNS[dtype]
    return values.view(word) & word(~rest & (1 << dtype.itemsize * 8) - 1)


def fill(values: np.ndarray, name: Any, generator: np.random.SFC64) -> None:
    """Draws an array in place.

    Args:
      values: uint8 (MXFP4), bfloat16 or float32.
      name: "norm" makes ones, "scales" exponents from 2^-9 to 2^-6, anything else values whose
        magnitudes are about those of a normal distribution, or any bytes.
      generator: Where the bits come from.
    """
    if name == "norm":
        values[...] = 1
        return
    flat = values.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, PIECE):
        part = flat[start : start + PIECE]
        part[:] = generator.random_raw(-(-part.size // 8)).view(np.uint8)[: part.size]
        if name == "scales":
            part &= 3
            part += 118
        elif values.dtype in PATTERNS:
            word, kept = PATTERNS[values.dtype]
            bits, drawn = part.view(word), _exponents(values.dtype)
            first = int(generator.random_raw()) % (drawn.size - bits.size)
            bits &= kept
            bits |= drawn[first : first + bits.size]
