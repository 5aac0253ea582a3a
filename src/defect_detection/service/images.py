"""The images of verdicts, as pages show them: always JPEG or PNG of our own making."""

import io
import threading

from flask import Blueprint, Response, abort
from PIL import Image

from defect_detection.inference.verdict_log import jpeg_within
from defect_detection.runtime import heatmap
from defect_detection.runtime.opening import MOST_PIXELS
from defect_detection.runtime.preprocessing import UnreadableImage
from defect_detection.service.backend import Backend
from defect_detection.service.pages import FOREVER
from defect_detection.service.verdicts import View

SIDE, EVIDENCE_SIDE = 720, 360  # pixels of the longer side
MOST_AT_ONCE = 2  # images that are decoded for pages; one of 100 megapixels takes 400 MB


def blueprint(backend: Backend) -> Blueprint:
    """Return the calls under /verdicts."""
    calls = Blueprint("images", __name__)
    cores = threading.BoundedSemaphore(MOST_AT_ONCE)

    @calls.get("/verdicts/<int:number>/image")
    def image(number: int) -> Response:
        with cores:
            return cached(_image(backend, number), "image/jpeg")

    @calls.get("/verdicts/<int:number>/thumbnail")
    def thumbnail(number: int) -> Response:
        found = _view(backend, number).thumbnail
        return cached(found, "image/jpeg") if found else abort(404, "It cannot be decoded")

    @calls.get("/verdicts/<int:number>/evidence")
    def evidence(number: int) -> Response:
        view = _view(backend, number)
        if view.levels is None:
            abort(404, "There is no evidence for an image that cannot be decoded")
        if view.thumbnail is None:
            abort(404, "The image cannot be decoded")
        drawn = heatmap.overlay(view.levels, _size(view.thumbnail), view.aspect)
        made = io.BytesIO()
        drawn.save(made, "PNG", compress_level=1)
        return cached(made.getvalue(), "image/png")

    return calls


def _view(backend: Backend, number: int) -> View:
    try:
        return backend.verdicts.view(number)
    except KeyError:
        abort(404, f"There is no verdict {number} in the log any more")


def _image(backend: Backend, number: int) -> bytes:
    """Return an image as it is shown: a JPEG of our own making, never what was sent."""
    view, content = _view(backend, number), backend.verdicts.content(number)
    if content is not None:
        try:
            return jpeg_within(content, SIDE, 3, MOST_PIXELS)
        except UnreadableImage as error:
            abort(404, f"The image {error}")
    if view.thumbnail is None:
        abort(404, "The image is not kept any more")
    return view.thumbnail


def _size(thumbnail: bytes) -> tuple[int, int]:
    """Return height and width of the evidence over an image of a thumbnail's shape."""
    with Image.open(io.BytesIO(thumbnail)) as opened:
        scale = EVIDENCE_SIDE / max(opened.size)
        return round(opened.height * scale), round(opened.width * scale)


def cached(content: bytes, kind: str) -> Response:
    """Return an image that never changes under its address."""
    answer = Response(content, mimetype=kind)
    answer.headers["Cache-Control"] = FOREVER
    return answer
