"""Work that is spread over several processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm.auto import tqdm

from .errors import SimIPUError
from .machine import available_processors

MOST_PROCESSES = 61 if os.name == "nt" else 1024  # Windows waits for no more


def run_in_processes(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    num_proc: int | None,
    title: str,
    weight: Callable[[Any], int] = lambda item: 1,
    start_method: str | None = None,
) -> None:
    """`work(item)` for every item with a progress bar, on as many processes as are of use; the first error ends it.

    `weight(item)` is its number of rows, `start_method` as in `multiprocessing`.
    """
    processes = min(num_proc or available_processors(), len(items), MOST_PROCESSES)
    with tqdm(total=sum(map(weight, items)), desc=title, unit="row", disable=not items) as progress:
        if processes <= 1:
            for item in items:
                work(item)
                progress.update(weight(item))
            return
        context = multiprocessing.get_context(start_method)
        others = multiprocessing.active_children()
        with ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
            running = {pool.submit(work, item): item for item in items}
            try:
                for future in as_completed(running):
                    future.result()
                    progress.update(weight(running[future]))
            except BrokenProcessPool as error:
                raise SimIPUError(
                    f"{title}: one of {processes} processes ended without an answer: too little memory for so many "
                    "(ask for fewer; in training, have simipu-hf data convert --num_proc 1 prepare the rows), or a "
                    "script without if __name__ == '__main__'"
                ) from error
            except (KeyboardInterrupt, SystemExit):  # what is not finished begins anew
                for process in multiprocessing.active_children():
                    if process not in others:
                        process.terminate()
                raise
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever for its next item; one that is forked has its handlers."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
