"""Variants of pictures."""

import numpy as np
import pytest

from conftest import draw_part
from defect_detection import augmentation
from defect_detection.augmentation import Augmentation
from defect_detection.model import tf

COUNT = 96


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = [np.asarray(draw_part(rng, True, 64)) for _ in range(COUNT)]
    return np.stack(drawn)[..., np.newaxis].astype(np.float32)


def variants(pictures: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return variants of defects, which get no blemish."""
    return varied(pictures, np.ones(len(pictures)), seed)[0]


def varied(pictures: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    augment = Augmentation(pictures.shape[1:3])
    labels = labels.astype(np.float32)
    return tuple(one.numpy() for one in augment(pictures, labels, tf.constant([seed, 5], tf.int64)))


def test_variants_keep_shape_and_range_and_differ(pictures):
    found = variants(pictures)
    assert found.shape == pictures.shape and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 255
    assert np.abs(found - pictures).mean((1, 2, 3)).max() > 10


def test_same_seed_gives_the_same_variants_another_seed_others(pictures):
    np.testing.assert_array_equal(variants(pictures, 1), variants(pictures, 1))
    assert np.abs(variants(pictures, 1) - variants(pictures, 2)).mean() > 5


def test_a_share_is_only_mirrored(pictures):
    untouched = [
        min(np.abs(one - other).max(), np.abs(one - other[:, ::-1]).max()) < 0.01
        for one, other in zip(variants(pictures), pictures, strict=True)
    ]
    assert np.mean(untouched) == pytest.approx(augmentation.UNTOUCHED, abs=0.12)


def test_what_is_in_the_middle_stays_and_turns_by_any_angle():
    arrow = np.zeros((COUNT, 64, 64, 1), np.float32)
    arrow[:, 30:34, 44:56] = 255  # a spot to the right of the middle
    angles = []
    for one in variants(arrow)[..., 0]:
        y, x = np.argwhere(one > 0.6 * one.max()).mean(0) - 31.5
        assert 10 < np.hypot(x, y) < 30
        angles.append(np.degrees(np.arctan2(y, x)) % 360)
    assert all(np.histogram(angles, bins=8, range=(0, 360))[0])


def test_small_defect_stays_visible():
    """A dark spot, 4 pixels wide, is still there in every variant."""
    spotted = np.full((COUNT, 64, 64, 1), 170, np.float32)
    spotted[:, 36:40, 24:28] = 90
    y, x = np.mgrid[:64, :64] - 31.5
    middle = np.hypot(x, y) < 20
    for one in variants(spotted)[..., 0]:
        assert np.median(one[middle]) - one[middle].min() > 30


def test_a_share_of_the_good_parts_gets_a_blemish_and_counts_as_a_defect():
    good = np.full((COUNT * 10, 64, 64, 1), 120, np.float32)
    found, labels = varied(good, np.zeros(len(good)))
    assert labels.mean() == 1 / augmentation.SOME
    # Where nothing is lit otherwise, what differs from the grey of the part is the blemish.
    blemished = np.abs(found - 120).max((1, 2, 3)) > 25
    flat = np.ptp(found[labels == 0], (1, 2, 3)) < 0.01
    assert flat.mean() == pytest.approx(augmentation.UNTOUCHED, abs=0.07)
    assert blemished[labels == 1].mean() > 0.95


def test_defects_and_good_parts_are_learned_as_often():
    labels = (np.random.default_rng(0).random(2000) >= augmentation.GOOD).astype(float)
    _, after = varied(np.full((2000, 32, 32, 1), 120, np.float32), labels)
    assert after.mean() == pytest.approx(0.5, abs=0.04)
    assert (after[labels == 1] == 1).all()
