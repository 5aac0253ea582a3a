"""The page of the versions: their figures, who is in production and why, promote, roll back."""

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import mlflow
from flask import Blueprint, Response, abort, g, redirect, render_template, request, url_for
from mlflow.exceptions import MlflowException
from werkzeug.wrappers import Response as AnyResponse

from defect_detection import PipelineError, StoreError
from defect_detection.evaluation import report
from defect_detection.evaluation.metrics import Rate
from defect_detection.registry import promotion, versions
from defect_detection.registry.promotion import Change, Recorded
from defect_detection.registry.versions import EVALUATED_BY, Version
from defect_detection.service.access import Role, needs
from defect_detection.service.backend import Backend
from defect_detection.service.sampled import sampled

CHANGE_WITHIN, REPORT_WITHIN = 60, 20  # seconds, for the store
SHOWN = 50  # versions, changes
LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class Registry:
    """What the store says of a registered model.

    Attributes:
        name: of the registered model.
        versions: the newest first.
        of: how many versions there are.
        production: number of the version that has the alias, None if none has.
        changes: of the alias, the newest first.
        warning: that the alias was moved without a record, else "".
    """

    name: str
    versions: list[Version]
    of: int
    production: int | None
    changes: list[Recorded]
    warning: str


def blueprint(backend: Backend) -> Blueprint:
    """Return the page of the versions, and what it sends."""
    calls = Blueprint("models", __name__, template_folder="templates")
    name, desk = backend.registered_model, backend.desk

    @calls.get("/models")
    def page() -> tuple[str, int]:
        model = backend.serving.model
        found, trouble = None, backend.serving.trouble
        try:
            found = desk.ask(lambda: _registry(name))
        except StoreError as error:
            trouble = str(error)
        page = render_template(
            "models.html",
            registry=found,
            trouble=trouble,
            serving=model.name if model else "",
            samples=_samples(backend, found),
        )
        return page, 200 if found else 503

    @calls.post("/models/promote")
    @needs(Role.ENGINEER)
    def promote() -> AnyResponse:
        number = request.form.get("version", type=int)
        if number is None:
            abort(400, "version is missing, expected a number")
        why, by = _why("chosen"), _by()
        with backend.changes.recorded(g.caller.described, "promote", version=number):
            _change(backend, lambda: promotion.choose(name, number, why, by))
        return _changed(backend)

    @calls.post("/models/rollback")
    @needs(Role.ENGINEER)
    def roll_back() -> AnyResponse:
        why, by = _why("rolled back"), _by()
        with backend.changes.recorded(g.caller.described, "roll back"):
            _change(backend, lambda: promotion.roll_back(name, why, by))
        return _changed(backend)

    @calls.get("/models/<int:number>/report")
    def page_of(number: int) -> Response:
        page = desk.ask(lambda: _report(name, number), REPORT_WITHIN)
        answer = Response(page, mimetype="text/html")
        answer.headers["Content-Security-Policy"] = _policy(page)
        return answer

    return calls


def _samples(backend: Backend, found: Registry | None) -> dict[int, Rate]:
    """Return the defects among what each version passed, by the random sample."""
    if found is None:
        return {}
    return {one.number: sampled(backend, f"{one.name}/{one.number}") for one in found.versions}


def _registry(name: str) -> Registry:
    known, production = versions.with_accuracy(name), versions.in_production(name)
    return Registry(
        name,
        known[::-1][:SHOWN],
        len(known),
        production.number if production else None,
        promotion.history(name, SHOWN),
        promotion.moved_outside(name),
    )


def _change(backend: Backend, change: Callable[[], Change]) -> None:
    """Move the alias; end the call with 409 if the registry refuses that."""
    try:
        backend.desk.ask(change, CHANGE_WITHIN)
    except StoreError:
        raise
    except PipelineError as error:
        abort(409, str(error))


def _changed(backend: Backend) -> AnyResponse:
    backend.store.look_soon()
    return redirect(url_for("models.page"))


def _why(default: str) -> str:
    return " ".join(request.form.get("why", "").split())[:LONGEST_REASON] or default


def _by() -> str:
    return promotion.actor({promotion.STARTED_BY: g.caller.described})


def _report(name: str, number: int) -> str:
    """Return the report of a version; end the call with 404 if there is none."""
    found = [one for one in versions.with_accuracy(name) if one.number == number]
    if not found:
        abort(404, f"{name} has no version {number}")
    run = found[0].tags.get(EVALUATED_BY, "")
    try:
        return str(mlflow.artifacts.load_text(f"runs:/{run}/{report.FILE}"))
    except (MlflowException, OSError):
        abort(404, f"The report of version {number} is not in the store any more")


def _policy(page: str) -> str:
    """Return a policy that allows the styles and scripts that stand in a report, and no others."""
    allowed = {}
    for kind in ("style", "script"):
        found = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found)
        allowed[kind] = " ".join(f"'sha256-{one}'" for one in hashes) or "'none'"
    return (
        f"default-src 'none'; img-src data:; style-src {allowed['style']}; "
        f"script-src {allowed['script']}; base-uri 'none'; frame-ancestors 'none'; "
        # A page of its own, since everyone who reaches MLflow can write reports.
        f"form-action 'none'; sandbox allow-scripts"
    )
