"""What is wrong with the pictures, and which of them show one photograph."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from defect_detection import PipelineError, dataset, images
from defect_detection.dataset import CLASSES, SPLIT_FILE, Dataset
from defect_detection.files import read_mapping, write_mapping

GROUPS_FILE = "groups.csv"  # in the data folder: the photographs as the user knows them
SHOWN = 5  # findings of a kind in the report; the JSON file has all


@dataclass(frozen=True)
class Split:
    """Training and test pictures, and the number of the photograph that each was made from."""

    training: Dataset
    testing: Dataset
    training_photographs: np.ndarray
    testing_photographs: np.ndarray

    @property
    def leaked(self) -> np.ndarray:
        """Which test pictures show a photograph that is also in training: bool (n,)."""
        return np.isin(self.testing_photographs, self.training_photographs)

    @property
    def leaked_share(self) -> float:
        """Share of the test pictures that are leaked, in [0, 1]."""
        return float(self.leaked.mean())

    @property
    def leakage(self) -> str:
        """The leakage in a sentence."""
        return _leakage(int(self.leaked.sum()), len(self.testing))


@dataclass(frozen=True)
class Audit:
    """What was found in a data folder; paths are relative to it, sorted.

    Attributes:
        folder: the data folder.
        split_file: whether `split.csv` says which side a picture is on.
        groups_file: whether `groups.csv` says which photograph a picture shows.
        pictures: readable pictures of each class of each split.
        unreadable: path and reason.
        usual_size: width and height that most pictures have, in pixels.
        odd_sized: path, width and height of those with another.
        duplicates: files of the same content, each list two or more.
        photographs: the pictures of each photograph, the largest first.
        two_labels: photographs whose pictures lie in both class folders.
        leaked: test pictures of each class that share a photograph with training.
    """

    folder: str
    split_file: bool
    groups_file: bool
    pictures: dict[str, dict[str, int]]
    unreadable: list[tuple[str, str]]
    usual_size: tuple[int, int] | None
    odd_sized: list[tuple[str, int, int]]
    duplicates: list[list[str]]
    photographs: list[list[str]]
    two_labels: list[list[str]]
    leaked: dict[str, list[str]]

    @property
    def clean(self) -> bool:
        """Whether nothing was found that makes an accuracy untrue."""
        return not (self.unreadable or self.two_labels or any(self.leaked.values()))

    def as_dict(self) -> dict[str, object]:
        """Return everything by name, for JSON."""
        return {"clean": self.clean} | asdict(self)

    def worst(self) -> list[tuple[str, str, str]]:
        """Return what is wrong and two pictures that show it, the worst kind first."""
        labels = [("two labels", *_one_of_each_class(paths)) for paths in self.two_labels]
        test = {path for paths in self.leaked.values() for path in paths}
        leaks = []
        for paths in self.photographs:  # one pair of each photograph
            sides = [[p for p in paths if p in test], [p for p in paths if p not in test]]
            if all(sides):
                leaks.append(("in test and in training", sides[0][0], sides[1][0]))
        doubles = [("same content", *paths[:2]) for paths in self.duplicates]
        return labels + leaks + doubles

    def groups(self) -> dict[str, int]:
        """Return the number of its photograph for each picture, the largest photograph 1."""
        return {path: number for number, paths in enumerate(self.photographs, 1) for path in paths}


def load(data: Path, image_size: tuple[int, int], cache: Path) -> Split:
    """Load training and test pictures as `dataset.load` does, and find their photographs.

    Raises:
        PipelineError: as `dataset.load` raises it; or `groups.csv` lacks a picture.
    """
    sides = [dataset.load(data, split, image_size, cache) for split in dataset.SPLITS]
    return Split(*sides, *photographs_of(data, sides, cache))


def photographs_of(data: Path, sides: Sequence[Dataset], cache: Path) -> list[np.ndarray]:
    """Number the photographs: from `data/groups.csv` if it is there, else from the pictures.

    Returns:
        For each data set the photographs' numbers, int (n,), the same in all.

    Raises:
        PipelineError: `groups.csv` lacks a picture.
    """
    file = data / GROUPS_FILE
    if file.exists():
        given = read_mapping(file, "path", "photo")
        lacking = [path for side in sides for path in side.paths if path not in given]
        if lacking:
            raise PipelineError(
                f"{file} does not name the photograph of {lacking[0]} (and of {len(lacking) - 1} "
                f"more). Add a line for each, or delete the file"
            )
        numbers = {name: number for number, name in enumerate(dict.fromkeys(given.values()))}
        return [np.array([numbers[given[path]] for path in side.paths], int) for side in sides]
    from defect_detection import photographs  # OpenCV and SciPy, which inference does not need

    files = {
        content: data / path
        for side in sides
        for content, path in zip(side.contents, side.paths, strict=True)
    }
    found = photographs.find(files, cache)
    return [np.array([found[content] for content in side.contents], int) for side in sides]


def inspect(data: Path, image_size: tuple[int, int], cache: Path) -> Audit:
    """Look for all that an `Audit` tells, in `train` and, if it is there, `test`.

    Raises:
        PipelineError: a class folder is missing or empty, or a CSV file lacks a picture.
    """
    splits = [name for name in dataset.SPLITS if (data / name).is_dir()]
    if (data / SPLIT_FILE).exists():
        splits = list(dataset.SPLITS)
    sides = {
        name: dataset.read(data, dataset.pictures(data, name), name, image_size, cache)
        for name in splits or ["train"]
    }
    numbers = photographs_of(data, list(sides.values()), cache)
    by_number, by_content = defaultdict(list), defaultdict(list)
    for side, photographs in zip(sides.values(), numbers, strict=True):
        for path, content, number in zip(side.paths, side.contents, photographs, strict=True):
            by_number[int(number)].append(path)
            by_content[content].append(path)
    leaked = {}
    if len(sides) == 2:
        split = Split(*sides.values(), *numbers)
        paths = np.array(split.testing.paths)[split.leaked].tolist()
        leaked = {name: [p for p in paths if Path(p).parent.name == name] for name in CLASSES}
    usual, odd = _odd_sized(data, [path for side in sides.values() for path in side.paths])
    return Audit(
        folder=str(data),
        split_file=(data / SPLIT_FILE).exists(),
        groups_file=(data / GROUPS_FILE).exists(),
        pictures={name: side.counts for name, side in sides.items()},
        unreadable=sorted(one for side in sides.values() for one in side.skipped),
        usual_size=usual,
        odd_sized=odd,
        duplicates=sorted(sorted(paths) for paths in by_content.values() if len(paths) > 1),
        photographs=sorted(
            (sorted(paths) for paths in by_number.values()), key=lambda p: (-len(p), p)
        ),
        two_labels=sorted(
            sorted(paths)
            for paths in by_number.values()
            if len({Path(path).parent.name for path in paths}) == 2
        ),
        leaked=leaked,
    )


def resplit(data: Path, share: float, seed: int, image_size: tuple[int, int], cache: Path) -> Path:
    """Write `data/split.csv`: a test set of `share` that has no photograph in common with training.

    No picture is moved. Classes keep their proportions as well as whole photographs allow.

    Raises:
        PipelineError: a class has too few photographs.
    """
    sides = [
        dataset.read(data, dataset.in_folder(data, name), name, image_size, cache)
        for name in dataset.SPLITS
        if (data / name).is_dir()
    ]
    paths = [path for side in sides for path in side.paths]
    labels = np.concatenate([side.labels for side in sides])
    photographs = np.concatenate(photographs_of(data, sides, cache))
    testing = set(dataset.split_validation(labels, photographs, share, seed)[1])
    # What cannot be read now may be readable once: it goes to training, where it is skipped.
    rows = {path: "train" for side in sides for path, _ in side.skipped}
    rows |= {path: "test" if row in testing else "train" for row, path in enumerate(paths)}
    write_mapping(data / SPLIT_FILE, "path", "split", dict(sorted(rows.items())))
    return data / SPLIT_FILE


def text(audit: Audit) -> str:
    """Lay an audit out for reading, the verdict first."""
    lines = [_verdict(audit), ""]
    lines += [f"{'pictures':14}" + "".join(f"{name:>12}" for name in CLASSES)]
    for split, counts in audit.pictures.items():
        lines.append(f"  {split:12}" + "".join(f"{counts[name]:12}" for name in CLASSES))
    if audit.split_file:
        lines.append(f"  as {SPLIT_FILE} says; delete it to go back to the folders")
    how = f"as {GROUPS_FILE} says" if audit.groups_file else "found by comparing the pictures"
    largest = max(map(len, audit.photographs), default=0)
    most = f"; {largest} pictures of one at most" if largest > 1 else ""
    lines.append(f"photographs   {len(audit.photographs)}, {how}{most}")
    if audit.leaked:
        leaked = ", ".join(
            f"{len(paths)} of {audit.pictures['test'][name]} {name}"
            for name, paths in audit.leaked.items()
        )
        lines.append(f"leaked        {leaked}")
    lines += _listed(
        "two labels",
        "in both class folders, likely label errors",
        ["  and  ".join(_one_of_each_class(paths)) for paths in audit.two_labels],
    )
    lines += _listed(
        "duplicates",
        "contents in more than one file",
        ["  =  ".join(paths) for paths in audit.duplicates],
    )
    lines += _listed("unreadable", "", [f"{path} {why}" for path, why in audit.unreadable])
    if audit.usual_size:
        lines += _listed(
            "odd size",
            "are not {} x {} as most".format(*audit.usual_size),
            [f"{path} {width} x {height}" for path, width, height in audit.odd_sized],
        )
    return "\n".join(lines)


def _verdict(audit: Audit) -> str:
    testing = sum(audit.pictures.get("test", {}).values())
    leaked = sum(map(len, audit.leaked.values()))
    if leaked:
        return (
            f"Do not trust an accuracy on this test set. {_leakage(leaked, testing)}\n"
            f"For a clean split: python src/audit.py --resplit 0.2"
        )
    found = [
        f"{len(paths)} {what}"
        for paths, what in (
            (audit.two_labels, "with two labels"),
            (audit.unreadable, "unreadable"),
        )
        if paths
    ]
    start = "Look at these first: " + ", ".join(found) if found else "Nothing found"
    return f"{start}. {_leakage(leaked, testing)}"


def _leakage(leaked: int, testing: int) -> str:
    if not leaked:
        return "No test picture shows a photograph that is also in training."
    return (
        f"{leaked} of {testing} test pictures ({leaked / testing:.1%}) show a photograph that is "
        f"also in training."
    )


def _listed(name: str, what: str, found: list[str]) -> list[str]:
    if not found:
        return [f"{name:14}none"]
    more = [f"{'':16}and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [
        f"{name:14}{len(found)} {what}".rstrip(),
        *(f"{'':16}{one}" for one in found[:SHOWN]),
    ] + more


def _one_of_each_class(paths: list[str]) -> list[str]:
    return [next(p for p in paths if Path(p).parent.name == name) for name in CLASSES]


def _odd_sized(
    data: Path, paths: list[str]
) -> tuple[tuple[int, int] | None, list[tuple[str, int, int]]]:
    """Return the usual width and height, and the pictures with another."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(lambda path: images.dimensions(data / path), paths))
    if not sizes:
        return None, []
    usual = Counter(sizes).most_common(1)[0][0]
    odd = [(path, *size) for path, size in zip(paths, sizes, strict=True) if size != usual]
    return usual, sorted(odd)
