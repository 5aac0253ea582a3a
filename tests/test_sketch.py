"""Sketches of sets of contents."""

import hashlib

import pytest

from defect_detection import sketch


def contents(first: int, last: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(first, last)]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 100), (99, 200), True),
        ((0, 100), (100, 200), False),
        ((0, 10_000), (9000, 20_000), True),
        ((0, 10_000), (10_000, 20_000), False),
        ((0, 100), (0, 10_000), True),  # data that grew a hundredfold
    ],
)
def test_sets_with_something_in_common_are_found(one, other, expected):
    assert sketch.share(sketch.of(contents(*one)), sketch.of(contents(*other))) is expected


def test_a_sketch_fits_into_a_tag():
    assert len(sketch.of(contents(0, 10_000))) <= 5000
