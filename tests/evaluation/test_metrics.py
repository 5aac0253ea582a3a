"""Counts and rates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binom, hypergeom
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from defect_detection.evaluation import metrics
from defect_detection.evaluation.metrics import ErrorRates, Paired, Rate
from defect_detection.runtime.decision import OperatingPoint


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
        "accuracy on 7 unseen images 0.4286; by photograph 1 of 3 right, 95% bounds 0.008 to "
        "0.906: too few to tell"
    )


def test_many_unseen_photographs_tell_and_none_tells_nothing():
    many = metrics.Unseen(pictures=100, right=99, photographs=100, photographs_right=99)
    assert str(many).endswith("99 of 100 right, 95% bounds 0.946 to 1.000")
    assert str(metrics.Unseen(0, 0, 0, 0)) == ("no unseen image: nothing is known about new parts")


def test_calibration_error_of_a_known_case():
    labels = np.array([1, 1, 1, 0, 0])
    probabilities = np.array([0.92, 0.96, 0.35, 0.31, 1.0])
    # [0.3, 0.4): mean 0.33, share 0.5, 2 of 5. [0.9, 1]: mean 0.96, share 2/3, 3 of 5.
    expected = 2 / 5 * (0.5 - 0.33) + 3 / 5 * (0.96 - 2 / 3)
    assert metrics.calibration_error(labels, probabilities) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("of", [1, 3, 58, 715])
def test_rate_has_the_bounds_of_statsmodels(of):
    for count in {0, 1, of // 3, of - 1, of}:
        expected = proportion_confint(count, of, 0.05, method="beta")
        assert Rate(count, of).bounds == pytest.approx(expected, abs=1e-9)


def test_rate_is_said_with_its_bounds_and_of_nothing_is_none():
    assert str(Rate(28, 315)) == "28 of 315 (8.9%, 95% bounds 6.0% to 12.6%)"
    assert np.isnan(Rate(0, 0).share) and Rate(0, 0).bounds == (0, 1)


def test_escapes_and_overkill_of_a_known_case():
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    probabilities = np.array([0.9, 0.35, 0.25, 0.1, 0.05, 0.38, 0.8])
    found = metrics.error_rates(labels, probabilities, OperatingPoint(0.3, 0.2, 0.4))
    assert found == ErrorRates(Rate(2, 4), Rate(2, 3), Rate(3, 7), Rate(1, 4), Rate(1, 3))
    assert found.matrix() == [[2, 2], [2, 1]]
    assert found.as_dict()["escapes_share"] == 0.5
    assert found.as_dict()["overkill_past_review_high"] == metrics.bounds(1, 3)[1]


counts = st.integers(0, 60)


@given(counts, counts, counts)
def test_mcnemar_is_that_of_statsmodels_and_the_bounds_are_the_definition(new, old, both):
    paired = Paired(new, old, new + old + both + 1)
    table = [[both, old], [new, 1]]
    assert paired.p_value == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    assert paired.difference == (new - old) / paired.of
    apart = new + old
    low, high = proportion_confint(new, apart, 0.05, method="beta") if apart else (0, 1)
    expected = [apart / paired.of * (2 * share - 1) for share in (low, high)]
    assert paired.bounds == pytest.approx(expected, abs=1e-9)


def test_comparison_counts_who_alone_is_right_by_picture_and_by_photograph():
    labels = np.array([1, 1, 1, 0, 0])
    champion = np.array([0.9, 0.4, 0.3, 0.2, 0.6])
    challenger = np.array([0.4, 0.9, 0.8, 0.1, 0.7])
    found = metrics.compare(labels, champion, challenger, np.array([1, 1, 2, 3, 3]))
    assert found.pictures == Paired(challenger_only=2, champion_only=1, of=5)
    assert found.photographs == Paired(challenger_only=1, champion_only=0, of=3)


@pytest.mark.parametrize(
    ("photographs", "expected"),
    [
        (Paired(10, 0, 40), "better"),
        (Paired(0, 10, 40), "worse"),
        (Paired(3, 1, 40), "not significant"),
        (Paired(2, 2, 40), "not significant"),
    ],
)
def test_comparison_is_judged_by_photograph(photographs, expected):
    # However many images agree: copies of one photograph are no news.
    comparison = metrics.Comparison(Paired(300, 0, 700), photographs)
    assert comparison.verdict == expected
    assert str(comparison).startswith(expected)


def test_comparison_of_equals_is_the_same():
    assert metrics.Comparison(Paired(2, 2, 9), Paired(0, 0, 4)).verdict == "the same"


def brute_force(table: list[list[int]]) -> float:
    """Boschloo's p-value by the definition: the largest over all shares that the groups may have.

    As extreme are the tables whose p-value by Fisher's test is not higher.
    """
    (found, rejected), (missed, passed) = table
    first, second = found + missed, rejected + passed
    x, y = np.mgrid[: first + 1, : second + 1]
    fisher = hypergeom.sf(x - 1, first + second, x + y, first)
    as_extreme = fisher <= fisher[found, rejected] * (1 + 1e-9)
    shares = np.linspace(0.001, 0.999, 999)
    return max((binom.pmf(x, first, p) * binom.pmf(y, second, p))[as_extreme].sum() for p in shares)


@pytest.mark.parametrize(
    "table", [[[3, 0], [0, 3]], [[4, 1], [0, 3]], [[5, 4], [2, 6]], [[0, 0], [5, 9]]]
)
def test_boschloos_test_is_that_of_its_definition_and_logs_nothing(table, caplog):
    with caplog.at_level("INFO"):
        found = metrics.p_value_of_more(table)
    assert found == pytest.approx(brute_force(table), abs=6e-3)
    assert not caplog.records


def test_without_one_of_the_groups_nothing_is_shown():
    assert metrics.p_value_of_more([[0, 3], [0, 5]]) == 1


@pytest.mark.parametrize("table", [[[10, 51], [0, 49]], [[8, 30], [2, 70]], [[50, 0], [50, 10]]])
def test_a_model_that_helps_is_no_chance_however_few_parts_one_class_has(table):
    assert metrics.p_value_of_more(table) < 0.003


def test_large_groups_are_told_apart_by_fishers_test():
    assert metrics.p_value_of_more([[900, 100], [100, 900]]) < 1e-9
    assert 0.4 < metrics.p_value_of_more([[500, 500], [500, 500]]) < 0.6
    almost = [[540, 480], [460, 520]]
    with pytest.MonkeyPatch.context() as patch:
        fisher = metrics.p_value_of_more(almost)
        patch.setattr(metrics, "LARGEST_EXACT", 2_000_000)
        assert metrics.p_value_of_more(almost) == pytest.approx(fisher, rel=0.2)
