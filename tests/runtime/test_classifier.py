"""The served model."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from conftest import draw_part, encoded, small_cnn
from defect_detection import PipelineError
from defect_detection.runtime import classifier, preprocessing
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import OperatingPoint
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.ood import OodDetector
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.training import network

TAKES = ImageFormat(32, 32)
POINT = OperatingPoint(0.9, 0.9, 0.9)


@pytest.mark.parametrize("content", [None, "flavors: {}", "artifact_path: model"])
def test_folder_without_the_litert_flavour_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "MLmodel").write_text(content)
    with pytest.raises(PipelineError, match="holds no model that this version can serve"):
        Classifier.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\x1c\0\0\0TFL3" + bytes(1000)],
    ids=["empty", "no model", "beginning of one"],
)
def test_damaged_model_is_refused_in_one_line(tmp_path, content):
    described = "flavors: {litert: {data: model.tflite, image_size: [32, 32]}}"
    (tmp_path / "MLmodel").write_text(described)
    (tmp_path / "model.tflite").write_bytes(content)
    with pytest.raises(PipelineError, match="holds no model that this version can serve") as raised:
        Classifier.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def litert() -> bytes:
    return network.to_litert(small_cnn(TAKES.shape))


def test_model_with_other_outputs_is_refused_in_one_line(tmp_path, litert, monkeypatch):
    """As the first versions had them."""
    described = "flavors: {litert: {data: model.tflite, image_size: [32, 32]}}"
    (tmp_path / "MLmodel").write_text(described)
    (tmp_path / "model.tflite").write_bytes(litert)
    assert Classifier.load(tmp_path)
    monkeypatch.setattr(classifier, "PROBABILITY", "another")
    with pytest.raises(PipelineError, match="holds no model that this version can serve"):
        Classifier.load(tmp_path)


@pytest.fixture(scope="module")
def parts() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encoded(draw_part(rng, defect=number % 2 == 0)) for number in range(40)]


def test_many_threads_get_what_one_gets(litert, parts):
    classifier = Classifier(ServedModel(litert, TAKES), threads=1)
    alone = [classifier.classify(part) for part in parts]
    assert len({one.probability for one in alone}) > 30

    def judge(start: int) -> bool:
        # Batches of all sizes, so that interpreters are resized while others compute.
        chunk = parts[start : start + 1 + start % 7]
        expected = alone[start : start + 1 + start % 7]
        return all(
            one.verdict == other.verdict and abs(one.probability - other.probability) < 1e-6
            for one, other in zip(classifier.classify_all(chunk), expected, strict=True)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(judge, [n % 33 for n in range(231)]))


def test_calls_one_after_the_other_share_an_interpreter(litert, parts, monkeypatch):
    made = []
    real = Classifier._make
    monkeypatch.setattr(Classifier, "_make", lambda self: made.append(1) or real(self))
    classifier = Classifier(ServedModel(litert, TAKES))
    for part in parts[:5]:
        classifier.classify(part)
    assert len(made) == 1


def test_broken_pictures_stand_among_the_others_as_errors(litert, parts, tmp_path):
    classifier = Classifier(ServedModel(litert, TAKES))
    sources = [parts[0], b"", tmp_path / "gone.png", parts[1], parts[2][:700]]
    found = classifier.classify_all(sources)
    assert [one.verdict == "error" for one in found] == [False, True, True, False, True]
    assert [one.reason.split(" (")[0] for one in found] == [
        "",
        "is empty",
        "does not exist",
        "",
        "cannot be decoded",
    ]
    assert found[0].probability == classifier.classify(parts[0]).probability
    assert (found[1].probability, found[1].review, found[1].evidence) == (None, True, None)
    assert classifier.classify_all([]) == []
    assert {one.verdict for one in classifier.classify_all([b"", b"x"])} == {"error"}


def test_picture_out_of_scope_is_unknown_and_goes_to_a_person(litert, parts):
    pictures = np.stack([preprocessing.decode(part, TAKES) for part in parts])
    classifier = Classifier(ServedModel(litert, TAKES, POINT, OodDetector.fit(pictures)))
    black = np.zeros((1, *TAKES.shape), np.uint8)
    good, dark = classifier.judge(np.concatenate([pictures[:1], black]))
    assert (good.verdict, good.review, good.reason) == ("ok", False, "")
    assert (dark.verdict, dark.review, dark.reason) == ("unknown", True, "too dark")
    assert str(dark).endswith("  review  too dark")
    assert classifier.ood_reasons(black) == ["too dark"]
    anything = Classifier(ServedModel(litert, TAKES, POINT))
    assert anything.judge(black)[0].verdict == "ok"  # a version that was saved without a scope


def test_evidence_comes_with_the_verdict(litert, parts):
    classifier = Classifier(ServedModel(litert, TAKES))
    pictures = np.stack([preprocessing.decode(part, TAKES) for part in parts[:3]])
    _, maps = classifier.examine(pictures)
    for verdict, expected in zip(classifier.judge(pictures), maps, strict=True):
        np.testing.assert_array_equal(verdict.evidence, expected)
