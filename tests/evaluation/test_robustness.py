"""The same images in other conditions."""

import numpy as np
import pytest

from defect_detection.evaluation import robustness
from defect_detection.evaluation.metrics import Rate
from defect_detection.runtime.decision import OperatingPoint

POINT = OperatingPoint(0.5, 0.45, 0.55)


class Bright:
    """Takes the mean brightness, in [0, 1], for the probability of a defect."""

    point = POINT

    def probabilities(self, pictures: np.ndarray) -> np.ndarray:
        return pictures.mean((1, 2, 3)).astype(np.float32) / 255


def grey(*tones: int) -> np.ndarray:
    return np.stack([np.full((32, 32, 1), tone, np.uint8) for tone in tones])


def test_table_counts_what_each_disturbance_does():
    pictures, labels = grey(140, 240, 110, 20), np.array([1, 1, 0, 0])
    rows = {row.name.split(":")[0]: row for row in robustness.table(Bright(), pictures, labels)}
    assert list(rows) == [
        "as they are", "darker", "brighter", "blurred", "noisier", "rotated", "recompressed"
    ]  # fmt: skip
    assert rows["as they are"].accuracy == 1
    # 140 * 0.7 passes, 110 * 1.3 is rejected: errors of the two kinds.
    assert (rows["darker"].accuracy, rows["darker"].escapes) == (0.75, Rate(1, 2))
    assert (rows["brighter"].accuracy, rows["brighter"].overkill) == (0.75, Rate(1, 2))


@pytest.mark.parametrize("name", robustness.DISTURBANCES)
def test_disturbance_changes_pixels_but_not_shape_and_is_the_same_again(name):
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (64, 48), np.uint8)
    disturb = robustness.DISTURBANCES[name]
    once, again = (disturb(picture, np.random.default_rng(0)) for _ in range(2))
    assert once.shape == picture.shape and once.dtype == np.uint8
    assert (once == again).all()
    assert (once == picture).all() == (name == "as they are")


def test_rotation_turns_by_the_angle_it_says():
    picture = np.zeros((65, 65), np.uint8)
    picture[32, 60] = 255  # 28 to the right of the centre
    turned = robustness.DISTURBANCES["rotated: 10 degrees"](picture, None)
    row, column = np.unravel_index(turned.argmax(), turned.shape)
    assert np.hypot(row - 32, column - 32) == pytest.approx(28, abs=1)
    assert np.degrees(np.arctan2(32 - row, column - 32)) == pytest.approx(10, abs=1.5)


def test_pictures_far_from_the_threshold_do_not_flip_and_near_ones_are_in_the_band():
    found = robustness.repeatability(Bright(), grey(20, 240, 128, 127))
    assert found.flipped == Rate(2, 4)
    assert found.flipped_past_review == Rate(0, 4)
