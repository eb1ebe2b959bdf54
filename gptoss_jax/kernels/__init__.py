"""Fast paths of the operations, one package for each kind of device: arrays in, arrays out.

    cpu    C++ through XLA's foreign functions, compiled at first use: packed and bfloat16 products
    tpu    Pallas: experts and attention; holds the experts in a layout of its own, made at load
    gpu    Pallas-Triton: experts and attention, on the released bytes

What an operation is, ops/ says; so it does which of these computes it. Knows no config, no
parameter path, no mesh.
"""
