"""What a training process asks of the C library's memory."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT = 128 << 20  # bytes


def keep_freed() -> bool:
    """Asks glibc to keep blocks of up to 128 MB that are freed, instead of giving them back.

    XLA allocates a step's temporary memory as one block on CPUs and frees it after: given back, it
    comes anew as pages that are zeroed one by one, a fifth of a step of gpt-oss-tiny. For the whole
    process.

    Returns:
      Whether this C library knows how.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(MMAP_THRESHOLD, KEPT)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
