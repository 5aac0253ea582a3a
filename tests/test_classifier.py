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
