"""What of this machine a process may use, and how it keeps it."""

import ctypes
import os
import sys

# parameters of glibc's mallopt, from malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def available_processors() -> int:
    """Processors that this process may use: a job's share where it has one, else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next allocation; glibc alone needs it, elsewhere nothing happens.

    glibc gives large pieces back to the system at once. A training step on the CPU allocates the same ones again, and
    the system maps and clears every page anew: a fifth of a ResNet-50's time at 384 x 1248. Settings of the user's own
    stay.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # older versions take 32 MiB at most
    if mallopt is not None and (mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
