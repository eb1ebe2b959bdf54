"""From a name or a folder to a Model: its files, its devices, its adapters, and where compiled
programs are kept.

Knows what is chosen where nobody chose: type, mesh, context. Knows nothing of what files hold
(checkpoint/, adapters/) and nothing of generating.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gptoss_jax import adapters as files
from gptoss_jax import checkpoint, hub, libtpu, lora, sharding
from gptoss_jax.engine import Model
from gptoss_jax.errors import GptOssError
from gptoss_jax.hub import TINY
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import Params
from gptoss_jax.tokenizer import load_tokenizer

SMALL_BYTES = 1 << 30  # below it a CPU computes in float32: faster there, and exact to the tests


def load(
    source: str | os.PathLike[str] = TINY,
    *,
    mesh: sharding.Sizes | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Model:
    """Loads a model.

    Args:
      source: "gpt-oss-tiny" (in the package), a Hub id such as "openai/gpt-oss-20b", or a folder:
        Hugging Face's layout (MXFP4 or bfloat16), OpenAI's original one, or an Orbax checkpoint
        made by `gptoss convert`.
      mesh: Devices to spread it over, by axes of sharding.py: {"expert": 4, "data": 2}, the same as
        text ("expert=4,data=2"), or a jax.sharding.Mesh; {} for one device. By default all
        accelerators, as `sharding.default_sizes` says; on CPU one device.
      dtype: "bfloat16" or "float32", of everything that is not packed MXFP4; by default bfloat16,
        except that a CPU takes float32 for models below 1 GiB.
      max_context: Longest sequence, in tokens; by default the model's.
      revision: Branch, tag or commit on the Hub.
      offline: Use only what the Hub's cache already holds.
      adapters: Name -> folder of an adapter: what `gptoss finetune` or `adapters.save` wrote, or
        peft's; requests choose by name.
      progress: Called with each parameter's name and bytes when it is there.

    Returns:
      The model.

    Raises:
      GptOssError: The source cannot be found or does not hold a gpt-oss model, the mesh does not
        fit it or the devices, or an adapter is damaged or of another base; the message says what
        to do.
    """
    libtpu.hush()
    use_compilation_cache()
    folder = hub.resolve(source, revision=revision, offline=offline)
    if dtype not in (None, "bfloat16", "float32"):
        raise GptOssError(f"dtype {dtype!r}: expected 'bfloat16' or 'float32'")
    if dtype is None:
        small = (
            sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            < SMALL_BYTES
        )
        dtype = "float32" if small and jax.default_backend() == "cpu" else "bfloat16"
    spread = sharding.choose_mesh(mesh, checkpoint.open_checkpoint(folder).config)
    config, params = checkpoint.load_params(
        folder,
        dtype=jnp.dtype(dtype),
        shardings=sharding.for_loading(spread),
        progress=progress,
    )
    if max_context is not None and not 0 < max_context <= config.max_context:
        raise GptOssError(
            f"max_context is {max_context}: this model's context is 1 to {config.max_context}"
        )
    tokenizer = load_tokenizer(folder)
    context = max_context or config.max_context
    model = Model(config, params, tokenizer, context, str(source), spread)
    return with_adapters(model, adapters) if adapters else model


def with_adapters(model: Model, adapters: Mapping[str, str | os.PathLike[str]]) -> Model:
    """The same model with these adapters, in the place of those it had; the base is not copied.

    Args:
      model: What `load` gave.
      adapters: Name -> folder, as in `load`.

    Raises:
      GptOssError: As `load`.
    """
    base = model._on_mesh(files.fingerprint, model.config, model.params)
    loaded = {}
    for name, folder in adapters.items():
        adapter = files.load(folder, model.config, fingerprint=base)
        loaded[name] = adapter.tree, adapter.lora
    return with_stack(model, loaded)


def with_stack(model: Model, adapters: Mapping[str, tuple[Params, LoraConfig]]) -> Model:
    """The same model with these adapters from memory, in the place of those it had; the base is not
    copied.

    Args:
      model: What `load` gave.
      adapters: Name -> tree of arrays that this process can read whole, and its config.
    """

    def put(path, letters, array):
        if model.mesh is None:
            return jnp.asarray(array)
        where = NamedSharding(model.mesh, sharding.parameter_spec(path, letters))
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    stack = lora.stack(adapters, model.params["embedding"].dtype, put)
    return dataclasses.replace(model, adapters=stack)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX has been told where to, or
    GPTOSS_COMPILATION_CACHE is "off".

    The place is $GPTOSS_COMPILATION_CACHE, by default ~/.cache/gptoss_jax/xla (XDG_CACHE_HOME is
    followed).
    """
    place = os.environ.get("GPTOSS_COMPILATION_CACHE")
    if place == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", place or str(home / "gptoss_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
