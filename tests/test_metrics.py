"""Counts and rates."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from defect_detection import metrics


def test_counts_and_rates_of_a_known_case():
    labels = np.array([1, 1, 1, 0, 0, 0, 0])
    scores = metrics.score(labels, np.array([0.9, 0.5, 0.1, 0.8, 0.2, 0.3, 0.4]), 0.5)
    assert (scores.defects_found, scores.defects_missed) == (2, 1)
    assert (scores.ok_rejected, scores.ok_passed) == (1, 3)
    assert scores.accuracy == pytest.approx(5 / 7)
    assert scores.recall_def_front == pytest.approx(2 / 3)
    assert scores.recall_ok_front == pytest.approx(3 / 4)
    assert scores.roc_auc == pytest.approx(7 / 12)


def test_high_probabilities_of_defects_give_the_highest_auc():
    labels = np.array([0, 0, 1, 1])
    assert metrics.score(labels, np.array([0.1, 0.2, 0.7, 0.9]), 0.5).roc_auc == 1
    assert metrics.score(labels, np.array([0.9, 0.7, 0.2, 0.1]), 0.5).roc_auc == 0


def test_all_figures_are_logged_by_name():
    figures = metrics.score(np.array([1, 0]), np.array([1.0, 0.0]), 0.5).as_dict()
    assert figures == {
        "defects_found": 1,
        "defects_missed": 0,
        "ok_rejected": 0,
        "ok_passed": 1,
        "roc_auc": 1.0,
        "calibration_error": 0.0,
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,
        "recall_def_front": 1.0,
        "recall_ok_front": 1.0,
    }


def test_balanced_accuracy_is_not_raised_by_guessing_one_class():
    labels = np.array([1] * 9 + [0])
    scores = metrics.score(labels, np.ones(10), 0.5)
    assert (scores.accuracy, scores.balanced_accuracy) == (0.9, 0.5)


@pytest.mark.parametrize("trials", [1, 7, 20, 715])
def test_bounds_are_those_of_the_binomial_distribution(trials):
    for successes in {0, 1, trials // 2, trials - 1, trials}:
        low, high = metrics.bounds(successes, trials)
        # The definition: either bound is the rate at which this count is in a tail of 2.5 %.
        if successes:
            assert stats.binom.sf(successes - 1, trials, low) == pytest.approx(0.025, abs=1e-9)
        else:
            assert low == 0
        if successes < trials:
            assert stats.binom.cdf(successes, trials, high) == pytest.approx(0.025, abs=1e-9)
        else:
            assert high == 1
    assert metrics.bounds(0, 0) == (0, 1)


def test_photograph_is_judged_by_the_mean_of_its_pictures_once_for_each_label():
    labels = np.array([1, 1, 0, 0, 1])
    probabilities = np.array([0.9, 0.3, 0.2, 0.4, 0.8])
    found = metrics.by_photograph(labels, probabilities, np.array([7, 7, 3, 7, 3]))
    assert sorted(zip(*found, strict=True)) == pytest.approx(
        [(0, 0.2), (0, 0.4), (1, 0.6), (1, 0.8)]
    )


def test_unseen_pictures_are_counted_by_picture_and_by_photograph():
    labels = np.array([1] * 6 + [0])
    probabilities = np.array([0.9, 0.9, 0.4, 0.1, 0.1, 0.9, 0.7])
    found = metrics.unseen(labels, probabilities, np.array([1, 1, 1, 2, 2, 2, 3]), 0.5)
    assert (found.pictures, found.right) == (7, 3)
    assert (found.photographs, found.photographs_right) == (3, 1)
    assert found.accuracy == 3 / 7
    assert found.bounds == metrics.bounds(1, 3)
    assert str(found) == (
        "accuracy on 7 unseen pictures 0.4286; by photograph 1 of 3 right, 95% bounds 0.008 to "
        "0.906: too few to tell"
    )


def test_many_unseen_photographs_tell_and_none_tells_nothing():
    many = metrics.Unseen(pictures=100, right=99, photographs=100, photographs_right=99)
    assert str(many).endswith("99 of 100 right, 95% bounds 0.946 to 1.000")
    assert str(metrics.Unseen(0, 0, 0, 0)) == (
        "no unseen picture: nothing is known about new parts"
    )


def test_calibration_error_of_a_known_case():
    labels = np.array([1, 1, 1, 0, 0])
    probabilities = np.array([0.92, 0.96, 0.35, 0.31, 1.0])
    # [0.3, 0.4): mean 0.33, share 0.5, 2 of 5. [0.9, 1]: mean 0.96, share 2/3, 3 of 5.
    expected = 2 / 5 * (0.5 - 0.33) + 3 / 5 * (0.96 - 2 / 3)
    assert metrics.calibration_error(labels, probabilities) == pytest.approx(expected, abs=1e-12)


def test_temperature_undoes_what_was_done_to_the_log_odds():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, 20_000)
    labels = (rng.random(20_000) < expit(log_odds)).astype(int)
    for factor in (1, 2.5, 0.6):
        found = metrics.temperature(labels, expit(log_odds * factor), np.ones(20_000))
        assert found == pytest.approx(factor, rel=0.05)


def test_temperature_stays_in_its_limits_where_all_is_right_or_all_is_wrong():
    labels = np.array([0, 1])
    low, high = metrics.TEMPERATURES
    assert metrics.temperature(labels, np.array([0.0, 1.0]), np.ones(2)) >= low
    assert metrics.temperature(labels, np.array([0.1, 0.9]), np.ones(2)) == pytest.approx(low, 0.01)
    assert metrics.temperature(labels, np.array([1.0, 0.0]), np.ones(2)) == pytest.approx(
        high, 0.01
    )
