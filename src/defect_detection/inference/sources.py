"""Which images to judge: files, folders, globs, lists."""

import glob
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from defect_detection import PipelineError
from defect_detection.inference.judge import Item
from defect_detection.runtime.preprocessing import SUFFIXES, files_below, is_image

log = logging.getLogger(__name__)


def expand(given: list[str]) -> Iterator[str]:
    """Return the images that are named, lie in named folders, or match globs.

    Paths are found one by one, so that a large folder takes no memory for them.

    Raises:
        PipelineError: a folder holds no images or a glob matches none; before the first path.
    """
    for name in given:
        if next(_of(name), None) is None:
            what = "holds no" if os.path.isdir(name) else "matches no"
            raise PipelineError(f"{name} {what} {', '.join(SUFFIXES)} files")
        if os.path.isdir(name):
            _name_others(name)
    return (path for name in given for path in _of(name))


def _of(name: str) -> Iterator[str]:
    if os.path.isdir(name):
        yield from walk(name)
    elif glob.has_magic(name) and not os.path.lexists(name):
        for path in sorted(glob.iglob(name, recursive=True)):
            if os.path.isfile(path) and is_image(os.path.basename(path)):
                yield path
    else:
        yield name


def walk(folder: str) -> Iterator[str]:
    """Return the images in a folder and the folders below it, sorted, without hidden ones."""
    return (path for path in files_below(folder) if is_image(os.path.basename(path)))


def _name_others(folder: str) -> None:
    """Log how many files of a folder are no images, by kind."""
    suffixes = (Path(path).suffix.lower() or "without suffix" for path in files_below(folder))
    others = Counter(suffix for suffix in suffixes if suffix not in SUFFIXES)
    if others:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        log.warning("%s: not judged: %s", folder, counted)


def listed(lines: Iterable[str]) -> Iterator[str]:
    """Return the paths in a list, one in each line; empty lines are skipped."""
    return (path for line in lines if (path := line.rstrip("\r\n")))


def items(named: list[str], files_from: str | None) -> Iterator[Item]:
    """Return the images of the command line.

    Args:
        named: files, folders, globs; - is the content of one image on standard input.
        files_from: a file with one path in each line, - for standard input, or None.

    Raises:
        PipelineError: a folder holds no images or a glob matches none.
        OSError: the list cannot be read.
    """
    paths = expand([name for name in named if name != "-"])
    if files_from == "-":
        # Names of files need not be UTF-8.
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        lines: Iterable[str] = sys.stdin
        paths = itertools.chain(paths, listed(lines))
    elif files_from:
        # Closed when the process ends.
        lines = open(files_from, encoding="utf-8", errors="surrogateescape")
        paths = itertools.chain(paths, listed(lines))
    found = (Item(path, Path(path)) for path in paths)
    if "-" in named:
        return itertools.chain(found, [Item("-", sys.stdin.buffer.read())])
    return found
