"""The line's page, to be read from three metres."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from flask import Blueprint, Response, jsonify, render_template

from defect_detection import PipelineError
from defect_detection.service.backend import Backend
from defect_detection.service.sampled import sampled_now
from defect_detection.service.verdicts import WORST_FIRST, Logged

STRIP = 20  # verdicts that are shown
WORDS = {"defect": "Defect", "ok": "OK", "unknown": "Unknown", "error": "Unreadable"}
REASONS = {
    "band": "near the threshold",
    "unknown": "unlike the images of training",
    "error": "cannot be read",
    "audit": "random sample of what passes",
}


@dataclass(frozen=True)
class Light:
    """Whether something that the line needs works."""

    name: str
    good: bool
    says: str


@dataclass(frozen=True)
class State:
    """The line as it is now.

    Attributes:
        last: id of the newest verdict, 0 if there is none.
        silent: seconds without an image, if that is too long; else None.
        lights: images, model, store, log.
        waiting: how many images wait for a person.
        stopped: why what is shown is not what the camera sees, "" if it is.
    """

    last: int
    silent: int | None
    lights: list[Light]
    waiting: int
    stopped: str


def blueprint(backend: Backend) -> Blueprint:
    """Return the line's page, and what keeps it up to date."""
    calls = Blueprint("line", __name__, template_folder="templates")
    verdicts = backend.verdicts

    def live() -> str:
        strip = verdicts.newest(STRIP)
        return render_template(
            "line_live.html",
            strip=strip,
            newest=of_newest_part(strip),
            shift=verdicts.shift(datetime.now().astimezone()),
            escapes=sampled_now(backend),
            state=state(backend, strip[0] if strip else None),
            word=word,
            words=WORDS,
            reasons=REASONS,
        )

    @calls.get("/line")
    def page() -> str:
        return render_template("line.html", live=live())

    @calls.get("/line/live")
    def fragment() -> str:
        return live()

    @calls.get("/line/state")
    def now() -> Response:
        newest = next(iter(verdicts.newest(1)), None)
        found = state(backend, newest)
        lights = [f"{one.good} {one.says}" for one in found.lights]
        return jsonify(
            last=found.last,
            silent=found.silent,
            lights=lights,
            waiting=found.waiting,
            stopped=found.stopped,
            shift=verdicts.shift_began(),
        )

    return calls


def of_newest_part(strip: list[Logged]) -> Logged | None:
    """Return the worst of the last verdicts on the part that came last, None without verdicts."""
    if not strip:
        return None
    part = strip[0].part
    same = [one for one in strip if part and one.part == part]
    return min(same, key=lambda one: WORST_FIRST.index(one.kind)) if same else strip[0]


def word(verdict: Logged) -> str:
    """Return what an operator reads from afar."""
    return "Check" if verdict.kind == "review" else WORDS[verdict.verdict]


def state(backend: Backend, newest: Logged | None) -> State:
    """Return the state of the line."""
    since = None if newest is None else max(0.0, time.time() - newest.at)
    silent = since is not None and since > backend.line.no_image_after
    model, store = backend.serving.model, backend.store.last()
    trouble = backend.serving.trouble
    lights = [
        Light("Images", not silent and since is not None, _arriving(since, silent)),
        Light("Model", model is not None and not trouble, trouble or (model.name if model else "")),
        Light("Store", store.reachable, "answers" if store.reachable else "does not answer"),
    ]
    lights += _troubles(backend)
    seconds = int(since) if since is not None and silent else None
    waiting = backend.verdicts.backlog().total()
    stopped = f"Verdicts are not logged: {backend.log.trouble}" if backend.log.trouble else ""
    return State(newest.id if newest else 0, seconds, lights, waiting, stopped)


def _troubles(backend: Backend) -> Iterator[Light]:
    """Yield lights for what is only worth a word while it does not work."""
    trouble = backend.log.trouble
    lost = backend.log.unlogged + (backend.log.waiting() if trouble else 0)
    if trouble or lost:
        says = f"{trouble or 'can be written again'}; {lost} verdicts are not in it"
        yield Light("Log", False, says)
    try:
        backend.inbox.labels()
    except PipelineError as error:
        yield Light("Labels", False, str(error))


def _arriving(since: float | None, silent: bool) -> str:
    if since is None:
        return "none yet"
    return "none arrive" if silent else "arrive"
