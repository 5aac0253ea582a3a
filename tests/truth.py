"""The real castings and what is known of their photographs, to measure against."""

import csv
from collections import Counter
from collections.abc import Sequence
from math import comb
from pathlib import Path

from defect_detection import settings

CASTINGS = settings.ROOT.parent / "shared" / "data" / "casting"


def photographs() -> dict[str, tuple[str, str]]:
    """Return `photo` and `photo_merged` of each picture, by its path.

    Pictures with the same `photo` surely share one; with different `photo_merged`, surely not.
    """
    with (CASTINGS / "photo_groups.csv").open(newline="") as file:
        return {row["path"]: (row["photo"], row["photo_merged"]) for row in csv.DictReader(file)}


def link(paths: Sequence[str], to: Path) -> Path:
    """Make a data folder of some of the castings, by links; return it."""
    for path in paths:
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        (to / path).symlink_to(CASTINGS / path)
    return to


def precision_and_recall(found: dict[str, int]) -> tuple[float, float]:
    """Score photographs by pairs of pictures; pairs that the truth leaves open do not count.

    Args:
        found: number of the photograph of each picture, by its path.
    """
    truth = photographs()

    def pairs(*keys: Sequence[object]) -> int:
        """Count the pairs of pictures that agree in all keys."""
        return sum(comb(n, 2) for n in Counter(zip(*keys, strict=True)).values())

    number = list(found.values())
    photo, merged = zip(*(truth[path] for path in found), strict=True)
    right = pairs(number, photo)
    wrong = pairs(number) - pairs(number, merged)
    return right / (right + wrong), right / pairs(photo)
