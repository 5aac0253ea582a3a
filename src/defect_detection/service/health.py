"""The call that shows whether everything works."""

import logging
import math
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, jsonify

from defect_detection import PipelineError
from defect_detection.registry import promotion, versions
from defect_detection.registry import store as stores
from defect_detection.service.jobs import Jobs

log = logging.getLogger(__name__)

ANSWER_WITHIN = 2  # seconds, for the tracking server
LOOK_EVERY = 5  # seconds
GOOD_FOR = 20  # seconds; an older look does not count, and the store is "unreachable"
# For the environment of the API alone: MLflow waits two minutes for an answer, and retries.
MLFLOW_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@dataclass(frozen=True)
class Look:
    """What the store said.

    Attributes:
        reachable: whether it answers.
        production: registry, version and acc; None if no version is in production.
        at: when, in seconds of `time.monotonic`.
    """

    reachable: bool
    production: dict[str, Any] | None
    at: float


class StoreWatch:
    """Looks at the tracking store again and again, so that no call has to wait for it."""

    def __init__(self, uri: str, registered_model: str):
        """Know nothing of the store yet.

        Args:
            uri: of the store.
            registered_model: the one whose production version is shown.
        """
        self._uri, self._registered_model = uri, registered_model
        self._last = Look(False, None, -math.inf)
        self._troubled = False
        self._checked = False  # whether the record of the alias was read

    def begin(self, patience: float) -> None:
        """Look from now on, in a thread; wait for the first look, `patience` seconds at most."""
        seen = threading.Event()

        def watch() -> None:
            while True:
                self.look()
                seen.set()
                time.sleep(LOOK_EVERY)

        # A store that never answers holds up only this thread, and a daemon thread no exit.
        threading.Thread(target=watch, name="store", daemon=True).start()
        seen.wait(patience)

    def look(self) -> None:
        """Ask the store, however long that takes."""
        production, trouble = None, ""
        try:
            with stores.connected(self._uri, ANSWER_WITHIN):
                found = versions.in_production(self._registered_model)
                if not self._checked:
                    promotion.check_record(self._registered_model)
                    self._checked = True
            if found is not None:
                acc = None if math.isnan(found.acc) else found.acc  # JSON has no NaN
                production = {"registry": found.name, "version": found.number, "acc": acc}
        except PipelineError as error:
            trouble = str(error)
        except Exception as error:  # whatever it is, the next look must follow
            told = stores.without_password(repr(error))
            trouble = f"The store's answer cannot be understood: {told}"
        if trouble and not self._troubled:  # not at every look
            log.warning("%s", trouble)
        self._troubled = bool(trouble)
        self._last = Look(not trouble, production, time.monotonic())

    def last(self) -> Look:
        """Return the last look; one that is too old counts as unreachable."""
        last = self._last
        fresh = time.monotonic() - last.at < GOOD_FOR
        return last if fresh else Look(False, None, last.at)


def blueprint(jobs: Jobs, store: StoreWatch) -> Blueprint:
    """Return the call /health.

    Args:
        jobs: the retrainings.
        store: what is known of the tracking store.
    """
    calls = Blueprint("health", __name__)

    @calls.get("/health")
    def health() -> Response:
        running, last = jobs.running(), store.last()
        return jsonify(
            service="defect-detection",
            pid=os.getpid(),
            store="reachable" if last.reachable else "unreachable",
            production=last.production,
            job=running.id if running else None,
        )

    return calls
