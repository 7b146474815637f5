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


NAME, VERSION = platform.libc_ver()


@pytest.mark.skipif(
    NAME != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="pieces of 48 MiB need a newer glibc"
)
def test_freed_memory_is_used_again():
    faults = [int(subprocess.check_output([sys.executable, "-c", ALLOCATE, *on])) for on in ([], ["on"])]
    assert faults[0] > 100 > 10 * faults[1], "page faults without and with keep_freed_memory"
