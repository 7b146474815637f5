"""The exceptions of this package, and how a command ends with them."""

import io
import os
import sys
from collections.abc import Callable
from typing import Any


class SimIPUError(ValueError):
    """Bad input. The message names the file, row or flag, what was expected and what was found."""


class TrainingInterrupted(Exception):  # noqa: N818 (nothing went wrong)
    """A signal ended the run after a finished step and a checkpoint; the message says how to continue."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(run: Callable[[], Any]) -> int:
    """Call `run` as a command and return its exit code; a user's mistake is one line, without a traceback.

    `SIMIPU_DEBUG=1` in the environment shows the traceback of a mistake as well.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot encode a character shows its escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        run()
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except (SimIPUError, OSError) as error:  # OSError: a full disk, a missing permission
        if os.environ.get("SIMIPU_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    _leave_process_group()  # after an error the others may wait in a collective: the launcher ends them
    return 0


def _leave_process_group() -> None:
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
