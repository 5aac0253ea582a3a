"""The calls that start, show and cancel retrainings."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

from flask import Response, abort, g, jsonify, request, url_for
from flask_openapi3 import APIBlueprint, Tag
from pydantic import BaseModel, Field, TypeAdapter

from defect_detection import PipelineError, settings
from defect_detection.names import printable
from defect_detection.service import job_files
from defect_detection.service.changes import Changes
from defect_detection.service.job_files import Job
from defect_detection.service.jobs import Busy, Jobs
from defect_detection.service.refusal import refusals
from defect_detection.settings import RetrainOverrides

log = logging.getLogger(__name__)

T = TypeVar("T")

Answer = Response | tuple[Response, int, dict[str, str]]

PAGE, LARGEST_PAGE = 50, 500  # jobs
LONGEST_ECHO = 60  # characters of an unknown id that are repeated


BODY = {
    "requestBody": {
        "required": False,
        "description": "Parameters that replace those of re_train.yaml in this job",
        "content": {"application/json": {"schema": TypeAdapter(RetrainOverrides).json_schema()}},
    }
}


class JobPath(BaseModel):
    """The job that a call is about."""

    job_id: str = Field(description="id of the job")


class Start(BaseModel):
    """How a retraining is started."""

    wait: bool = Field(False, description="answer when the job has ended")


class Page(BaseModel):
    """Which jobs are asked for."""

    limit: int = Field(PAGE, ge=1, le=LARGEST_PAGE, description="how many, the newest first")
    before: str | None = Field(None, pattern=job_files.ID, description="only those before this one")


TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}


def _answer(kind: type) -> dict[str, Any]:
    """Return how the document describes an answer in JSON."""
    return {"content": {"application/json": {"schema": TypeAdapter(kind).json_schema()}}}


def blueprint(jobs: Jobs, changes: Changes) -> APIBlueprint:
    """Return the calls under /retrain."""
    calls = APIBlueprint("retraining", __name__, abp_tags=[Tag(name="retraining")])

    @calls.post(
        "/retrain",
        summary="Start a retraining",
        openapi_extensions=BODY,
        responses={**refusals(409, 413, 500, 503), 200: _answer(Job), 202: _answer(Job)},
    )
    def start(query: Start) -> Answer:
        job = begin(jobs, changes, _read_overrides())
        if query.wait:
            job = find(jobs.wait, job.id)
            status = 200 if job.state == "succeeded" else 500
            return jsonify(_describe(job)), status, {"Location": _address(job)}
        return jsonify(_describe(job)), 202, {"Location": _address(job)}

    @calls.get(
        "/retrain", summary="The newest retrainings", responses={**refusals(), 200: _answer(list)}
    )
    def page(query: Page) -> Answer:
        return _page(jobs, query)

    @calls.get(
        "/retrain/<job_id>",
        summary="A retraining",
        responses={**refusals(404), 200: _answer(Job)},
    )
    def one(path: JobPath) -> Answer:
        return jsonify(_describe(find(jobs.get, path.job_id)))

    @calls.get(
        "/retrain/<job_id>/log", summary="Its output", responses={**refusals(404), 200: TEXT}
    )
    def output(path: JobPath) -> Answer:
        return Response(find(jobs.log, path.job_id), mimetype="text/plain")

    @calls.delete(
        "/retrain/<job_id>",
        summary="Cancel it",
        responses={**refusals(404, 409), 200: _answer(Job)},
    )
    def cancel(path: JobPath) -> Answer:
        return jsonify(_describe(end(jobs, changes, path.job_id)))

    return calls


def _page(jobs: Jobs, query: Page) -> Response:
    found = jobs.all(query.limit + 1, query.before)  # one more shows whether there is more
    answer = jsonify([_describe(job) for job in found[: query.limit]])
    if len(found) > query.limit:
        last = found[query.limit - 1].id
        following = url_for("retraining.page", limit=query.limit, before=last)
        answer.headers["Link"] = f'<{following}>; rel="next"'
    return answer


def begin(jobs: Jobs, changes: Changes, overrides: RetrainOverrides) -> Job:
    """Start a retraining for the current caller; end the call with 409 or 503 if that fails."""
    by = g.caller.described
    try:
        with changes.recorded(by, "retrain", parameters=overrides.given()):
            return jobs.start(overrides, by)
    except Busy as busy:
        abort(_conflict(f"The job {busy.job.id} is running", busy.job))
    except (OSError, PipelineError) as error:
        log.exception("No retraining could be started")
        reason = getattr(error.__cause__ or error, "strerror", None) or "see the API's log"
        abort(503, f"No retraining could be started: {reason}")


def end(jobs: Jobs, changes: Changes, job_id: str) -> Job:
    """Cancel a retraining for the current caller; end the call with 404 or 409 if that fails."""
    by = g.caller.described
    find(jobs.get, job_id)
    with changes.recorded(by, "cancel", job=job_id):
        job = find(lambda known: jobs.cancel(known, by), job_id)
    if job.state == "running":
        abort(_conflict(f"The process of the job {job.id} could not be ended", job))
    return job


def _read_overrides() -> RetrainOverrides:
    """Read the parameters from the body, which may be empty; end the call with 400 if wrong."""
    body = request.get_data()
    if not body.strip():
        return RetrainOverrides()
    try:
        return settings.parse_json(body, RetrainOverrides, "The body")
    except PipelineError as error:
        abort(400, str(error))


def find(look_up: Callable[[str], T], job_id: str) -> T:
    """Look a job up, or end the call with 404."""
    try:
        return look_up(job_id)
    except KeyError:
        shown = printable(job_id, LONGEST_ECHO)
        abort(404, f"There is no job {shown}. GET /retrain lists them")


def _conflict(message: str, job: Job) -> Response:
    answer = jsonify(status=409, message=message, job=_describe(job))
    answer.status_code = 409
    answer.headers["Location"] = _address(job)
    return answer


def _describe(job: Job) -> dict[str, Any]:
    return asdict(job) | {"log": url_for("retraining.output", job_id=job.id)}


def _address(job: Job) -> str:
    return url_for("retraining.one", job_id=job.id)
