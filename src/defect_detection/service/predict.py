"""The call that judges images: POST /predict."""

import base64
import io
from collections.abc import Iterator
from typing import Literal

from flask import Response, abort, jsonify, request
from flask_openapi3 import APIBlueprint, Tag
from pydantic import BaseModel, Field

from defect_detection.inference.judge import HEATMAP_SIDE, Item, Judged
from defect_detection.inference.verdict_log import LONGEST_NAME, Origin, VerdictLog
from defect_detection.names import printable
from defect_detection.runtime import heatmap, preprocessing
from defect_detection.runtime.classifier import VerdictName
from defect_detection.service.access import Role, needs, takes
from defect_detection.service.refusal import refusals
from defect_detection.service.serving import NotServing, Serving

PATH = "/predict"
LARGEST_BODY = 32 * 1024 * 1024  # bytes
MOST_IMAGES = 64  # in a call
FIELD = "image"  # the name of the files in a form, though others are taken too

BODY = {
    "requestBody": {
        "required": True,
        "description": "One image as it is, or one or several as files of a form",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MOST_IMAGES,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            }
        }
        | {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("application/octet-stream", "image/jpeg", "image/png")
        },
    }
}


class Query(BaseModel):
    """What is asked for beside verdicts."""

    heatmap: bool = Field(False, description="add each image with the evidence over it, a PNG")
    name: str = Field("", max_length=LONGEST_NAME, description="of an image sent as it is")
    source: Literal["predict", "camera"] = Field("predict", description="shown beside the verdict")


class Prediction(BaseModel):
    """A verdict."""

    id: int | None = Field(description="in the verdict log; null if it could not be logged yet")
    name: str = Field(description="of the image's file")
    part: str = Field(description="id of the part, found in the name")
    verdict: VerdictName
    probability: float | None = Field(description="of a defect; null for an error")
    threshold: float = Field(description="the verdict is defect at this probability or above")
    band: tuple[float, float] = Field(description="probabilities at which a person should look")
    review: bool = Field(description="whether a person should look")
    reason: str = Field(description="why the verdict is unknown or error")
    model: str = Field(description="registered model and version")
    milliseconds: float = Field(description="to decode and judge the image")
    heatmap: str | None = Field(None, description="PNG in base64, if asked for")


class Predictions(BaseModel):
    """A verdict on each image, in the order of the images."""

    predictions: list[Prediction]


class NoVerdict(BaseModel):
    """None of the images can be decoded."""

    status: int
    message: str
    predictions: list[Prediction]


def blueprint(serving: Serving, verdicts: VerdictLog) -> APIBlueprint:
    """Return the call /predict."""
    calls = APIBlueprint("predict", __name__, abp_tags=[Tag(name="verdicts")])

    @calls.post(
        PATH,
        summary="Judge images",
        openapi_extensions=BODY,
        responses={**refusals(413, 503), 200: Predictions, 422: NoVerdict},
    )
    @needs(Role.OPERATOR)
    @takes(LARGEST_BODY)
    def predict(query: Query) -> Response | tuple[Response, int]:
        try:
            with serving.place():
                judged = serving.judge(list(_images(query)))
        except NotServing as error:
            abort(503, str(error))
        ids = verdicts.add(judged, [Origin(query.source)] * len(judged))
        described = [
            _describe(one, number, verdicts.rules.part_of(one.name), query.heatmap)
            for one, number in zip(judged, ids, strict=True)
        ]
        if all(one.verdict.verdict == "error" for one in judged):
            message = f"{described[0]['name'] or 'The image'} {judged[0].verdict.reason}"
            return jsonify(status=422, message=message, predictions=described), 422
        return jsonify(predictions=described)

    return calls


def _images(query: Query) -> Iterator[Item]:
    """Yield the images of the current call; end it with 400 if there are none or too many."""
    if request.mimetype == "multipart/form-data":
        files = [file for _, file in request.files.items(multi=True)]
        if not files:
            abort(
                400, f"The form has no file. Send images as '{FIELD}': curl -F {FIELD}=@part.jpeg"
            )
        if len(files) > MOST_IMAGES:
            abort(
                400, f"The form has {len(files)} files, at most {MOST_IMAGES} are judged in a call"
            )
        for file in files:
            yield Item(_name(file.filename or ""), file.read())
    else:
        content = request.get_data(cache=False)
        if not content:
            abort(400, "The body is empty. Send an image: curl --data-binary @part.jpeg")
        yield Item(_name(query.name), content)


def _name(given: str) -> str:
    """Return the last part of a file's name, whatever system it was made on."""
    return printable(given.replace("\\", "/").rsplit("/", 1)[-1], LONGEST_NAME)


def _describe(judged: Judged, number: int | None, part: str, with_heatmap: bool) -> dict:
    classifier = judged.model.classifier
    point = classifier.point
    described = Prediction(
        id=number,
        name=judged.name,
        part=part,
        **judged.verdict.as_dict(),
        threshold=point.threshold,
        band=(point.review_low, point.review_high),
        model=judged.model.name,
        milliseconds=round(judged.milliseconds, 3),
        heatmap=_heatmap(judged) if with_heatmap else None,
    )
    return described.model_dump(exclude=None if with_heatmap else {"heatmap"})


def _heatmap(judged: Judged) -> str | None:
    """Return the image with the evidence over it, a PNG in base64."""
    evidence, takes = judged.verdict.evidence, judged.model.classifier.takes
    if evidence is None:
        return None
    image = preprocessing.decode_within(
        judged.content, HEATMAP_SIDE, takes.channels, takes.bits, takes.most_pixels
    )
    drawn = heatmap.draw(image, evidence, takes, judged.model.classifier.full_evidence)
    made = io.BytesIO()
    drawn.save(made, "PNG", compress_level=1)
    return base64.b64encode(made.getvalue()).decode()
