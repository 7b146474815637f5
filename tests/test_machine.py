import platform
import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys
from simipu_hf.machine import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
def allocate():
    for _ in range(10):
        b"x" * (48 << 20)
allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    faults = [int(subprocess.check_output([sys.executable, "-c", ALLOCATE, *on])) for on in ([], ["on"])]
    assert faults[0] > 1000 > 10 * faults[1], "page faults without and with keep_freed_memory"
