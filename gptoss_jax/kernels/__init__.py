"""Fast paths of the operations, one package for each kind of device: arrays in, arrays out.

    cpu    C++ through XLA's foreign functions, compiled at first use: packed and bfloat16 products

What an operation is, ops/ says; so it does which of these computes it. Knows no config, no
parameter path, no mesh.
"""
