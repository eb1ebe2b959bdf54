"""Rows of a table."""

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
