"""Where a process has its memory, by the system's map of it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import ctypes
from photon_train.host_memory import keep_freed_memory

SIZE = 20 * 2**20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def heap():
    line = next(line for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
    return [int(end, 16) for end in line.split()[0].split("-")]

def is_on_heap(address):
    begin, end = heap()
    return begin <= address < end

mapped = libc.malloc(SIZE)
assert not is_on_heap(mapped), "by itself the C library maps what is large"
assert keep_freed_memory()
kept = libc.malloc(SIZE)
assert is_on_heap(kept)
end = heap()[1]
libc.free(kept)
assert heap()[1] == end, "what is freed at the heap's end is kept"
assert not is_on_heap(libc.malloc(2 * SIZE))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_on_the_heap():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
