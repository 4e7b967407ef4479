"""What a process keeps of freed memory, by the system's count of page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from photon_train.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    parts = [torch.ones(3 * 2**20) for _ in range(4)]  # 12 MiB each
    del parts

assert keep_freed_memory()
use()
before = faults()
for _ in range(5):
    use()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again():
    """20 allocations of 12 MiB touch 61,440 pages, of which none is new."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 2000
