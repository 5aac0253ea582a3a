"""Which images a model may judge."""

import cv2
import numpy as np
import pytest

import truth
from conftest import Project, draw_part, encoded
from defect_detection.dataset import decoded
from defect_detection.dataset.folder import DataFolder
from defect_detection.runtime import preprocessing
from defect_detection.runtime.ood import REASONS, OodDetector
from defect_detection.runtime.preprocessing import ImageFormat

TAKES = ImageFormat(64, 64)


def parts(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = [encoded(draw_part(rng, defect=number % 2 == 0)) for number in range(count)]
    return np.stack([preprocessing.decode(one, TAKES) for one in drawn])


@pytest.fixture(scope="module")
def scope() -> OodDetector:
    return OodDetector.fit(parts(200, seed=0))


def reasons(scope: OodDetector, pictures: np.ndarray) -> list[str]:
    return scope.reasons(pictures[..., 0].astype(np.float32))


def test_pictures_of_parts_are_in_scope_also_in_other_light(scope):
    fresh = parts(400, seed=1)
    for light in (0.7, 1.0, 1.2):
        found = reasons(scope, np.clip(fresh * light, 0, 255).astype(np.uint8))
        assert sum(map(bool, found)) <= 2, (light, found)


def other_things() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    rows, columns = np.mgrid[:64, :64]
    some = parts(1, seed=3)[0, ..., 0]
    return {
        "too dark": np.zeros((64, 64)),
        "too bright": np.full((64, 64), 255),
        "almost no contrast": rng.normal(150, 2, (64, 64)),
        "blurred": cv2.GaussianBlur(some, (0, 0), 3),
        "noisy": some + rng.normal(0, 40, (64, 64)),
        "not like the training pictures": 120 + 90 * np.sign(np.sin(columns / 5)),
        "dark, then unlike": 10 * ((rows // 8 + columns // 8) % 2),
    }


@pytest.mark.parametrize("reason", other_things())
def test_other_pictures_are_out_of_scope_for_the_first_reason_that_holds(scope, reason):
    picture = np.clip(other_things()[reason], 0, 255).astype(np.uint8)[np.newaxis, ..., np.newaxis]
    expected = reason if reason in REASONS else "too dark"
    assert reasons(scope, picture) == [expected]
    among = np.concatenate([parts(2, seed=0), picture])
    assert reasons(scope, among) == ["", "", expected]  # what stands beside it changes nothing


def test_turned_upside_down_in_grey_it_is_no_part(scope):
    found = reasons(scope, 255 - parts(20, seed=4))
    assert all(found)


def test_a_few_broken_training_pictures_do_not_widen_the_limits(scope):
    many = np.concatenate([parts(2000, seed=5), np.zeros((1, *TAKES.shape), np.uint8)])
    assert reasons(OodDetector.fit(many), np.zeros((1, *TAKES.shape), np.uint8)) == ["too dark"]


def test_few_training_pictures_do(tmp_path):
    few = OodDetector.fit(parts(4, seed=6))
    assert reasons(few, parts(4, seed=6)) == [""] * 4
    assert all(reasons(few, np.zeros((1, *TAKES.shape), np.uint8)))


def test_scope_comes_back_as_it_was_saved(scope, tmp_path):
    scope.save(tmp_path / "scope.npz")
    again = OodDetector.load(tmp_path / "scope.npz")
    fresh = np.concatenate([parts(20, seed=7), 255 - parts(20, seed=8)])
    assert reasons(again, fresh) == reasons(scope, fresh)
    assert again.dark == scope.dark


@pytest.mark.real
def test_real_castings_are_in_scope_and_other_pictures_are_not(tmp_path):
    if not truth.CASTINGS.is_dir():
        pytest.skip("the real castings are not here (../shared/data/casting)")
    size = ImageFormat(128, 128)
    data = DataFolder(truth.CASTINGS, Project.cache)
    training, testing = (
        decoded.decode(data, data.images(side), side, size).images for side in ("train", "test")
    )
    scope = OodDetector.fit(training)
    assert sum(map(bool, reasons(scope, testing))) <= 0.005 * len(testing)
    some = testing[::10]
    blurred = np.stack([cv2.GaussianBlur(one, (0, 0), 2)[..., np.newaxis] for one in some])
    assert set(reasons(scope, blurred)) == {"blurred"}
    assert all(reasons(scope, 255 - some))
