"""Rows of a table, and rows of a cache."""

import jax
from jaxtyping import Array, Float, Int


def table_rows(table_VD: Float[Array, "V D"], ids_R: Int[Array, " R"]) -> Float[Array, "R D"]:
    """Copies rows of a table of any type.

    Args:
      table_VD: The table.
      ids_R: int32; clamped to the table.
    """
    out = jax.ShapeDtypeStruct((*ids_R.shape, table_VD.shape[1]), table_VD.dtype)
    return jax.ffi.ffi_call("gptoss_rows", out, vmap_method="sequential")(table_VD, ids_R)


def store_rows(
    stored_BSKH: Float[Array, "B S K H"],
    new_BTKH: Float[Array, "B T K H"],
    slots_BT: Int[Array, "B T"],
) -> Float[Array, "B S K H"]:
    """Stores new rows in their slots, in place where XLA lets the argument go.

    Args:
      stored_BSKH: Any type.
      new_BTKH: Of the same type.
      slots_BT: int32; a slot below 0, or of S or more, stores nothing.
    """
    out = jax.ShapeDtypeStruct(stored_BSKH.shape, stored_BSKH.dtype)
    call = jax.ffi.ffi_call(
        "gptoss_store", out, input_output_aliases={0: 0}, vmap_method="sequential"
    )
    return call(stored_BSKH, new_BTKH.astype(stored_BSKH.dtype), slots_BT)
