"""Asks the tracking store for the pages, none of which waits for long."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import TypeVar

from defect_detection import StoreError
from defect_detection.registry import store as stores

ANSWER_WITHIN = 5  # seconds

T = TypeVar("T")


class StoreDesk:
    """Asks the tracking store, one question at a time, so that no page waits for long."""

    def __init__(self, uri: str):
        """Ask the store at a URI."""
        self._uri = uri
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store desk")

    def ask(self, question: Callable[[], T], seconds: float = ANSWER_WITHIN) -> T:
        """Return the answer to a question.

        Raises:
            StoreError: the store does not answer in time.
        """

        def connected() -> T:
            with stores.connected(self._uri, ANSWER_WITHIN):
                return question()

        try:
            return self._pool.submit(connected).result(seconds)
        except Late as error:
            raise StoreError("The tracking store does not answer. Try again in a moment") from error
