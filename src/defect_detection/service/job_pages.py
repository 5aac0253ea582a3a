"""The page of the retrainings: start one, see how far it is, read its output, cancel it."""

import json
from dataclasses import fields

from flask import Blueprint, abort, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from defect_detection import PipelineError, settings
from defect_detection.service import retraining
from defect_detection.service.access import Role, needs
from defect_detection.service.backend import Backend
from defect_detection.settings import RetrainOverrides

SHOWN = 30  # jobs
LAST_LINES = 200  # of a job's output
PARAMETERS = [one.name for one in fields(RetrainOverrides)]


def blueprint(backend: Backend) -> Blueprint:
    """Return the page of the jobs, and what it sends."""
    calls = Blueprint("job_pages", __name__, template_folder="templates")
    jobs = backend.jobs

    @calls.get("/jobs")
    def page() -> str:
        shown = jobs.all(SHOWN)
        wanted = request.args.get("job") or (shown[0].id if shown else None)
        job = retraining.find(jobs.get, wanted) if wanted else None
        lines = retraining.find(jobs.log, wanted).splitlines() if wanted else []
        return render_template(
            "jobs.html", jobs=shown, job=job, output="\n".join(lines[-LAST_LINES:])
        )

    @calls.post("/jobs")
    @needs(Role.ENGINEER)
    def start() -> Response:
        every = {name: request.form.get(name, "").strip() for name in PARAMETERS}
        given = {name: value for name, value in every.items() if value}
        try:
            overrides = settings.parse_json(_as_json(given), RetrainOverrides, "The form")
        except PipelineError as error:
            abort(400, str(error))
        running = jobs.running()  # as after a double click
        job = running or retraining.begin(jobs, backend.changes, overrides)
        return redirect(url_for("job_pages.page", job=job.id))

    @calls.post("/jobs/<job_id>/cancel")
    @needs(Role.ENGINEER)
    def cancel(job_id: str) -> Response:
        retraining.end(jobs, backend.changes, job_id)
        return redirect(url_for("job_pages.page", job=job_id))

    return calls


def _as_json(given: dict[str, str]) -> str:
    """Return a form's numbers as JSON; what is no number stays a text, which is then refused."""
    numbers: dict[str, object] = {}
    for name, text in given.items():
        try:
            numbers[name] = int(text) if text.isdecimal() else float(text)
        except ValueError:
            numbers[name] = text
    return json.dumps(numbers)
