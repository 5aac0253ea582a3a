"""The API of the line: start, watch and cancel a retraining; see whether all is well.

    POST   /retrain            start one; JSON with epochs, batch_size, learning_rate if you like
    GET    /retrain            all jobs, newest first
    GET    /retrain/<id>       state, progress, result
    GET    /retrain/<id>/log   what it printed
    DELETE /retrain/<id>       cancel it
    GET    /health             version behind prod, store, job

With the variable API_TOKEN set, POST and DELETE need 'Authorization: Bearer <token>'; without it
they are taken from this machine only.
"""

import argparse
import hmac
import ipaddress
import logging
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

import waitress  # noqa: E402
from flask import Flask, Response, abort, jsonify, request, url_for  # noqa: E402
from werkzeug.exceptions import HTTPException  # noqa: E402

from defect_detection import PipelineError, registry, script, settings, tracking  # noqa: E402
from defect_detection.jobs import Busy, Job, Jobs  # noqa: E402
from defect_detection.settings import MLflowNames, RetrainConfig, RetrainOverrides  # noqa: E402

log = logging.getLogger("api")

LARGEST_BODY = 16 * 1024  # bytes
HEALTH_SECONDS = 2  # that an answer of the tracking server may take


def create_app(jobs: Jobs, names: MLflowNames, store: str, token: str | None) -> Flask:
    """Make the application.

    Args:
        jobs: starts and knows the retrainings.
        names: of the registered models.
        store: URI of the tracking store.
        token: what changing calls must bear; None: they must come from this machine.
    """
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app.json.sort_keys = False

    @app.before_request
    def guard() -> None:
        if request.method not in ("GET", "HEAD", "OPTIONS"):
            authorize(token)

    @app.post("/retrain")
    def start():
        parameters = read_overrides()
        try:
            job = jobs.start(parameters)
        except Busy as busy:
            answer = {"message": f"The job {busy.job.id} is running", "job": describe(busy.job)}
            return jsonify(status=409, **answer), 409, {"Location": address(busy.job)}
        if request.args.get("wait", "").lower() in ("true", "1", "yes"):
            job = jobs.wait(job.id)
            status = 200 if job.state == "succeeded" else 500
            return jsonify(describe(job)), status, {"Location": address(job)}
        return jsonify(describe(job)), 202, {"Location": address(job)}

    @app.get("/retrain")
    def every():
        return jsonify([describe(job) for job in jobs.all()])

    @app.get("/retrain/<job_id>")
    def one(job_id: str):
        return jsonify(describe(find(jobs.get, job_id)))

    @app.get("/retrain/<job_id>/log")
    def output(job_id: str):
        return Response(find(jobs.log, job_id), mimetype="text/plain")

    @app.delete("/retrain/<job_id>")
    def cancel(job_id: str):
        return jsonify(describe(find(jobs.cancel, job_id)))

    @app.get("/health")
    def health():
        running = jobs.running()
        reachable, version = production(store, names)
        return jsonify(
            service="defect-detection",
            pid=os.getpid(),
            store="reachable" if reachable else "unreachable",
            production=version,
            job=running.id if running else None,
        )

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException):
        headers = {"WWW-Authenticate": "Bearer"} if error.code == 401 else {}
        return jsonify(status=error.code, message=error.description), error.code, headers

    @app.errorhandler(Exception)
    def fail(error: Exception):
        log.exception("%s %s failed", request.method, request.path)
        return jsonify(status=500, message="Internal error; the API's log tells more"), 500

    return app


def authorize(token: str | None) -> None:
    """Let a changing call through, or end it with 401 or 403 and the reason."""
    if token is not None:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            abort(401, "This call needs 'Authorization: Bearer <token>' with the API's token")
        return
    # The peer's address, never a forwarded one: anyone can write that header.
    if not is_loopback(request.remote_addr or ""):
        abort(403, "Without API_TOKEN, changing calls are taken from this machine only")
    # A page in a browser on this machine comes from loopback too, whoever wrote it: such a call
    # names its page, and a foreign name that was made to lead here is in Host.
    origin = request.headers.get("Origin")
    if not is_local_name(request.host) or (origin and urlsplit(origin).netloc != request.host):
        abort(403, "Without API_TOKEN, changing calls are not taken from other sites' pages")


def is_loopback(address: str) -> bool:
    """Say whether an IP address is this machine's own."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def is_local_name(host: str) -> bool:
    """Say whether the header Host, with or without a port, names this machine."""
    name = urlsplit(f"//{host}").hostname or ""
    return name == "localhost" or is_loopback(name)


def read_overrides() -> dict[str, int | float]:
    """Read the parameters from the body; none is an empty body. 400 says what is wrong."""
    body = request.get_data()
    if not body.strip():
        return {}
    try:
        asked = settings.parse_json(body, RetrainOverrides, "The body")
    except PipelineError as error:
        abort(400, str(error))
    return {name: value for name, value in asdict(asked).items() if value is not None}


def find(look_up, job_id: str):
    """Look a job up, or end the call with 404."""
    try:
        return look_up(job_id)
    except KeyError:
        abort(404, f"There is no job {job_id}. GET /retrain lists them")


def describe(job: Job) -> dict:
    """Return a job as the API tells it."""
    return asdict(job) | {"log": url_for("output", job_id=job.id)}


def address(job: Job) -> str:
    """Return the path of a job."""
    return url_for("one", job_id=job.id)


def production(store: str, names: MLflowNames) -> tuple[bool, dict | None]:
    """Return whether the store answers, and the version behind prod if there is one."""
    try:
        with tracking.connected(store, HEALTH_SECONDS):
            found = registry.behind_alias(names.production_model_name, registry.PRODUCTION_ALIAS)
    except PipelineError as error:
        log.warning("%s", error)
        return False, None
    if found is None:
        return True, None
    acc = None if math.isnan(found.acc) else found.acc  # NaN is no JSON
    return True, {"registry": found.name, "version": found.number, "acc": acc}


def main() -> None:
    """Read options and settings, then serve until stopped."""
    env = settings.environment()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  API_TOKEN=secret python api.py --port 8080",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default=env.get("API_HOST", "0.0.0.0"), help="or API_HOST")
    parser.add_argument(
        "--port", type=int, default=env.get("API_PORT", settings.API_PORT), help="or API_PORT"
    )
    parser.add_argument(
        "--jobs",
        default=env.get("JOBS_PATH", settings.JOBS_PATH),
        metavar="DIR",
        help="where jobs are kept, relative to the project's root; or JOBS_PATH",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=env.get("RETRAIN_TIME_LIMIT", 3600),
        metavar="SECONDS",
        help="after which a retraining is ended; or RETRAIN_TIME_LIMIT",
    )
    options = parser.parse_args()
    if not 0 < options.port < 65536:
        raise PipelineError(f"The port is {options.port}, expected 1 to 65535")
    names = settings.read_yaml(ROOT / "re_train" / "re_train.yaml", RetrainConfig).mlflow
    command = [sys.executable, str(ROOT / "re_train" / "re_train.py")]
    jobs = Jobs(settings.from_root(options.jobs), command, ROOT, options.time_limit)
    app = create_app(jobs, names, settings.tracking_uri(env), env.get("API_TOKEN"))
    log.info("Serving on http://%s:%d", options.host, options.port)
    try:
        waitress.serve(
            app,
            host=options.host,
            port=options.port,
            threads=16,  # a call with ?wait=true holds one for as long as a job takes
            max_request_body_size=64 * LARGEST_BODY,  # above it, not even read
            ident="defect-detection",
        )
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PipelineError(
            f"{options.host}:{options.port} cannot be served ({reason}). Choose another port "
            f"with --port or API_PORT"
        ) from error


if __name__ == "__main__":
    script.run(main)
