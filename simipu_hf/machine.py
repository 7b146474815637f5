"""What of this machine a process may use."""

import os


def available_processors() -> int:
    """Processors that this process may use: a job's share where it has one, else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
