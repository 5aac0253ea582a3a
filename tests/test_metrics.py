"""Counts and rates."""

import numpy as np
import pytest

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
        "accuracy": 1.0,
        "recall_def_front": 1.0,
        "recall_ok_front": 1.0,
    }
