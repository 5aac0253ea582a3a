"""Finds what is wrong with a data folder before anything is trained on it."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from defect_detection import PipelineError
from defect_detection.dataset.folder import GROUPS_FILE, SIDES, SPLIT_FILE, DataFolder
from defect_detection.dataset.split import Dataset, Split, describe_leakage, read
from defect_detection.names import printable
from defect_detection.runtime import preprocessing
from defect_detection.runtime.decision import CLASSES, NEGATIVE, POSITIVE
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage

SHOWN = 5  # findings of a kind in the text; the JSON file has all


@dataclass(frozen=True)
class Audit:
    """What was found in a data folder; paths are relative to it, sorted.

    Attributes:
        folder: the data folder.
        split_file: whether `split.csv` says which side an image is on.
        groups_file: whether `groups.csv` says which photograph an image comes from.
        pictures: readable images of each class of each side.
        unreadable: path and reason.
        usual_size: width and height of most images, in pixels.
        odd_sized: path, width and height of the others.
        duplicates: files with the same content, each list two or more.
        photographs: the images of each photograph, the largest first.
        two_labels: of each photograph with images in both classes, a defect and a good part.
        leaked: test images of each class that share a photograph with training.
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
    two_labels: list[tuple[str, str]]
    leaked: dict[str, list[str]]

    @property
    def clean(self) -> bool:
        """Whether nothing was found that makes an accuracy untrue."""
        return not (self.unreadable or self.two_labels or any(self.leaked.values()))

    def as_dict(self) -> dict[str, object]:
        """Return everything by name, for JSON."""
        return {"clean": self.clean} | asdict(self)

    def worst(self) -> list[tuple[str, str, str]]:
        """Return the findings, each with two images that show it, the worst kind first."""
        labels = [("two labels", defect, good) for defect, good in self.two_labels]
        test = {path for paths in self.leaked.values() for path in paths}
        leaks = []
        for paths in self.photographs:  # one pair of each photograph
            sides = [[p for p in paths if p in test], [p for p in paths if p not in test]]
            if all(sides):
                leaks.append(("in test and in training", sides[0][0], sides[1][0]))
        doubles = [("same content", paths[0], paths[1]) for paths in self.duplicates]
        return labels + leaks + doubles

    def groups(self) -> dict[str, int]:
        """Return the number of its photograph for each image, the largest photograph 1."""
        return {path: number for number, paths in enumerate(self.photographs, 1) for path in paths}


def inspect(folder: DataFolder, wanted: ImageFormat) -> Audit:
    """Inspect the folders `train` and `test`, those of them that are here, or a flat folder.

    Raises:
        PipelineError: a class folder is missing or empty, or a CSV file lacks an image.
    """
    sides = list(SIDES) if folder.split_file.exists() else folder.sides
    every = read(folder, {side: folder.images(side) for side in sides}, wanted)
    by_photograph, by_content = defaultdict(list), defaultdict(list)
    for data in every:
        for path, content, number in zip(data.paths, data.contents, data.photographs, strict=True):
            by_photograph[int(number)].append(path)
            by_content[content].append(path)
    usual, odd = _odd_sized(folder, [path for data in every for path in data.paths])
    return Audit(
        folder=str(folder),
        split_file=folder.split_file.exists(),
        groups_file=folder.groups_file.exists(),
        pictures={data.side: data.counts for data in every},
        unreadable=sorted(one for data in every for one in data.skipped),
        usual_size=usual,
        odd_sized=odd,
        duplicates=sorted(sorted(paths) for paths in by_content.values() if len(paths) > 1),
        photographs=sorted(
            (sorted(paths) for paths in by_photograph.values()), key=lambda p: (-len(p), p)
        ),
        two_labels=sorted(_two_labels(folder, by_photograph.values())),
        leaked=_leaked(folder, every),
    )


def _two_labels(folder: DataFolder, groups: Iterable[list[str]]) -> Iterator[tuple[str, str]]:
    """Yield a defect and a good part of each group that has both."""
    for paths in groups:
        by_class = {folder.class_of(path): path for path in sorted(paths, reverse=True)}
        if len(by_class) == len(CLASSES):
            yield by_class[POSITIVE], by_class[NEGATIVE]


def _leaked(folder: DataFolder, every: list[Dataset]) -> dict[str, list[str]]:
    if len(every) < 2:
        return {}
    split = Split(*every)
    paths = [path for path, leaked in zip(split.testing.paths, split.leaked, strict=True) if leaked]
    return {name: [p for p in paths if folder.class_of(p) == name] for name in CLASSES}


def text(audit: Audit, resplit: str) -> str:
    """Return an audit as text, the conclusion first; `resplit` is the call that makes a split."""
    lines = [_verdict(audit, resplit), ""]
    lines += [f"{'images':14}" + "".join(f"{name:>12}" for name in CLASSES)]
    for split, counts in audit.pictures.items():
        lines.append(f"  {split or 'all':12}" + "".join(f"{counts[name]:12}" for name in CLASSES))
    if audit.split_file:
        lines.append(f"  as {SPLIT_FILE} says; delete it to use the folders")
    how = (
        f"as {GROUPS_FILE} says for those it names"
        if audit.groups_file
        else "found by comparing the images"
    )
    largest = max(map(len, audit.photographs), default=0)
    most = f"; at most {largest} images of one" if largest > 1 else ""
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
        ["  and  ".join(pair) for pair in audit.two_labels],
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


def _verdict(audit: Audit, resplit: str) -> str:
    testing = sum(audit.pictures.get("test", {}).values())
    leaked = sum(map(len, audit.leaked.values()))
    if leaked:
        return (
            f"Do not trust an accuracy on this test set. {describe_leakage(leaked, testing)}\n"
            f"For a clean split: {resplit}"
        )
    found = [
        f"{len(paths)} {what}"
        for paths, what in (
            (audit.two_labels, "with two labels"),
            (audit.unreadable, "unreadable"),
            (audit.duplicates, "in more than one file"),
            (audit.odd_sized, "of an odd size"),
        )
        if paths
    ]
    start = "Look at these first: " + ", ".join(found) if found else "Nothing found"
    if not testing:
        return f"{start}. There are no test images yet, so nothing is known of leakage."
    return f"{start}. {describe_leakage(leaked, testing)}"


def _listed(name: str, what: str, found: list[str]) -> list[str]:
    if not found:
        return [f"{name:14}none"]
    more = [f"{'':16}and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [
        f"{name:14}{len(found)} {what}".rstrip(),
        *(f"{'':16}{printable(one)}" for one in found[:SHOWN]),
    ] + more


def _odd_sized(
    folder: DataFolder, paths: list[str]
) -> tuple[tuple[int, int] | None, list[tuple[str, int, int]]]:
    """Return the usual width and height, and the images with another."""

    def size(path: str) -> tuple[int, int]:
        try:
            return preprocessing.dimensions(folder.path / path)
        except UnreadableImage as error:
            raise PipelineError(f"{path} {error}, but could be read before") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(size, paths))
    if not sizes:
        return None, []
    usual = Counter(sizes).most_common(1)[0][0]
    odd = [(path, *size) for path, size in zip(paths, sizes, strict=True) if size != usual]
    return usual, sorted(odd)
