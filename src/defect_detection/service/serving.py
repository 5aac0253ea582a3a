"""The model that the API judges with: loaded in the background, replaced when prod moves."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from defect_detection import PipelineError
from defect_detection.inference.judge import Item, Judged, NamedModel, judge
from defect_detection.inference.production import Production
from defect_detection.service.health import StoreWatch

log = logging.getLogger("api")

LOOK_EVERY = 0.25  # seconds between two looks at what the store says
SOON = 5  # seconds after which the registry is asked again, if the alias moved
AGAIN = 60  # seconds after which a model that could not be loaded is tried again
MOST_WAITING = 32  # calls with images at a time
PATIENCE = 20  # seconds that a call waits for one
BEHIND_AFTER = 20  # seconds in which a version that got the alias should be loaded
TOO_MANY = "Too many calls wait for a verdict"


class NotServing(PipelineError):
    """No verdict can be given now; the message says why."""


class Serving:
    """Judges with the version in production, on as many cores as there are.

    Attributes:
        model: the loaded one, None if there is none.
        trouble: why there is none, or why it is not the newest.
    """

    def __init__(self, make: Callable[[], Production], store: StoreWatch):
        """Load nothing yet.

        Args:
            make: begins to ask which version is in production.
            store: what is known of the tracking store, which is looked at more often.
        """
        self.model: NamedModel | None = None
        self.trouble = "The model is being loaded"
        self._make, self._store = make, store
        self._asked_for: int | None = None  # the other version of which the registry was asked last
        self._other_since = math.inf
        self._production: Production | None = None
        self._cores = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._places = threading.BoundedSemaphore(MOST_WAITING)

    def begin(self) -> None:
        """Load the model, and follow the alias from now on, in a thread."""

        def follow() -> None:
            while True:
                try:
                    self._follow()
                except Exception as error:  # whatever it is, verdicts must go on
                    log.exception("The model in production cannot be followed")
                    self._give_up(repr(error))
                time.sleep(LOOK_EVERY)

        threading.Thread(target=follow, name="model", daemon=True).start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take one of the places for calls, each of which may hold many images in memory.

        Raises:
            NotServing: all are taken.
        """
        if not self._places.acquire(blocking=False):
            raise NotServing(TOO_MANY)
        try:
            yield
        finally:
            self._places.release()

    def judge(self, items: Sequence[Item]) -> list[Judged]:
        """Judge images, each on a core that no other call uses.

        Raises:
            NotServing: no model is loaded, or no core is free in time.
        """
        model = self.model
        if model is None:
            raise NotServing(self.trouble)
        found: list[Judged] = []
        for item in items:  # one by one, so that many images hold up nobody
            if not self._cores.acquire(timeout=PATIENCE):
                raise NotServing(TOO_MANY)
            try:
                found += judge(model, [item])
            finally:
                self._cores.release()
        return found

    def _follow(self) -> None:
        if self._production is None:
            if self._store_is_empty() and self.trouble == NOTHING:
                return
            self._production = self._make()
        try:
            if self.model is None:
                self.model = NamedModel.in_production(self._production)
            elif self._production.moved():
                self.model = self.model.followed(self._production)
            elif other := self._other():
                if self._production.ask(AGAIN if other == self._asked_for else SOON):
                    self._asked_for = other
            self.trouble = self._behind()
        except PipelineError as error:
            self._give_up(NOTHING if self._store_is_empty() else str(error))

    def _give_up(self, why: str) -> None:
        """Try again later; a loaded model goes on."""
        self.trouble = why
        if self.model is None and self._production is not None:
            self._production.close()
            self._production = None
        waited = 0.0
        while waited < AGAIN and self._store_is_empty() == (why == NOTHING):
            time.sleep(LOOK_EVERY)
            waited += LOOK_EVERY

    def _store_is_empty(self) -> bool:
        """Return whether the store answers and has no version in production."""
        last = self._store.last()
        return last.reachable and last.production is None

    def _other(self) -> int | None:
        """Return the version that the store names, None if it is the one that judges."""
        last, production = self._store.last().production, self._production
        if last is None or production is None or last["version"] == production.current().number:
            self._other_since = math.inf
            return None
        self._other_since = min(self._other_since, time.monotonic())
        return int(last["version"])

    def _behind(self) -> str:
        """Return that the version in production is not the one that judges, if it lasts."""
        other = self._other()
        if other is None or time.monotonic() - self._other_since < BEHIND_AFTER:
            return ""
        return f"Version {other} is in production, but cannot be loaded; see the API's log"


NOTHING = (
    "No version is in production yet. Train one with src/train.py, evaluate it with "
    "src/evaluation.py; a released one is served at once"
)
