"""Likely label errors."""

import csv
import io
import os

import numpy as np
import pytest

from conftest import drawn_dataset
from defect_detection.evaluation import labels


@pytest.fixture(scope="module")
def data():
    drawn = (np.arange(40) % 2).astype(np.uint8)
    return drawn_dataset(np.zeros((40, 8, 8), np.uint8), drawn, np.arange(40) // 2)


def judged(data, wrong: list[int]) -> np.ndarray:
    """Return probabilities of a model that is sure, and contradicts some labels."""
    rng = np.random.default_rng(0)
    truth = data.labels.astype(int).copy()
    truth[wrong] = 1 - truth[wrong]
    return np.where(truth == 1, rng.uniform(0.8, 0.99, 40), rng.uniform(0.01, 0.2, 40))


def test_labels_that_are_contradicted_are_found_the_surest_first(data):
    probabilities = judged(data, [3, 8])
    probabilities[3], probabilities[8] = 0.02, 0.999
    found = labels.likely_errors(data, np.arange(40), data.labels, probabilities)
    assert [(one.path, one.label) for one in found] == [("8", "ok_front"), ("3", "def_front")]
    assert found[0].confidence == pytest.approx(0.001) and found[0].photograph == 4


def test_a_doubt_is_no_error(data):
    probabilities = judged(data, [])
    probabilities[3] = 0.45
    assert labels.likely_errors(data, np.arange(40), data.labels, probabilities) == []


def test_numbers_of_held_out_images_lead_to_their_paths(data):
    order = np.random.default_rng(1).permutation(40)[:30]
    order = np.unique(np.r_[order, 5])
    probabilities = judged(data, [5])
    probabilities[5] = 0.02
    found = labels.likely_errors(data, order, data.labels[order], probabilities[order])
    assert [one.path for one in found] == ["5"]


def test_one_class_alone_has_none(data):
    rows = np.flatnonzero(data.labels == 0)
    assert labels.likely_errors(data, rows, data.labels[rows], np.full(len(rows), 0.9)) == []


def test_table_is_utf8_whatever_the_names():
    error = labels.LabelError(os.fsdecode(b"train/ok_front/a\xff\r.png"), "ok_front", 1, 0.25)
    table = labels.table([error]).encode()
    (row,) = csv.DictReader(io.StringIO(table.decode(), newline=""))
    assert row["path"] == "train/ok_front/a\\udcff\r.png"
    assert row["confidence"] == "0.250000"


def test_a_model_that_guesses_contradicts_no_label(data):
    guesses = np.random.default_rng(2).random(40)
    assert labels.likely_errors(data, np.arange(40), data.labels, guesses) == []


def test_table_can_be_read_back(data):
    found = labels.likely_errors(data, np.arange(40), data.labels, judged(data, [3, 8]))
    rows = list(csv.DictReader(labels.table(found).splitlines()))
    assert {row["path"] for row in rows} == {"3", "8"}


def test_names_that_spreadsheets_would_compute_are_defused():
    rows = labels.table([labels.LabelError("=1+1.png", "ok_front", 1, 0.1)]).splitlines()
    assert rows[1].startswith("'=1+1.png,ok_front,")
