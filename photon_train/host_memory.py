"""How a serving process keeps memory of the host."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h: from which size an allocation is mapped by itself, and how much free memory at the heap's end is
# given back. 32 MiB is the largest size that it takes.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, up to 32 MiB apiece, for its next allocation.

    A step on a CPU allocates and frees some megabytes hundreds of times. Given back to the system in between, every
    4 KiB of them costs a page fault, which takes longer than the arithmetic on it.

    Returns:
        False where the C library has no such setting (only glibc does), and nothing changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
