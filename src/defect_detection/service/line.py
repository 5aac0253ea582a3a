"""The line's page, to be read from three metres, and the images of verdicts."""

import io
import time
from dataclasses import dataclass
from datetime import datetime

from flask import Blueprint, Response, abort, jsonify, render_template
from PIL import Image

from defect_detection.evaluation.metrics import Rate
from defect_detection.inference.verdict_log import jpeg_within
from defect_detection.runtime import heatmap
from defect_detection.runtime.opening import MOST_PIXELS
from defect_detection.runtime.preprocessing import UnreadableImage
from defect_detection.service.backend import Backend
from defect_detection.service.pages import FOREVER
from defect_detection.service.verdicts import Logged, View

STRIP = 20  # verdicts that are shown
IMAGE_SIDE = 720  # pixels of the longer side
WORDS = {"defect": "Defect", "ok": "OK", "unknown": "Unknown", "error": "No image"}
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
    """

    last: int
    silent: int | None
    lights: list[Light]
    waiting: int


def blueprint(backend: Backend) -> Blueprint:
    """Return the line's page, what keeps it up to date, and the images."""
    calls = Blueprint("line", __name__, template_folder="templates")
    verdicts = backend.verdicts

    def live() -> str:
        strip = verdicts.newest(STRIP)
        return render_template(
            "line_live.html",
            strip=strip,
            newest=strip[0] if strip else None,
            shift=verdicts.shift(datetime.now().astimezone()),
            escapes=escape_rate(backend),
            state=state(backend, strip[0] if strip else None),
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
        return jsonify(last=found.last, silent=found.silent, lights=lights, waiting=found.waiting)

    @calls.get("/verdicts/<int:number>/image")
    def image(number: int) -> Response:
        return cached(_image(_view(backend, number)), "image/jpeg")

    @calls.get("/verdicts/<int:number>/thumbnail")
    def thumbnail(number: int) -> Response:
        found = _view(backend, number).thumbnail
        return cached(found, "image/jpeg") if found else abort(404, "It cannot be decoded")

    @calls.get("/verdicts/<int:number>/evidence")
    def evidence(number: int) -> Response:
        view = _view(backend, number)
        if view.levels is None:
            abort(404, "There is no evidence for an image that cannot be decoded")
        drawn = heatmap.overlay(view.levels, _size(_image(view)), view.aspect)
        made = io.BytesIO()
        drawn.save(made, "PNG", compress_level=1)
        return cached(made.getvalue(), "image/png")

    return calls


def state(backend: Backend, newest: Logged | None) -> State:
    """Return the state of the line."""
    since = None if newest is None else max(0.0, time.time() - newest.at)
    silent = since is not None and since > backend.line.no_image_after
    model, store = backend.serving.model, backend.store.last()
    trouble = backend.serving.trouble
    lost = backend.log.unlogged
    lights = [
        Light("Images", not silent and since is not None, _arriving(since, silent)),
        Light("Model", model is not None and not trouble, trouble or (model.name if model else "")),
        Light("Store", store.reachable, "answers" if store.reachable else "does not answer"),
    ]
    if backend.log.trouble or lost:
        says = backend.log.trouble or "can be written again"
        lights.append(Light("Log", False, f"{says}; {lost} verdicts are not in it"))
    seconds = int(since) if since is not None and silent else None
    waiting = backend.verdicts.backlog().total()
    return State(newest.id if newest else 0, seconds, lights, waiting)


def escape_rate(backend: Backend) -> Rate:
    """Return the defects among the parts that pass, by the random sample that people judged."""
    model = backend.serving.model
    found = backend.inbox.sample(model.name if model else None)
    return Rate(found.defects, found.of)


def _arriving(since: float | None, silent: bool) -> str:
    if since is None:
        return "none yet"
    return f"none for {since:.0f} s" if silent else "arrive"


def _view(backend: Backend, number: int) -> View:
    try:
        return backend.verdicts.view(number)
    except KeyError:
        abort(404, f"There is no verdict {number} in the log any more")


def _image(view: View) -> bytes:
    """Return an image as it is shown: a JPEG of our own making, never what was sent."""
    if view.content is not None:
        try:
            return jpeg_within(view.content, IMAGE_SIDE, 3, MOST_PIXELS)
        except UnreadableImage as error:
            abort(404, f"The image {error}")
    if view.thumbnail is None:
        abort(404, "The image is not kept any more")
    return view.thumbnail


def _size(jpeg: bytes) -> tuple[int, int]:
    """Return height and width."""
    with Image.open(io.BytesIO(jpeg)) as opened:
        return opened.height, opened.width


def cached(content: bytes, kind: str) -> Response:
    """Return an image that never changes under its address."""
    answer = Response(content, mimetype=kind)
    answer.headers["Cache-Control"] = FOREVER
    return answer
