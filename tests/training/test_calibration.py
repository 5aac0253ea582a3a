"""Calibration and operating point."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from defect_detection.evaluation import metrics
from defect_detection.runtime import decision
from defect_detection.runtime.decision import OperatingPoint
from defect_detection.training import calibration


@st.composite
def judged(draw) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both classes, and float32 probabilities with ties and extremes."""
    probability = st.one_of(
        st.sampled_from([0.0, 1.0, 0.5, 1e-9, float(np.float32(1 - 1e-7))]),
        st.floats(0, 1, width=32),
    )
    pairs = draw(st.lists(st.tuples(st.integers(0, 1), probability), max_size=60))
    pairs += [(1, draw(probability)), (0, draw(probability))]
    labels, probabilities = zip(*pairs, strict=True)
    return np.array(labels, np.uint8), np.array(probabilities, np.float32)


rates = st.floats(0, 0.99)


def test_calibration_undoes_what_was_done_to_the_log_odds():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, 20_000)
    labels = (rng.random(20_000) < expit(log_odds)).astype(int)
    for scale, shift in ((1, 0), (2.5, -1), (0.6, 0.8)):
        raw = expit(log_odds * scale + shift)
        found = calibration.calibrate(labels, raw, np.ones(20_000))
        assert found.scale == pytest.approx(1 / scale, rel=0.05)
        assert found.shift == pytest.approx(-shift / scale, abs=0.06)
        np.testing.assert_allclose(found.apply(raw), expit(log_odds), atol=0.02)


def test_calibration_meets_probabilities():
    log_odds = np.linspace(-5, 4, 50)
    found = calibration.calibrate(expit(log_odds), expit(2 * log_odds - 1), np.ones(50))
    assert (found.scale, found.shift) == (
        pytest.approx(0.5, abs=1e-3),
        pytest.approx(0.5, abs=1e-3),
    )


def test_mean_in_log_odds_counts_what_it_is_told_to():
    judged = expit(np.array([[1.0, 3.0, 9.0], [-2.0, 5.0, 0.0]]))
    counted = np.array([[True, True, False], [True, False, True]])
    np.testing.assert_allclose(calibration.mean_in_log_odds(judged, counted), expit([2.0, -1.0]))


def test_calibration_counts_by_weight():
    labels, raw = np.array([1, 0, 1, 0]), np.array([0.7, 0.7, 0.3, 0.3])
    found = calibration.calibrate(labels, raw, np.array([3.0, 1.0, 1.0, 3.0]))
    np.testing.assert_allclose(found.apply(raw), [0.75, 0.75, 0.25, 0.25], atol=1e-3)


def test_calibration_stays_in_its_limits_where_all_is_right_or_all_is_wrong():
    labels = np.array([0, 1])
    low, high = calibration.SCALES
    for raw, scale in (([0.1, 0.9], high), ([0.9, 0.1], low), ([0.0, 1.0], None)):
        found = calibration.calibrate(labels, np.array(raw), np.ones(2))
        assert found.scale == pytest.approx(scale) if scale else low <= found.scale <= high
        assert found.shift == pytest.approx(0, abs=0.01)


@given(judged(), rates, rates)
def test_threshold_lets_no_more_escape_than_asked_for_and_rises_with_it(case, one, other):
    labels, probabilities = case
    thresholds = [
        calibration.choose_threshold(labels, probabilities, rate) for rate in (one, other)
    ]
    for rate, threshold in zip((one, other), thresholds, strict=True):
        point = OperatingPoint(threshold, threshold, threshold)
        escapes = metrics.error_rates(labels, probabilities, point).escapes
        assert escapes.count <= rate * escapes.of
        # One image and a batch are decided alike.
        each = [decision.is_defect(float(p), threshold) for p in probabilities]
        assert each == decision.is_defect(probabilities, threshold).tolist()
    assert (one <= other) <= (thresholds[0] <= thresholds[1])


@given(judged(), rates)
def test_no_threshold_that_keeps_the_rate_rejects_fewer_good_parts(case, rate):
    labels, probabilities = case

    def at(threshold: float) -> metrics.ErrorRates:
        return metrics.error_rates(labels, probabilities, OperatingPoint(threshold, 0, 0))

    chosen = at(calibration.choose_threshold(labels, probabilities, rate))
    for other in map(at, [*probabilities.tolist(), 1.0]):
        if other.escapes.count <= rate * other.escapes.of:
            assert chosen.overkill.count <= other.overkill.count
            if chosen.overkill.count == other.overkill.count:
                assert chosen.escapes.count <= other.escapes.count


def test_threshold_lies_half_way_in_the_gap():
    labels, odds = np.array([1, 1, 0, 0]), np.array([3.0, 1.0, -2.0, -4.0])
    found = calibration.choose_threshold(labels, expit(odds).astype(np.float32), 0)
    assert found == pytest.approx(expit(-0.5), rel=1e-6)
    # No good part lies between the defects: to let one through would win nothing.
    assert calibration.choose_threshold(labels, expit(odds).astype(np.float32), 0.5) == found
    labels, odds = np.array([1, 0, 1, 0]), np.array([3.0, 2.0, 1.0, -4.0])
    found = calibration.choose_threshold(labels, expit(odds).astype(np.float32), 0.5)
    assert found == pytest.approx(expit(2.5), rel=1e-6)


@given(judged(), rates, rates)
def test_band_holds_the_threshold_and_no_more_pictures_than_asked_for(case, rate, share):
    labels, probabilities = case
    point = calibration.choose_operating_point(labels, probabilities, rate, share)
    assert point.review_low <= point.threshold <= point.review_high
    inside = point.needs_review(probabilities)
    assert inside.sum() <= share * len(labels)
    each = [point.needs_review(float(p)) for p in probabilities]
    assert each == inside.tolist()


def test_band_takes_the_nearest_in_log_odds_as_many_as_asked_for():
    odds = np.array([-6, -1.2, -0.4, 0.3, 1.1, 7], np.float32)
    labels, probabilities = np.array([0, 0, 0, 1, 1, 1]), expit(odds)
    point = calibration.choose_operating_point(labels, probabilities, 0, 0.7)
    assert point.needs_review(probabilities).tolist() == [False, True, True, True, True, False]
    assert (
        calibration.choose_operating_point(labels, probabilities, 0, 0)
        .needs_review(probabilities)
        .sum()
        == 0
    )
