"""The call that shows whether everything works."""

import logging
import math
import os
from typing import Any

from flask import Blueprint, Response, jsonify

from defect_detection import PipelineError
from defect_detection.registry import store as stores
from defect_detection.registry import versions
from defect_detection.service.jobs import Jobs

log = logging.getLogger(__name__)

ANSWER_WITHIN = 2  # seconds, for the tracking server


def blueprint(jobs: Jobs, store: str, registered_model: str) -> Blueprint:
    """Return the call /health.

    Args:
        jobs: the retrainings.
        store: URI of the tracking store.
        registered_model: the one whose production version is shown.
    """
    calls = Blueprint("health", __name__)

    @calls.get("/health")
    def health() -> Response:
        running = jobs.running()
        reachable, version = _production(store, registered_model)
        return jsonify(
            service="defect-detection",
            pid=os.getpid(),
            store="reachable" if reachable else "unreachable",
            production=version,
            job=running.id if running else None,
        )

    return calls


def _production(store: str, registered_model: str) -> tuple[bool, dict[str, Any] | None]:
    """Return whether the store answers, and the version in production, None if there is none."""
    try:
        with stores.connected(store, ANSWER_WITHIN):
            found = versions.in_production(registered_model)
    except PipelineError as error:
        log.warning("%s", error)
        return False, None
    if found is None:
        return True, None
    acc = None if math.isnan(found.acc) else found.acc  # JSON has no NaN
    return True, {"registry": found.name, "version": found.number, "acc": acc}
