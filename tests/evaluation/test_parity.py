"""Whether what serves judges as what was trained."""

import numpy as np
import pytest

from conftest import small_cnn
from defect_detection.evaluation import parity
from defect_detection.evaluation.parity import Parity
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.preprocessing import ImageFormat
from defect_detection.settings import QUANTIZE
from defect_detection.training import network

TAKES = ImageFormat(32, 32)
PICTURES = np.random.default_rng(0).integers(0, 256, (100, *TAKES.shape), np.uint8)


@pytest.fixture(scope="module")
def cnn():
    return small_cnn(TAKES.shape)


@pytest.fixture(scope="module")
def converted(cnn):
    """The LiteRT model, by what the weights are kept as."""
    return {kind: network.to_litert(cnn, kind) for kind in QUANTIZE}


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_each_kind_of_weights_is_converted_and_compared(cnn, converted, quantize):
    served = Classifier(ServedModel(converted[quantize], TAKES)).probabilities(PICTURES)
    found = parity.compare(cnn, PICTURES, served, ())
    assert found.of == 100
    assert found.within(quantize)
    exact = {"none": 1e-5, "float16": 1e-3, "int8": 0.02}
    assert found.largest < exact[quantize]
    assert quantize == "none" or found.largest > 1e-6  # it is not the same model again


def test_weights_that_are_kept_smaller_make_a_smaller_file(converted):
    sizes = {kind: len(content) for kind, content in converted.items()}
    assert sizes["none"] > sizes["float16"] > sizes["int8"]


@pytest.mark.long
def test_one_flipped_verdict_is_too_many_however_small_the_difference(cnn):
    expected = cnn.predict(PICTURES.astype("f"), verbose=0)[:, 0]
    threshold = float(np.sort(expected)[50])
    other = np.where(expected == threshold, np.nextafter(expected, 0), expected)
    assert parity.compare(cnn, PICTURES, expected, (threshold,)).flipped == 0
    found = parity.compare(cnn, PICTURES, other, (0.999, threshold))
    assert found.flipped == 1
    assert not found.within("int8")


@pytest.mark.parametrize(
    ("largest", "quantize", "within"),
    [
        (1e-4, "none", True),
        (2e-4, "none", False),
        (2e-4, "float16", True),
        (1e-2, "float16", False),
        (1e-2, "int8", True),
        (0.1, "int8", False),
        (float("nan"), "int8", False),
    ],
)
def test_each_kind_has_its_own_tolerance(largest, quantize, within):
    assert Parity(largest, 0, 10).within(quantize) == within
