"""From one checkpoint to another: any layout to Orbax or Hugging Face's, in bounded memory.

Installed as gptoss_jax.convert. Knows what changes on the way (experts packed or unpacked,
vocabulary pruned) and the order of work; the formats are those of gptoss_jax.checkpoint, the names
those of gptoss_jax.hf_names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gptoss_jax.convert import export
from gptoss_jax.convert.experts import pack, unpack
from gptoss_jax.convert.merge import Kept as Kept
from gptoss_jax.convert.merge import merge as merge
from gptoss_jax.convert.prune import prune

from gptoss_jax import checkpoint, tokenizer
from gptoss_jax.checkpoint import store
from gptoss_jax.checkpoint.stored import new_folder
from gptoss_jax.errors import GptOssError


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["orbax", "hf"] = "orbax",
    dtype: Literal["mxfp4", "bfloat16"] | None = None,
    keep_tokens: str | Path | None = None,
    overwrite: bool = False,
    origin: str | None = None,
    revision: str | None = None,
    progress: Callable[[str, int], None] | None = None,
    total: Callable[[int], None] | None = None,
    notice: Callable[[str], None] = print,
) -> Path:
    """Converts a checkpoint; the new folder appears whole or not at all.

    MXFP4 bytes are copied as they are; bfloat16 experts are packed only when dtype is "mxfp4", and
    a notice says so. Arrays of an Orbax source are compared with their checksums on the way, scales
    of other sources with NaN.

    Args:
      source: Local folder in any layout.
      target: Folder to make.
      to: "orbax" (ours) or "hf" (Hugging Face's layout).
      dtype: How the experts are held: "mxfp4" or "bfloat16"; None keeps the source's.
      keep_tokens: File of o200k_harmony ids, one a line, that the vocabulary is pruned to; the 256
        bytes and the harmony control tokens are always kept.
      overwrite: Replace a checkpoint at the target.
      origin: What the manifest names as source; the folder when None.
      revision: The source's commit, for the manifest.
      progress: Called with a parameter's name and bytes after each.
      total: Called once with the number of bytes to come.
      notice: Called with a sentence that the user should see.

    Returns:
      The new folder.

    Raises:
      GptOssError: The source is incomplete or damaged, the target exists, or the disk is full.
    """
    if to not in ("orbax", "hf"):
        raise GptOssError(f"cannot convert to {to!r}: choose 'orbax' or 'hf'")
    if dtype not in (None, "mxfp4", "bfloat16"):
        raise GptOssError(f"cannot hold experts in {dtype!r}: choose 'mxfp4' or 'bfloat16'")
    opened = checkpoint.open_checkpoint(source)
    opened.check()
    target = Path(target).expanduser()
    config, arrays = opened.config, opened.arrays()
    kept_file = opened.folder / tokenizer.KEPT_FILE
    kept = tokenizer.read_kept(kept_file) if kept_file.exists() else None
    if keep_tokens is not None:
        wanted = tokenizer.kept_ids(tokenizer.read_kept(keep_tokens))
        config, arrays, kept = prune(config, arrays, wanted, kept)
    packed = any(array.path[-1] == "blocks" for array in arrays)
    if dtype == "bfloat16" and packed:
        arrays = unpack(arrays)
    elif dtype == "mxfp4" and not packed:
        notice("the source holds bfloat16 experts: they are packed to MXFP4, which rounds them")
        arrays = pack(arrays)
    size = sum(array.nbytes for array in arrays)
    with new_folder(target, overwrite=overwrite, needed=size) as folder:
        if total:
            total(size)
        if to == "orbax":
            names = {"source": origin or str(source), "revision": revision}
            store.write(folder, config, arrays, progress=progress, **names)
        else:
            export.write(folder, config, arrays, progress=progress)
        export.copy_companions(opened.folder, folder, kept)
    return target
