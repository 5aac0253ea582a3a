"""The review queue: what waits for a person, one image after the other."""

from collections.abc import Container

from flask import Blueprint, abort, g, redirect, render_template, request, url_for
from werkzeug.wrappers import Response

from defect_detection.dataset.inbox import ANSWERS, Seen, same_image
from defect_detection.service.access import Role, needs
from defect_detection.service.backend import Backend
from defect_detection.service.line import REASONS, WORDS
from defect_detection.service.pages import require
from defect_detection.service.sampled import sampled_now
from defect_detection.service.verdicts import Logged

AHEAD = 3  # images that a browser loads before they are needed
LOOKED_AT = 8  # verdicts at the head of the queue
ANSWER_WORDS = {"def_front": "defect", "ok_front": "good", "cannot_tell": "can't tell"}


def blueprint(backend: Backend) -> Blueprint:
    """Return the page of the queue, and what it sends."""
    calls = Blueprint("review", __name__, template_folder="templates")

    @calls.get("/review")
    def page() -> Response | str:
        wanted = request.args.get("verdict", type=int)
        turned_away = require(Role.OPERATOR)
        return turned_away or _page(backend, wanted)

    @calls.post("/review/<int:number>")
    @needs(Role.OPERATOR)
    def answer(number: int) -> Response | str:
        given = request.form.get("answer", "")
        if given not in ANSWERS:
            abort(400, f"answer is {given[:20]!r}, expected one of: {', '.join(ANSWERS)}")
        _label(backend, number, given, _blind())
        return _go_on(backend)

    @calls.post("/review/undo")
    @needs(Role.OPERATOR)
    def undo() -> Response | str:
        label_id, name = request.form.get("label", ""), _name()
        with backend.changes.recorded(g.caller.described, "undo label", label=label_id):
            label = backend.inbox.take_back(label_id, name)
            others = any(same_image(one, label) for one in backend.inbox.labels())
            number = int(label.verdict_id)
            backend.verdicts.settle(number, others)
        return _go_on(backend, number)

    return calls


def _label(backend: Backend, number: int, answer: str, blind: bool) -> None:
    name, verdict = _name(), _find(backend, number)
    content = backend.verdicts.content(number)
    if content is None:
        backend.verdicts.settle(number, True)  # nobody can judge it any more
        abort(410, "The image is not kept any more, so a label would be of no use")
    seen = Seen(
        verdict_id=number,
        verdict=verdict.verdict,
        probability=verdict.probability,
        model=verdict.model,
        waits=verdict.waits,
        part=verdict.part,
    )
    details = {"verdict": number, "part": verdict.part, "said": verdict.verdict, "answer": answer}
    with backend.changes.recorded(g.caller.described, "label", **details):
        backend.inbox.add(answer, name, seen, content, blind)
        backend.verdicts.settle(number, True)


def _go_on(backend: Backend, number: int | None = None) -> Response | str:
    """Return the next image: a part of the page for its script, else the page."""
    if request.headers.get("X-Part"):
        return _part(backend, number)
    return redirect(url_for("review.page", verdict=number, blind=1 if _blind() else None))


def _page(backend: Backend, wanted: int | None) -> str:
    return render_template("review.html", part=_part(backend, wanted), blind=_blind())


def _part(backend: Backend, wanted: int | None) -> str:
    mine = [one for one in backend.inbox.labels() if one.by == _name()]
    labelled = {(one.verdict_id, one.content): one for one in mine}
    waiting = _waiting(backend, labelled)
    verdict = _find(backend, wanted) if wanted is not None else next(iter(waiting), None)
    return render_template(
        "review_part.html",
        verdict=verdict,
        ahead=[one for one in waiting if verdict is None or one.id != verdict.id][:AHEAD],
        backlog=backend.verdicts.backlog(),
        last=mine[-1] if mine else None,
        mine=labelled.get(_key(verdict)) if verdict is not None else None,
        blind=_blind(),
        escapes=sampled_now(backend),
        words=WORDS,
        reasons=REASONS,
        answers=ANSWER_WORDS,
    )


def _waiting(backend: Backend, labelled: Container[tuple[str, str]]) -> list[Logged]:
    """Return what waits for this person, the oldest first.

    What cannot be labelled any more is taken out: its image is not kept, or the label of this
    person could not be noted in the log.

    Args:
        backend: has the log.
        labelled: the keys of the verdicts that this person has labelled.
    """
    while True:
        found = backend.verdicts.waiting(LOOKED_AT)
        lost = [one for one in found if not backend.verdicts.has_image(one.id)]
        done = [one for one in found if _key(one) in labelled]
        if lost:
            backend.verdicts.settle_without_image()
        for one in done:
            backend.verdicts.settle(one.id, True)
        if not lost and not done:
            return found


def _key(verdict: Logged) -> tuple[str, str]:
    """Return by what labels name a verdict; its number alone may be that of a former log."""
    return str(verdict.id), verdict.sha256


def _find(backend: Backend, number: int) -> Logged:
    """Return a verdict; end the call with 404 if there is none."""
    try:
        return backend.verdicts.one(number)
    except KeyError:
        abort(404, f"There is no verdict {number} in the log any more")


def _blind() -> bool:
    return request.values.get("blind") == "1"


def _name() -> str:
    """Return who labels: a person who signed in, or a program; end the call if nobody did."""
    if not g.caller.name and not g.caller.by_token:
        abort(401, "Your sign-in has ended. Sign in, so that your name stands beside the label")
    return str(g.caller.known_as)
