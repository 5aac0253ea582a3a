"""The call that shows whether everything works."""

import logging
import math
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flask import Response, jsonify
from flask_openapi3 import APIBlueprint, Tag
from pydantic import BaseModel, Field

from defect_detection import PipelineError
from defect_detection.registry import promotion, versions
from defect_detection.registry import store as stores
from defect_detection.service.access import Role, needs

if TYPE_CHECKING:
    from defect_detection.service.backend import Backend

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
        self._soon = threading.Event()
        self._checked = False  # whether the record of the alias was read

    def begin(self, patience: float) -> None:
        """Look from now on, in a thread; wait for the first look, `patience` seconds at most."""
        seen = threading.Event()

        def watch() -> None:
            while True:
                self._soon.clear()
                self.look()
                seen.set()
                self._soon.wait(LOOK_EVERY)

        # A store that never answers holds up only this thread, and a daemon thread no exit.
        threading.Thread(target=watch, name="store", daemon=True).start()
        seen.wait(patience)

    def look_soon(self) -> None:
        """Look again at once, in that thread."""
        self._soon.set()

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


class Health(BaseModel):
    """Whether everything works."""

    service: str
    pid: int
    store: Literal["reachable", "unreachable"]
    production: dict[str, Any] | None = Field(description="registry, version and acc, by the store")
    model: str | None = Field(description="that judges now")
    trouble: str = Field(description="why no verdicts can be given, or not logged; else empty")
    unlogged: int = Field(description="verdicts that are not in the log, since the API began")
    job: str | None = Field(description="id of the running retraining")


def blueprint(backend: "Backend") -> APIBlueprint:
    """Return the call /health."""
    calls = APIBlueprint("health", __name__, abp_tags=[Tag(name="health")])

    @calls.get("/health", summary="Whether everything works", responses={200: Health})
    @needs(Role.NOBODY)
    def health() -> Response:
        running, last, model = backend.jobs.running(), backend.store.last(), backend.serving.model
        return jsonify(
            service="defect-detection",
            pid=os.getpid(),
            store="reachable" if last.reachable else "unreachable",
            production=last.production,
            model=model.name if model else None,
            trouble=backend.serving.trouble or backend.log.trouble,
            unlogged=backend.log.unlogged,
            job=running.id if running else None,
        )

    return calls
