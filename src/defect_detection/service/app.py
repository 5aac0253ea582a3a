"""The API as a Flask application."""

import logging

from flask import Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from defect_detection.service import access, health, retraining
from defect_detection.service.health import StoreWatch
from defect_detection.service.jobs import Jobs

log = logging.getLogger("api")

LARGEST_BODY = 16 * 1024  # bytes


def create_app(jobs: Jobs, store: StoreWatch, token: str | None) -> Flask:
    """Return the application.

    Args:
        jobs: the retrainings.
        store: what is known of the tracking store.
        token: that changing calls must bear; None if they must come from this machine.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app.json.sort_keys = False  # type: ignore[attr-defined]  # of Flask's default provider
    app.before_request(lambda: access.guard(token))
    app.register_blueprint(retraining.blueprint(jobs))
    app.register_blueprint(health.blueprint(jobs, store))

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> tuple[Response, int, dict[str, str]]:
        headers = {"WWW-Authenticate": "Bearer"} if error.code == 401 else {}
        answer = jsonify(status=error.code, message=error.description)
        return answer, error.code or 500, headers

    @app.errorhandler(Exception)
    def fail(error: Exception) -> tuple[Response, int]:
        log.exception("%s %s failed", request.method, request.path)
        return jsonify(status=500, message="Internal error; the API's log has the details"), 500

    return app
