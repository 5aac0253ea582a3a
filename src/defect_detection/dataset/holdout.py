"""Divides images into folds, whole photographs only.

With images of one photograph on both sides of a split, a model could score well by memorising.
"""

import numpy as np

from defect_detection import PipelineError
from defect_detection.runtime.decision import CLASSES, NEGATIVE, POSITIVE


def hold_out(
    labels: np.ndarray, photographs: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of the images, as near to it in each class as whole photographs allow.

    Args:
        labels: (n,), 1 = defect.
        photographs: (n,) number of the photograph that each image comes from.
        share: of the images to hold out, in (0, 1).
        seed: decides which photographs.

    Returns:
        Sorted indices of the remaining and of the held-out images, both int64. A single photograph
        of defects is held out.

    Raises:
        PipelineError: there are too few photographs of good parts to have one on each side.
    """
    of_defects = np.unique(photographs[labels == 1])
    if len(of_defects) < 2:
        of_good = photographs[labels == 0]
        testing = of_good[parts(of_good, share, seed)[0]]
        inside = np.isin(photographs, [*testing, *of_defects])
        return np.flatnonzero(~inside), np.flatnonzero(inside)
    for count in _counts(share):
        found = [
            (_distance(labels, rows[1], share), rows)
            for rows in _group_folds(labels, photographs, count, seed)
            if all(set(labels[side]) == {0, 1} for side in rows)
        ]
        if found:
            return min(found, key=lambda one: one[0])[1]
    raise _too_few(labels, photographs, share)


def validation_folds(
    labels: np.ndarray, photographs: np.ndarray, share: float, seed: int
) -> list[np.ndarray]:
    """Divide images into folds, each of which validates a fit to the others.

    Args:
        labels: (n,), 1 = defect.
        photographs: (n,) number of the photograph that each image comes from.
        share: of the images in a fold, in (0, 1); it grows if there are few photographs.
        seed: decides which photographs go together.

    Returns:
        Sorted indices of each fold; together they are all images.

    Raises:
        PipelineError: a class has too few photographs to have one on each side.
    """
    for count in _counts(share):
        made = _group_folds(labels, photographs, count, seed)
        if made and all(set(labels[side]) == {0, 1} for rows in made for side in rows):
            return [held_out for _, held_out in made]
    raise _too_few(labels, photographs, share)


def parts(photographs: np.ndarray, share: float, seed: int) -> list[np.ndarray]:
    """Divide images of one class into parts, each of about a share of the photographs.

    Returns:
        Sorted indices of each part; together they are all images.

    Raises:
        PipelineError: there are fewer than two photographs.
    """
    each = np.random.default_rng(seed).permutation(np.unique(photographs))
    count = min(max(2, round(1 / share)), len(each))
    if count < 2:
        raise PipelineError(f"Too few photographs: {len(each)} of {NEGATIVE}")
    return [np.flatnonzero(np.isin(photographs, each[number::count])) for number in range(count)]


def folds(
    labels: np.ndarray, photographs: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide images for cross-validation.

    Returns:
        For each fold the sorted indices of its training and of its held-out images.

    Raises:
        PipelineError: a fold would lack a class.
    """
    made = _group_folds(labels, photographs, count, seed)
    if len(made) < count or any(set(labels[side]) != {0, 1} for rows in made for side in rows):
        raise PipelineError(
            f"Too few photographs for {count} folds: {_photographs_of_each(labels, photographs)}"
        )
    return made


def _counts(share: float) -> range:
    """Return the numbers of folds to try: that of the share, then fewer and larger ones."""
    return range(max(2, round(1 / share)), 1, -1)


def _group_folds(
    labels: np.ndarray, photographs: np.ndarray, count: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import (
        StratifiedGroupKFold,
    )  # takes 1 s to import; audits do not need it

    if count > min(labels.sum(), len(labels) - labels.sum()):
        return []
    folder = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(folder.split(labels, labels, photographs))


def _distance(labels: np.ndarray, held_out: np.ndarray, share: float) -> float:
    return max(abs((labels[held_out] == c).sum() / (labels == c).sum() - share) for c in (0, 1))


def _too_few(labels: np.ndarray, photographs: np.ndarray, share: float) -> PipelineError:
    return PipelineError(
        f"Too few photographs to hold {share:.0%} of the images out: "
        f"{_photographs_of_each(labels, photographs)}"
    )


def _photographs_of_each(labels: np.ndarray, photographs: np.ndarray) -> str:
    return ", ".join(
        f"{len(np.unique(photographs[labels == (name == POSITIVE)]))} of {name}" for name in CLASSES
    )
