"""The served model."""

import subprocess
import sys

import pytest

from conftest import ROOT
from defect_detection import PipelineError
from defect_detection.classifier import Classifier


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


def test_inference_imports_nothing_that_only_training_needs():
    program = (
        "import sys; sys.path.insert(0, 'src'); import inference;"
        "heavy = ('tensorflow', 'keras', 'sklearn', 'cv2', 'matplotlib');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
