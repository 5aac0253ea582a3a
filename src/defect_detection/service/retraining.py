"""The calls that start, show and cancel retrainings."""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from flask import Blueprint, Response, abort, g, jsonify, request, url_for

from defect_detection import PipelineError, settings
from defect_detection.names import printable
from defect_detection.service import job_files
from defect_detection.service.job_files import Job
from defect_detection.service.jobs import Busy, Jobs
from defect_detection.settings import RetrainOverrides

log = logging.getLogger(__name__)

T = TypeVar("T")

Answer = Response | tuple[Response, int, dict[str, str]]

PAGE, LARGEST_PAGE = 50, 500  # jobs
LONGEST_ECHO = 60  # characters of an unknown id that are repeated


def blueprint(jobs: Jobs) -> Blueprint:
    """Return the calls under /retrain."""
    calls = Blueprint("retraining", __name__)

    @calls.post("/retrain")
    def start() -> Answer:
        overrides = _read_overrides()
        try:
            job = jobs.start(overrides, g.caller)
        except Busy as busy:
            return _conflict(f"The job {busy.job.id} is running", busy.job)
        except (OSError, PipelineError) as error:
            log.exception("No retraining could be started")
            reason = getattr(error.__cause__ or error, "strerror", None) or "see the API's log"
            abort(503, f"No retraining could be started: {reason}")
        if request.args.get("wait", "").lower() in ("true", "1", "yes"):
            job = _find(jobs.wait, job.id)
            status = 200 if job.state == "succeeded" else 500
            return jsonify(_describe(job)), status, {"Location": _address(job)}
        return jsonify(_describe(job)), 202, {"Location": _address(job)}

    @calls.get("/retrain")
    def page() -> Answer:
        limit, before = _read_page()
        found = jobs.all(limit + 1, before)  # one more shows whether there is a next page
        answer = jsonify([_describe(job) for job in found[:limit]])
        if len(found) > limit:
            following = url_for("retraining.page", limit=limit, before=found[limit - 1].id)
            answer.headers["Link"] = f'<{following}>; rel="next"'
        return answer

    @calls.get("/retrain/<job_id>")
    def one(job_id: str) -> Answer:
        return jsonify(_describe(_find(jobs.get, job_id)))

    @calls.get("/retrain/<job_id>/log")
    def output(job_id: str) -> Answer:
        return Response(_find(jobs.log, job_id), mimetype="text/plain")

    @calls.delete("/retrain/<job_id>")
    def cancel(job_id: str) -> Answer:
        job = _find(lambda known: jobs.cancel(known, g.caller), job_id)
        if job.state == "running":
            return _conflict(f"The process of the job {job.id} could not be ended", job)
        return jsonify(_describe(job))

    return calls


def _read_overrides() -> RetrainOverrides:
    """Read the parameters from the body, which may be empty; end the call with 400 if wrong."""
    body = request.get_data()
    if not body.strip():
        return RetrainOverrides()
    try:
        return settings.parse_json(body, RetrainOverrides, "The body")
    except PipelineError as error:
        abort(400, str(error))


def _read_page() -> tuple[int, str | None]:
    """Read how many jobs are asked for, and before which; end the call with 400 if wrong."""
    limit, before = request.args.get("limit", str(PAGE)), request.args.get("before")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= LARGEST_PAGE:
        abort(
            400,
            f"limit is {printable(limit, LONGEST_ECHO)}, expected a whole number from 1 to "
            f"{LARGEST_PAGE}",
        )
    if before is not None and not job_files.is_id(before):
        abort(400, f"before is {printable(before, LONGEST_ECHO)}, expected the id of a job")
    return int(limit), before


def _find(look_up: Callable[[str], T], job_id: str) -> T:
    """Look a job up, or end the call with 404."""
    try:
        return look_up(job_id)
    except KeyError:
        shown = printable(job_id, LONGEST_ECHO)
        abort(404, f"There is no job {shown}. GET /retrain lists them")


def _conflict(message: str, job: Job) -> Answer:
    answer = jsonify(status=409, message=message, job=_describe(job))
    return answer, 409, {"Location": _address(job)}


def _describe(job: Job) -> dict[str, Any]:
    return asdict(job) | {"log": url_for("retraining.output", job_id=job.id)}


def _address(job: Job) -> str:
    return url_for("retraining.one", job_id=job.id)
