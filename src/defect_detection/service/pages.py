"""What all pages share: who is signed in, the way around, headers, and errors that read well."""

import hashlib
import logging
import os
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from flask import (
    Blueprint,
    Flask,
    Response,
    abort,
    g,
    jsonify,
    make_response,
    redirect,
    render_template,
    request,
    session,
    url_for,
)
from flask_wtf.csrf import generate_csrf  # type: ignore[import-untyped]
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from defect_detection.service.access import Caller, Role, needs
from defect_detection.service.backend import Backend

log = logging.getLogger("api")

HERE = Path(__file__).parent
# Nothing comes from another host, no script or style stands in a page, no other site frames it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # without it, forms come from an unknown origin
    "Cross-Origin-Resource-Policy": "same-origin",
}
FOREVER = "private, max-age=31536000, immutable"
NAVIGATION = (
    ("line.page", "Line"),
    ("review.page", "Review"),
    ("labels.page", "Labels"),
    ("models.page", "Models"),
    ("job_pages.page", "Jobs"),
)
PAGES = [endpoint for endpoint, _ in NAVIGATION]


def attach(app: Flask, backend: Backend) -> None:
    """Give an application templates, static files, the pages to sign in, and safe headers."""
    app.register_blueprint(_blueprint(backend))
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    app.jinja_env.globals.update(
        asset=asset, navigation=NAVIGATION, Role=Role, csrf=generate_csrf, caller=_caller
    )
    app.jinja_env.filters["percent"] = "{:.1%}".format

    @app.after_request
    def harden(answer: Response) -> Response:
        for name, value in HEADERS.items():
            answer.headers.setdefault(name, value)
        answer.headers.setdefault("Cache-Control", "no-store")
        return answer


def refusal(code: int, message: str) -> Response:
    """Return an error: a page for browsers, JSON for everyone else."""
    if not wants_page():
        answer = jsonify(status=code, message=message)
        answer.status_code = code
        return answer
    if code == 401:  # such as after the end of a shift
        back = request.full_path if request.method == "GET" else request.referrer or ""
        wanted = urlsplit(back)
        why = "" if request.method == "GET" else "Your sign-in has ended. Nothing was changed"
        return make_response(_to_sign_in(f"{wanted.path}?{wanted.query}", why))
    return make_response(render_template("error.html", code=code, message=message), code)


def wants_page() -> bool:
    """Return whether the caller is a browser that shows what comes."""
    best = request.accept_mimetypes.best_match(["application/json", "text/html"])
    return best == "text/html" and "text/html" in request.headers.get("Accept", "")


def require(role: Role) -> AnyResponse | None:
    """Return the way to the sign-in if the current caller's role is too low for a page."""
    if _caller().role >= role and (_caller().name or role < Role.OPERATOR):
        return None
    return _to_sign_in(request.full_path, f"This page needs the token of an {role}")


def _to_sign_in(wanted: str, why: str) -> AnyResponse:
    return redirect(url_for("pages.sign_in", next=wanted.rstrip("?"), why=why or None), 303)


def _caller() -> Caller:
    """Return the current caller; nobody while it is not known who calls."""
    caller: Caller = g.get("caller", Caller(Role.NOBODY, "", "", ""))
    return caller


@cache
def asset(name: str) -> str:
    """Return the address of a static file, which changes with its content."""
    content = (HERE / "static" / name).read_bytes()
    return url_for("pages.static", filename=name, v=hashlib.sha256(content).hexdigest()[:10])


def _blueprint(backend: Backend) -> Blueprint:
    calls = Blueprint("pages", __name__, template_folder="templates")

    @calls.get("/")
    def home() -> AnyResponse:
        return redirect(url_for("line.page"))

    @calls.get("/static/<filename>")
    @needs(Role.NOBODY)
    def static(filename: str) -> Response:
        if filename not in os.listdir(HERE / "static"):
            abort(404)
        file = HERE / "static" / filename
        kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
        answer = Response(file.read_bytes(), mimetype=kinds.get(file.suffix, "text/plain"))
        answer.headers["Cache-Control"] = FOREVER if "v" in request.args else "no-cache"
        return answer

    @calls.get("/sign-in")
    @needs(Role.NOBODY)
    def sign_in() -> str:
        return _form(backend, _caller().name, request.args.get("why", "")[:100])

    @calls.post("/sign-in")
    @needs(Role.NOBODY)
    def signed_in() -> AnyResponse:
        name, token = request.form.get("name", ""), request.form.get("token", "")
        try:
            role = backend.access.sign_in(name, token)
        except HTTPException as error:
            log.warning("A sign-in from %s was refused", request.remote_addr)
            return make_response(_form(backend, name, error.description or ""), error.code or 401)
        with backend.changes.recorded(f"{name}, {request.remote_addr}", "sign in", role=str(role)):
            return redirect(_next())

    @calls.post("/sign-out")
    @needs(Role.NOBODY)
    def sign_out() -> AnyResponse:
        session.clear()
        return redirect(url_for("line.page"))

    return calls


def _form(backend: Backend, name: str, why: str) -> str:
    return render_template(
        "sign_in.html", next=_next(), name=name, why=why, token=backend.access.why_token()
    )


def _next() -> str:
    """Return the page to go on with: one of this site, whatever the address says."""
    wanted = request.values.get("next", "").rstrip("?")
    path = wanted.partition("?")[0]
    return wanted if path in map(url_for, PAGES) else url_for("line.page")
