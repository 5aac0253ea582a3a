"""POST /predict: verdicts as everywhere else, limits, and what is logged."""

import base64
import io
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends import LOCAL, MODEL, OTHER, backend, client
from conftest import draw_part, encoded, wait_for
from defect_detection.inference.judge import NamedModel
from defect_detection.runtime.classifier import Classifier
from defect_detection.service import predict, serving
from defect_detection.service.access import Role
from defect_detection.service.health import Look
from defect_detection.service.serving import NOTHING, Serving
from logged import MODEL as MODEL_THAT_JUDGES
from logged import judged


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encoded(draw_part(rng, defect=number % 2 == 0)) for number in range(6)]


@pytest.fixture
def judging(tmp_path, model_folder):
    made = backend(tmp_path, model=model_folder)
    return client(made), made


def form(*files: tuple[bytes, str]) -> dict:
    return {"image": [(io.BytesIO(content), name) for content, name in files]}


def test_verdict_is_that_of_the_classifier(judging, parts, model_folder):
    calls, made = judging
    classifier = Classifier.load(model_folder)
    answer = calls.post("/predict", data=form(*((p, f"p{n}.x.jpeg") for n, p in enumerate(parts))))
    assert answer.status_code == 200
    for number, (found, part) in enumerate(zip(answer.json["predictions"], parts, strict=True)):
        verdict = classifier.classify(part)
        assert {key: found[key] for key in verdict.as_dict()} == {
            **verdict.as_dict(),
            "probability": pytest.approx(verdict.probability, abs=1e-6),
        }
        assert (found["name"], found["part"]) == (f"p{number}.x.jpeg", f"p{number}")
        assert (found["model"], found["threshold"]) == (MODEL, classifier.point.threshold)
        assert found["band"] == [classifier.point.review_low, classifier.point.review_high]
        assert found["milliseconds"] > 0 and "heatmap" not in found
        logged = made.verdicts.one(found["id"])
        assert (logged.verdict, logged.part, logged.source) == (
            *(found["verdict"], found["part"], "predict"),
        )


@pytest.mark.parametrize("kind", ["image/jpeg", "application/octet-stream", "text/plain", None])
def test_image_is_taken_as_it_is_whatever_type_is_said(judging, parts, kind):
    answer = judging[0].post("/predict?name=a.jpeg&source=camera", data=parts[0], content_type=kind)
    assert answer.status_code == 200
    (found,) = answer.json["predictions"]
    assert (found["name"], found["part"]) == ("a.jpeg", "a")
    assert judging[1].verdicts.one(found["id"]).source == "camera"


def test_person_who_signed_in_may_send_large_images(judging, parts):
    calls = judging[0]
    page = calls.get("/sign-in").text
    token = re.search(r'name="csrf_token" value="([^"]+)"', page).group(1)
    calls.post("/sign-in", data={"name": "Ada", "csrf_token": token}, headers={"Host": "localhost"})
    headers = {"X-CSRFToken": re.search(r'data-csrf="([^"]+)"', calls.get("/line").text).group(1)}
    said = b'--x\r\nContent-Disposition: form-data; name="image"; filename="large.jpeg"\r\n\r\n'
    large = said + parts[0] + b"\0" * 2_000_000 + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert calls.post("/predict", data=large, headers=headers | kind).status_code == 200
    assert calls.post("/jobs", data={"epochs": "1" * 20_000}, headers=headers).status_code == 413


def test_heatmap_is_a_png_with_the_image_in_its_shape(judging, parts):
    answer = judging[0].post("/predict?heatmap=1", data=parts[0])
    heatmap = Image.open(io.BytesIO(base64.b64decode(answer.json["predictions"][0]["heatmap"])))
    assert (heatmap.format, heatmap.size) == ("PNG", (320, 320))


def test_unreadable_image_is_a_verdict_beside_others_and_422_alone(judging, parts):
    calls = judging[0]
    answer = calls.post("/predict", data=form((b"text", "a.jpeg"), (parts[0], "b.jpeg")))
    assert answer.status_code == 200
    assert [one["verdict"] for one in answer.json["predictions"]][0] == "error"
    answer = calls.post("/predict", data=form((parts[0][:200], "cut.jpeg")))
    assert answer.status_code == answer.json["status"] == 422
    assert answer.json["message"].startswith("cut.jpeg cannot be decoded")
    (found,) = answer.json["predictions"]
    assert (found["verdict"], found["probability"], found["review"]) == ("error", None, True)
    assert judging[1].verdicts.one(found["id"]).waits == "error"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\line\\part.bmp", "part.bmp"),
        ("a\nb\x1b[2J.jpeg", "a\\nb\\x1b[2J.jpeg"),
        ("=cmd.jpeg", "=cmd.jpeg"),
        ("<script>.jpeg", "<script>.jpeg"),
        ("", ""),
        ("é" * 200, "é" * 200),
    ],
)
def test_name_is_text_and_never_a_path(judging, parts, tmp_path, name, shown):
    calls, made = judging
    before = {path for path in tmp_path.rglob("*") if "line" not in path.parts[-2:]}
    answer = calls.post("/predict", data=parts[0], query_string={"name": name})
    assert answer.json["predictions"][0]["name"] == shown
    answer = calls.post("/predict", data=form((parts[0], name or "x")))
    assert answer.status_code in (200, 400)  # not every name can stand in a form
    assert {path for path in tmp_path.rglob("*") if "line" not in path.parts[-2:]} == before
    page = client(made).get("/line").text
    assert "<script>.jpeg" not in page


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ({"data": b""}, 400, "The body is empty"),
        ({"data": {"text": "no file"}, "content_type": "multipart/form-data"}, 400, "has no file"),
        ({"data": b"x", "query_string": "heatmap=maybe"}, 400, "heatmap is maybe"),
        ({"data": b"x", "query_string": "source=other"}, 400, "source is other"),
        ({"data": b"x", "query_string": "name=" + "a" * 300}, 400, "name is aaa"),
        ({"data": b"--x", "content_type": "multipart/form-data; boundary=x"}, 400, "has no file"),
        ({"data": b"--x", "content_type": "multipart/form-data"}, 400, ""),
    ],
    ids=range(7),
)
def test_wrong_call_is_400_with_what_is_expected(judging, call, status, message):
    answer = judging[0].post("/predict", **call)
    assert answer.status_code == answer.json["status"] == status
    assert message in answer.json["message"]


def test_too_many_and_too_large_images_are_refused(judging, parts):
    many = form(*((parts[0], f"{number}.jpeg") for number in range(predict.MOST_IMAGES + 1)))
    answer = judging[0].post("/predict", data=many)
    assert answer.status_code == 400 and "at most 64" in answer.json["message"]
    large = b"a" * (predict.LARGEST_BODY + 1)
    assert judging[0].post("/predict", data=large).status_code == 413


def test_huge_dimensions_are_an_error_and_take_no_memory(judging):
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    answer = judging[0].post("/predict", data=file.getvalue())
    assert answer.status_code == 422 and "900 megapixels" in answer.json["message"]


def test_without_a_model_it_says_what_to_do(tmp_path):
    made = backend(tmp_path)
    made.serving.trouble = NOTHING
    answer = client(made).post("/predict", data=b"x")
    assert answer.status_code == 503 and "Train one with src/train.py" in answer.json["message"]
    assert answer.headers["Retry-After"]


def test_calls_wait_for_a_core_and_too_many_are_sent_away(judging, parts, monkeypatch):
    calls, made = judging
    held = threading.Event()

    def slow(model, items):
        held.wait(20)
        return [judged()]

    monkeypatch.setattr(serving, "judge", slow)
    made.serving._places = threading.BoundedSemaphore(3)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client(made).post, "/predict", data=parts[0]) for _ in range(3)]
        wait_for(lambda: made.serving._places._value == 0)
        answer = calls.post("/predict", data=parts[0])
        assert (answer.status_code, answer.json["message"]) == (503, serving.TOO_MANY)
        held.set()
        assert [one.result().status_code for one in waiting] == [200] * 3
    assert calls.post("/predict", data=parts[0]).status_code == 200


@pytest.mark.parametrize(
    ("tokens", "address", "given", "status"),
    [
        ({}, LOCAL, None, 200),
        ({}, OTHER, None, 403),
        ({Role.ENGINEER: "e"}, LOCAL, None, 401),
        ({Role.ENGINEER: "e"}, OTHER, "e", 200),
        ({Role.ENGINEER: "e", Role.OPERATOR: "o"}, OTHER, "o", 200),
        ({Role.ENGINEER: "e", Role.VIEWER: "v"}, OTHER, "v", 403),
        ({Role.OPERATOR: "o"}, OTHER, "o", 200),
        ({Role.OPERATOR: "o"}, LOCAL, None, 200),
    ],
)
def test_verdicts_are_for_operators(tmp_path, model_folder, parts, tokens, address, given, status):
    headers = {"Authorization": f"Bearer {given}"} if given else {}
    calls = client(backend(tmp_path, tokens, model=model_folder), address)
    assert calls.post("/predict", data=parts[0], headers=headers).status_code == status


class Registry:
    """Stands in for `Production`: what it says is set by the test."""

    def __init__(self, model_folder: Path):
        self.version, self.folder = 1, model_folder
        self.waits: list[float] = []
        self.answers_asks = True
        self._said = 1

    def current(self):
        from defect_detection.inference.production import LocalVersion

        return LocalVersion("Production_Reg", self.version, 0.9, str(self.folder), "now")

    def moved(self) -> bool:
        moved, self._said = self._said != self.version, self.version
        return moved

    def ask(self, after: float) -> bool:
        self.waits.append(after)
        return self.answers_asks

    def close(self) -> None:
        pass


def test_alias_is_followed_without_a_restart(tmp_path, model_folder, monkeypatch, parts):
    monkeypatch.setattr(serving, "LOOK_EVERY", 0.01)
    registry, made = Registry(model_folder), backend(tmp_path)
    following = Serving(lambda: registry, made.store)
    following.begin()
    wait_for(lambda: following.model)
    assert (following.model.name, following.trouble) == (MODEL, "")
    registry.version = 2
    wait_for(lambda: following.model.name == "Production_Reg/2")
    registry.version, registry.folder = 3, tmp_path  # damaged
    time.sleep(0.2)
    assert following.model.name == "Production_Reg/2"


def test_version_that_the_store_names_is_asked_for_until_it_is_loaded(tmp_path, monkeypatch):
    """Soon, also if the registry was asked just before; then now and then, as files come back."""
    registry, made = Registry(tmp_path), backend(tmp_path)
    following = Serving(lambda: registry, made.store)
    following.model = made.serving.model = MODEL_THAT_JUDGES
    named = {"registry": "Production_Reg", "version": 2, "acc": 0.9}
    monkeypatch.setattr(made.store, "last", lambda: Look(True, named, 0.0))
    registry.answers_asks = False
    following._follow()
    registry.answers_asks = True
    for _ in range(3):
        following._follow()
    assert registry.waits == [serving.SOON, serving.SOON, serving.AGAIN, serving.AGAIN]
    named = {"registry": "Production_Reg", "version": 3, "acc": 0.9}
    following._follow()
    assert registry.waits[-1] == serving.SOON
    assert following.trouble == ""
    monkeypatch.setattr(serving, "BEHIND_AFTER", 0)
    following._follow()
    assert following.trouble.startswith("Version 3 is in production, but cannot be loaded")


def test_model_that_cannot_be_loaded_is_said_and_tried_again(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(serving, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(serving, "AGAIN", 0.05)
    registry = Registry(tmp_path)
    following = Serving(lambda: registry, backend(tmp_path).store)
    following.begin()
    wait_for(lambda: "being loaded" not in following.trouble)
    assert str(tmp_path) in following.trouble and following.model is None
    registry.folder = model_folder
    wait_for(lambda: following.model)
    assert following.trouble == ""


def test_model_is_named_by_health(judging, model_folder):
    calls, made = judging
    assert calls.get("/health").json["model"] == MODEL
    made.serving.model = NamedModel.load("Production_Reg/2", str(model_folder))
    assert calls.get("/health").json["model"] == "Production_Reg/2"
