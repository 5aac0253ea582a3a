"""The calls that start, show and cancel retrainings."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from flask import Blueprint, Response, abort, jsonify, request, url_for

from defect_detection import PipelineError, settings
from defect_detection.service.jobs import Busy, Job, Jobs
from defect_detection.settings import RetrainOverrides

T = TypeVar("T")

Answer = Response | tuple[Response, int, dict[str, str]]


def blueprint(jobs: Jobs) -> Blueprint:
    """Return the calls under /retrain."""
    calls = Blueprint("retraining", __name__)

    @calls.post("/retrain")
    def start() -> Answer:
        try:
            job = jobs.start(_read_overrides())
        except Busy as busy:
            answer = {"message": f"The job {busy.job.id} is running", "job": _describe(busy.job)}
            return jsonify(status=409, **answer), 409, {"Location": _address(busy.job)}
        if request.args.get("wait", "").lower() in ("true", "1", "yes"):
            job = jobs.wait(job.id)
            status = 200 if job.state == "succeeded" else 500
            return jsonify(_describe(job)), status, {"Location": _address(job)}
        return jsonify(_describe(job)), 202, {"Location": _address(job)}

    @calls.get("/retrain")
    def every() -> Answer:
        return jsonify([_describe(job) for job in jobs.all()])

    @calls.get("/retrain/<job_id>")
    def one(job_id: str) -> Answer:
        return jsonify(_describe(_find(jobs.get, job_id)))

    @calls.get("/retrain/<job_id>/log")
    def output(job_id: str) -> Answer:
        return Response(_find(jobs.log, job_id), mimetype="text/plain")

    @calls.delete("/retrain/<job_id>")
    def cancel(job_id: str) -> Answer:
        return jsonify(_describe(_find(jobs.cancel, job_id)))

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


def _find(look_up: Callable[[str], T], job_id: str) -> T:
    """Look a job up, or end the call with 404."""
    try:
        return look_up(job_id)
    except KeyError:
        abort(404, f"There is no job {job_id}. GET /retrain lists them")


def _describe(job: Job) -> dict[str, Any]:
    return asdict(job) | {"log": url_for("retraining.output", job_id=job.id)}


def _address(job: Job) -> str:
    return url_for("retraining.one", job_id=job.id)
