"""Asks the tracking store for the pages, none of which waits for long."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any, TypeVar

from defect_detection import StoreError
from defect_detection.registry import store as stores

ANSWER_WITHIN = 5  # seconds
MOST_WAITING = 4  # calls; each holds a thread of the server

T = TypeVar("T")


class StoreDesk:
    """Asks the tracking store, one question at a time."""

    def __init__(self, uri: str):
        """Ask the store at a URI."""
        self._uri = uri
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._questions: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]]
        self._questions = queue.SimpleQueue()
        # A store that never answers holds up only this thread, and a daemon thread no exit.
        threading.Thread(target=self._answer_all, name="store desk", daemon=True).start()

    def ask(self, question: Callable[[], T], seconds: float = ANSWER_WITHIN) -> T:
        """Return the answer to a question.

        Raises:
            StoreError: the store does not answer in time, or too many calls wait for it.
        """
        if not self._places.acquire(blocking=False):
            raise StoreError("The tracking store answers slowly. Try again in a moment")
        try:
            answer: Future[T] = Future()
            self._questions.put((question, answer))
            try:
                return answer.result(seconds)
            except Late as error:
                begun = not answer.cancel()
                told = "; what was begun may still be carried out" if begun else ""
                raise StoreError(f"The tracking store does not answer{told}") from error
        finally:
            self._places.release()

    def _answer_all(self) -> None:
        while True:
            question, answer = self._questions.get()
            if not answer.set_running_or_notify_cancel():
                continue  # nobody waits for it any more
            try:
                with stores.connected(self._uri, ANSWER_WITHIN):
                    answer.set_result(question())
            except BaseException as error:
                answer.set_exception(error)
