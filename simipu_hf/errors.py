"""The exceptions of this package, and how a command ends with them."""

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .machine import keep_freed_memory

MAY_HANG = "may-hang"  # name of the daemon threads that a command does not wait for at its end
SIGTERM_CODE = 128 + signal.SIGTERM
AT_THE_END = contextlib.ExitStack()  # what a process removes, however it ends


@atexit.register
def clean_up() -> None:
    with contextlib.suppress(OSError):  # Windows removes no file that is mapped into memory
        AT_THE_END.close()


class SimIPUError(ValueError):
    """Bad input. The message names the file, row or flag, what was expected and what was found."""

    def __init__(self, message: object = "") -> None:
        message = str(message)
        # PyTorch raises a data-loading worker's error again with the text of its whole traceback
        if message.startswith("Caught SimIPUError in DataLoader worker") and not os.environ.get("SIMIPU_DEBUG"):
            message = message.rpartition(f"\n{__name__}.SimIPUError: ")[2].rstrip()
        super().__init__(message)


class TrainingInterrupted(Exception):  # noqa: N818 (nothing went wrong)
    """A signal ended the run after a finished step and a checkpoint; the message says how to continue."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """What a library's error says first; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_code_of(run: Callable[[], Any]) -> int:
    """Call `run` as a command and return its exit code; a user's mistake is one line, without a traceback.

    `SIMIPU_DEBUG=1` in the environment shows the traceback of a mistake as well.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot encode a character shows its escape
            setattr(sys, name, OptionalReader(stream))
    keep_freed_memory()
    code = 0
    try:
        with _cleaning_up_on_sigterm():
            run()
    except TrainingInterrupted as stopped:
        print(stopped, file=sys.stderr)
        code = stopped.exit_code
    except (SimIPUError, OSError) as error:  # OSError: a full disk, a missing permission
        if os.environ.get("SIMIPU_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except SystemExit as stopped:
        if stopped.code != SIGTERM_CODE:
            raise
        code = SIGTERM_CODE
    else:
        _leave_process_group()  # after an error the others may wait in a collective: the launcher ends them
    if any(thread.name == MAY_HANG for thread in threading.enumerate()):
        clean_up()
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed
            stream.flush()
        os._exit(code)  # the interpreter's own end would kill the thread, and some C code then aborts the process
    return code


@contextlib.contextmanager
def _cleaning_up_on_sigterm() -> Iterator[None]:
    """Else SIGTERM would end a command at once, its worker processes and unfinished files left behind.

    Not of a launched process, which may be in a collective that never returns to Python: its launcher ends it.
    """
    if threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_CODE))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class OptionalReader:
    """A text stream that goes on without its reader: a run must end as it should when its terminal is closed, or when
    the Ctrl-C that it is to save after has ended the `tee` behind it first."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._without_reader():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        """What cannot be written because nobody reads it any more goes nowhere, and so does all that follows."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EINVAL):  # a pipe, a terminal, a pipe of Windows
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _leave_process_group() -> None:
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
