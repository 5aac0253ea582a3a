"""The API and the pages as a Flask application."""

import logging

from flask import Flask, Response, jsonify, request
from flask_openapi3 import Info, OpenAPI
from flask_wtf.csrf import CSRFError  # type: ignore[import-untyped]
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from defect_detection import PipelineError
from defect_detection.dataset.inbox import Refused
from defect_detection.names import printable
from defect_detection.service import (
    health,
    images,
    job_pages,
    labels,
    line,
    models,
    monitoring,
    pages,
    predict,
    retraining,
    review,
)
from defect_detection.service.access import Role, needs
from defect_detection.service.backend import Backend

log = logging.getLogger("api")

LONGEST_ECHO = 60  # characters of a wrong value that are repeated
VERSION = "2"  # of the API


def create_app(backend: Backend) -> Flask:
    """Return the application."""
    app = OpenAPI(
        __name__,
        info=Info(title="defect-detection", version=VERSION),
        doc_ui=False,
        security_schemes={"token": {"type": "http", "scheme": "bearer"}},
        validation_error_callback=_refuse_value,
        static_folder=None,
    )
    app.json.sort_keys = False  # type: ignore[attr-defined]  # of Flask's default provider
    backend.access.attach(app)
    monitoring.attach(app, backend)
    app.register_api(predict.blueprint(backend.serving, backend.log))
    app.register_api(retraining.blueprint(backend.jobs, backend.changes))
    app.register_api(health.blueprint(backend))
    pages.attach(app, backend)
    for made in (line, images, review, labels, models, job_pages):
        app.register_blueprint(made.blueprint(backend))

    @app.get("/openapi.json", doc_ui=False)
    @needs(Role.NOBODY)
    def openapi() -> Response:
        return jsonify(app.api_doc)

    app.register_error_handler(HTTPException, _refuse)
    app.register_error_handler(PipelineError, _explain)
    app.register_error_handler(Exception, _fail)
    return app


def _refuse_value(error: ValidationError) -> Response:
    """Answer a call with a wrong value: 400, and what is expected."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    given = printable(str(first["input"]), LONGEST_ECHO)
    answer = jsonify(status=400, message=f"{where} is {given}: {first['msg']}")
    answer.status_code = 400
    return answer


def _refuse(error: HTTPException) -> Response:
    """Answer with an error's reason, as a page or as JSON."""
    if isinstance(error, CSRFError):
        told = "This page is older than your sign-in, or not of this site. Load it again"
        return pages.refusal(400, f"{told} ({error.description})")
    if error.response is not None:
        return error.response  # type: ignore[return-value]
    answer = pages.refusal(error.code or 500, error.description or "")
    if error.code == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if error.code in (429, 503):
        answer.headers["Retry-After"] = "5"
    return answer


def _explain(error: PipelineError) -> Response:
    """Answer with an error that has a reason: 409 if the caller can mend it, else 503."""
    if not isinstance(error, Refused):
        log.warning("%s %s: %s", request.method, request.path, error)
    return pages.refusal(409 if isinstance(error, Refused) else 503, str(error))


def _fail(error: Exception) -> Response:
    log.exception("%s %s failed", request.method, request.path)
    return pages.refusal(500, "Internal error; the API's log has the details")
