"""Splits by photograph."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defect_detection import PipelineError
from defect_detection.dataset import holdout


def test_validation_split_is_seeded_stratified_and_whole():
    labels, photographs = np.array([1] * 60 + [0] * 40), np.arange(100)
    training, validation = holdout.hold_out(labels, photographs, 0.2, seed=5)
    assert sorted([*training, *validation]) == list(range(100))
    assert (len(validation), labels[validation].sum()) == (20, 12)
    again = holdout.hold_out(labels, photographs, 0.2, seed=5)[1]
    other = holdout.hold_out(labels, photographs, 0.2, seed=6)[1]
    np.testing.assert_array_equal(validation, again)
    assert list(validation) != list(other)


@st.composite
def photographed(draw):
    """Labels and photographs: of each class at least two, of any sizes, some of both classes."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=4, max_size=30))
    labels, photographs = [], []
    for number, size in enumerate(sizes):
        both = number >= 4 and draw(st.booleans()) and draw(st.booleans())
        for picture in range(size):
            labels.append(picture % 2 if both else number % 2)
            photographs.append(number)
    order = draw(st.permutations(range(len(labels))))
    return np.array(labels)[order], np.array(photographs)[order]


@settings(max_examples=200)
@given(photographed(), st.floats(0.05, 0.5), st.integers(0, 2**32 - 1))
def test_no_photograph_is_on_both_sides_of_a_validation_split(pictures, share, seed):
    labels, photographs = pictures
    try:
        training, validation = holdout.hold_out(labels, photographs, share, seed)
    except PipelineError as error:
        assert "Too few photographs" in str(error)
        return
    assert sorted([*training, *validation]) == list(range(len(labels)))
    assert not set(photographs[training]) & set(photographs[validation])
    assert set(labels[training]) == set(labels[validation]) == {0, 1}


@settings(max_examples=100)
@given(photographed(), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_no_photograph_is_in_two_folds(pictures, count, seed):
    labels, photographs = pictures
    try:
        divided = holdout.folds(labels, photographs, count, seed)
    except PipelineError as error:
        assert f"Too few photographs for {count} folds" in str(error)
        return
    assert sorted(row for _, fold in divided for row in fold) == list(range(len(labels)))
    for others, fold in divided:
        assert not set(photographs[others]) & set(photographs[fold])
        assert len(others) + len(fold) == len(labels)


def test_many_photographs_are_always_split_and_near_the_share():
    labels = np.repeat([1, 0], [300, 200])
    photographs = np.repeat(np.arange(50), 10)
    for seed in range(50):
        validation = holdout.hold_out(labels, photographs, 0.2, seed)[1]
        assert (labels[validation].sum(), len(validation)) == (60, 100)


def test_too_few_photographs_to_split_is_said_with_their_number():
    expected = "hold 20% of the images out: 4 of def_front, 1 of ok_front"
    with pytest.raises(PipelineError, match=expected):
        holdout.hold_out(
            np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 2, 3, 4, 5, 5, 5]), 0.2, seed=0
        )
    with pytest.raises(PipelineError, match="for 3 folds: 4 of def_front, 2 of ok_front"):
        holdout.folds(np.array([1, 1, 1, 1, 0, 0, 0]), np.array([1, 2, 3, 4, 5, 5, 6]), 3, seed=0)
