"""Pallas kernels for TPUs: the experts' feed-forward and attention. Arrays in, arrays out.

Each has its definition in ops/ and the same numbers: float32 sums, bfloat16 between the products.
Dense bfloat16 projections have no kernel: XLA streams such weights at 80 to 90 % of a TPU's
bandwidth (kernel timings in tokamax's autotuning caches), which leaves nothing to win.
"""
