"""The page on which an engineer approves or rejects the labels that people gave."""

from collections import Counter

from flask import Blueprint, Response, abort, g, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as AnyResponse

from defect_detection.dataset.inbox import Label, Refused, contradictions, order_for_decision
from defect_detection.inference.verdict_log import jpeg_within
from defect_detection.runtime.decision import CLASSES
from defect_detection.runtime.opening import MOST_PIXELS
from defect_detection.runtime.preprocessing import UnreadableImage, read_file
from defect_detection.service.access import Role, needs
from defect_detection.service.backend import Backend
from defect_detection.service.images import cached
from defect_detection.service.line import WORDS
from defect_detection.service.review import ANSWER_WORDS

SHOWN, THUMBNAIL = 50, 320  # labels on a page; pixels
DECISIONS = ("approve", "reject", *CLASSES)


def blueprint(backend: Backend) -> Blueprint:
    """Return the page of the labels, and what it sends."""
    calls = Blueprint("labels", __name__, template_folder="templates")
    inbox = backend.inbox

    @calls.get("/labels")
    def page() -> str:
        return _page(backend)

    @calls.get("/labels/<label_id>/image")
    @needs(Role.VIEWER)
    def image(label_id: str) -> Response:
        label = _find(inbox.labels(), label_id)
        file = inbox.file(label)
        if file is None:
            abort(404, "The image is not kept any more")
        try:
            shown = jpeg_within(read_file(file), THUMBNAIL, 3, MOST_PIXELS)
        except UnreadableImage as error:
            abort(404, f"The image {error}")
        return cached(shown, "image/jpeg")

    @calls.post("/labels")
    @needs(Role.ENGINEER)
    def decide() -> AnyResponse:
        decision, chosen = request.form.get("decision", ""), request.form.getlist("label")
        if ":" in decision:  # the button beside a label
            label_id, decision = decision.split(":", 1)
            chosen = [label_id]
        if not chosen:
            abort(400, "Choose at least one label")
        if decision not in DECISIONS:
            abort(400, f"decision is {decision[:20]!r}, expected one of: {', '.join(DECISIONS)}")
        parts = {one.id: one.part for one in inbox.labels()}
        refused = {one: why for one in chosen if (why := _decide(backend, one, decision))}
        if refused:
            told = [f"part {parts.get(one) or one}: {why}" for one, why in refused.items()]
            raise Refused(
                f"{len(chosen) - len(refused)} of {len(chosen)} are decided; not "
                f"{'; not '.join(told)}"
            )
        return redirect(url_for("labels.page"))

    return calls


def _page(backend: Backend) -> str:
    labels = backend.inbox.labels()
    photographs = backend.photographs.of(labels)
    waiting = order_for_decision(labels, lambda one: photographs[one.content])
    counts = Counter(photographs[one.content] for one in waiting)
    return render_template(
        "labels.html",
        shown=waiting[:SHOWN],
        waiting=len(waiting),
        several={one.id for one in waiting if counts[photographs[one.content]] > 1},
        against=contradictions(labels, lambda one: photographs[one.content]),
        photographs=photographs,
        comparing=backend.photographs.comparing,
        decided=[one for one in reversed(labels) if one.state != "waiting"][:SHOWN],
        approved=Counter(one.approved_as for one in labels if one.state == "approved"),
        words=WORDS,
        answers=ANSWER_WORDS,
    )


def _decide(backend: Backend, label_id: str, decision: str) -> str:
    """Carry a decision out for one label; return why it was refused, "" if it was not."""
    by = g.caller.known_as
    try:
        with backend.changes.recorded(g.caller.described, decision, label=label_id):
            if decision == "reject":
                backend.inbox.reject(label_id, by)
            else:
                answer = decision if decision in CLASSES else ""
                backend.inbox.approve(label_id, by, answer)
    except Refused as error:
        return str(error)
    return ""


def _find(labels: list[Label], label_id: str) -> Label:
    for label in labels:
        if label.id == label_id:
            return label
    abort(404, "There is no such label any more")
