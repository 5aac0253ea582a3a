"""Computes something for many images on all cores: in processes, or for a few in threads.

Threads wait for each other in all that is not done by NumPy or OpenCV; processes take a second to
begin.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial

from threadpoolctl import ThreadpoolController, threadpool_limits

from defect_detection import PipelineError

MANY = 256  # images for which processes pay
AT_ONCE = 4  # images, or pairs of them, that a process takes

Map = Callable[..., Iterable]


@contextmanager
def started(images: int) -> Iterator[Map]:
    """Yield what calls a function for many arguments at once, as `map` does one after another.

    Args:
        images: about how many there are.

    Raises:
        PipelineError: a process was killed.
    """
    cores = os.cpu_count() or 1
    spawned = multiprocessing.get_context("spawn")
    try:
        with ExitStack() as stack:
            # Threads of BLAS would take the cores, even when they wait for work.
            stack.enter_context(_libraries().limit(limits=1))
            if images < MANY or cores == 1:
                yield stack.enter_context(ThreadPoolExecutor(cores)).map
            else:
                processes = stack.enter_context(ProcessPoolExecutor(cores, spawned, _begin))
                # What a signal left half handed out would be waited for without end.
                stack.callback(processes.shutdown, cancel_futures=True)
                yield partial(processes.map, chunksize=AT_ONCE)
    except BrokenProcessPool as error:
        raise PipelineError(
            "A process that compares images was killed, perhaps since memory is short. Run this "
            "again: what was found is kept"
        ) from error


def _libraries() -> ThreadpoolController:
    # In another thread: it calls Python from C, where an exception of a signal would be lost.
    with ThreadPoolExecutor(1) as other:
        return other.submit(ThreadpoolController).result()


def _begin() -> None:
    """Prepare a process: it uses one core, and ends when the one that started it does."""
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
