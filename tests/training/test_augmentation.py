"""Variants of images."""

import cv2
import numpy as np
import pytest

from conftest import draw_part
from defect_detection.training import augmentation
from defect_detection.training.augmentation import Augmentation
from defect_detection.training.network import tf

COUNT = 96


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = [np.asarray(draw_part(rng, True, 64)) for _ in range(COUNT)]
    return np.stack(drawn)[..., np.newaxis].astype(np.float32)


def variants(pictures: np.ndarray, seed: int = 0, gentle: bool = False) -> np.ndarray:
    augment = Augmentation(*pictures.shape[1:3])
    none = np.zeros(len(pictures), bool)
    return augment(pictures, none, none | gentle, tf.constant([seed, 5], tf.int64)).numpy()


def test_variants_keep_shape_and_range_and_differ(pictures):
    found = variants(pictures)
    assert found.shape == pictures.shape and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 255
    assert np.abs(found - pictures).mean((1, 2, 3)).max() > 10


def test_same_seed_gives_the_same_variants_another_seed_others(pictures):
    np.testing.assert_array_equal(variants(pictures, 1), variants(pictures, 1))
    assert np.abs(variants(pictures, 1) - variants(pictures, 2)).mean() > 5


def test_gentle_variants_are_nearly_the_picture_or_its_mirror_image(pictures):
    def changes(found):
        mirrored = pictures[:, :, ::-1]
        return np.minimum(*(np.abs(found - one).mean((1, 2, 3)) for one in (pictures, mirrored)))

    gentle, strong = changes(variants(pictures, gentle=True)), changes(variants(pictures))
    assert 1 < np.median(gentle) < 0.5 * np.median(strong)
    flat = np.full((COUNT, 64, 64, 1), 128, np.float32)
    light = np.median(variants(flat, gentle=True), (1, 2, 3))
    assert 128 * 0.8 < light.min() and light.max() < 128 * 1.2


def test_colour_is_varied_without_changing_its_hue():
    orange = np.tile(np.array([200, 120, 40], np.float32), (COUNT, 64, 64, 1))
    found = np.median(variants(orange, gentle=True), (1, 2))
    ratio = found[:, 0] / found[:, 2]
    assert found.shape == (COUNT, 3) and (found[:, 0] > found[:, 1]).all()
    assert np.median(ratio) == pytest.approx(5, rel=0.1)


def test_what_is_in_the_middle_stays_and_turns_by_any_angle():
    arrow = np.zeros((COUNT, 64, 64, 1), np.float32)
    arrow[:, 30:34, 44:56] = 255  # a spot to the right of the middle
    angles = []
    for one in variants(arrow)[..., 0]:
        smooth = cv2.blur(one, (3, 3))  # without noise
        y, x = np.argwhere(smooth > 0.6 * smooth.max()).mean(0) - 31.5
        assert 8 < np.hypot(x, y) < 30
        angles.append(np.degrees(np.arctan2(y, x)) % 360)
    assert all(np.histogram(angles, bins=8, range=(0, 360))[0])


def test_small_defect_stays_visible():
    """A dark spot, 4 pixels wide, is still there in every variant, darker than the noise."""
    spotted = np.full((COUNT, 64, 64, 1), 170, np.float32)
    spotted[:, 36:40, 24:28] = 90
    y, x = np.mgrid[:64, :64] - 31.5
    middle = np.hypot(x, y) < 20
    for one in variants(spotted)[..., 0]:
        smooth = cv2.blur(one, (3, 3))[middle]
        assert np.median(smooth) - smooth.min() > 15


def test_blemish_is_on_those_that_get_one_and_on_no_other():
    good = np.full((COUNT, 64, 64, 1), 120, np.float32)
    augment = Augmentation(64, 64)
    which = np.arange(COUNT) % 2 == 0
    # The same seed with and without: what differs is the blemish.
    seed = tf.constant([0, 5], tf.int64)
    off = np.zeros(COUNT, bool)
    some, none = (augment(good, blemished, off, seed).numpy() for blemished in (which, off))
    strongest = np.abs(some - none).max((1, 2, 3))
    assert (strongest[which] > 10).mean() > 0.9
    assert strongest[~which].max() == 0


def test_some_blemishes_show_what_lies_beside_them(monkeypatch):
    count = 8 * COUNT
    halves = np.full((count, 64, 64, 1), 20, np.float32)
    halves[:, :, 32:] = 240

    def blemished():
        draw = augmentation._Draws(tf.constant(count), tf.constant([3, 1], tf.int64))
        return Augmentation(64, 64)._blemish(halves, draw).numpy()

    with_nicks = blemished()
    monkeypatch.setattr(augmentation, "VISIBLE", 256)  # no nick makes so much of a difference
    nicked = np.abs(with_nicks - blemished()).max((1, 2, 3)) > 1
    assert 10 < nicked.sum() < count / 2
    changed = np.abs(with_nicks - halves)[nicked].max((1, 2, 3))
    assert changed.min() > 20


def test_strengths_go_half_as_far_again_as_the_robustness_table():
    grey = np.full((COUNT * 4, 64, 64, 1), 128, np.float32)
    found = variants(grey)
    noise = np.median(np.abs(np.diff(found[:, 20:44, 20:44, 0], axis=2)), (1, 2)) / 0.95
    assert 10 < noise.max() < 14 and np.median(noise) < 3  # 8 in the table
    light = np.median(found, (1, 2, 3))
    assert light.min() < 128 * 0.65 and light.max() > 128 * 1.35  # 0.7 and 1.3


def test_some_are_written_as_jpeg_and_read_again(pictures):
    draw = augmentation._Draws(COUNT, tf.constant([1, 2], tf.int64))
    again = Augmentation(64, 64)._recompress(pictures, draw).numpy()
    changed = np.abs(again - pictures).max((1, 2, 3))
    assert (changed > 1).mean() == pytest.approx(augmentation.RECOMPRESSED, abs=0.2)
    assert (changed == 0).mean() == pytest.approx(1 - augmentation.RECOMPRESSED, abs=0.2)

    def error(picture, quality):  # as the robustness table's
        written = cv2.imencode(".jpeg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return np.abs(cv2.imdecode(written, cv2.IMREAD_GRAYSCALE) - picture[..., 0]).mean()

    worse = [
        np.abs(one - picture).mean() > error(picture, 30)
        for one, picture in zip(again, pictures, strict=True)
    ]
    assert any(worse)


def test_blur_is_that_of_a_gaussian_and_sharpening_its_opposite():
    step = np.zeros((3, 64, 64, 1), np.float32)
    step[:, :, 32:] = 0.5
    step += 0.25
    focus = tf.constant([1.0, 0.0, -1.0])
    blurred, same, sharpened = Augmentation(64, 64)._focus(step, focus).numpy()[..., 0]
    np.testing.assert_array_equal(same, step[1, ..., 0])
    slope = np.diff(blurred[32])
    width = np.sqrt((slope * (np.arange(63) - 31) ** 2).sum() / slope.sum())
    assert width == pytest.approx(np.sqrt(augmentation.BLURS / 2), abs=0.05)
    assert sharpened.max() > 0.8 and sharpened.min() < 0.2
