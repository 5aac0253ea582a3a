"""Which images to judge: files, folders, globs, lists."""

import glob
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from defect_detection import PipelineError
from defect_detection.inference.judge import Item
from defect_detection.names import first_line
from defect_detection.runtime.preprocessing import (
    FORMATS,
    MOST_BYTES,
    OTHER_IMAGES,
    SUFFIXES,
    UnreadableImage,
    files_below,
)

log = logging.getLogger(__name__)

LONGEST_PATH = 8192  # characters; no system has longer ones

Failed = Callable[[str, OSError], object]


def expand(given: list[str], say: Callable[..., object] = log.warning) -> Iterator[Item]:
    """Return the images that are named, lie in named folders, or match globs.

    They are found one by one, so that a large folder takes no memory for them. What cannot be
    searched or read is among them, with the reason.

    Args:
        given: files, folders, globs.
        say: is told, as a log is, how many files of each folder or glob are no images.

    Raises:
        PipelineError: a folder holds no images or a glob matches none; before the first image.
    """
    found = []
    for name in given:
        items = _of(name, say)
        first = next(items, None)
        if first is None:
            what = "holds no" if os.path.isdir(name) else "matches no"
            raise PipelineError(f"{name} {what} {', '.join(SUFFIXES)} files")
        found.append(itertools.chain([first], items))
    return itertools.chain.from_iterable(found)


def _of(name: str, say: Callable[..., object]) -> Iterator[Item]:
    if not _is_search(name):
        yield _item(name)
        return
    failed: dict[str, Item] = {}  # a glob may come to a folder in several ways

    def tell(path: str, error: OSError) -> None:
        failed.setdefault(os.path.normpath(path), Item(path, reason(error)))

    others: Counter[str] = Counter()
    found = False
    for path in _files(name, tell):
        if names_image(path):
            found = True
            yield _item(path)
        else:
            others[Path(path).suffix.lower() or "without suffix"] += 1
    yield from failed.values()
    if found and others:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        say("%s: not judged: %s", name, counted)


def _item(path: str) -> Item:
    return Item(path, unreadable(path) or Path(path))


def folders(given: list[str]) -> Iterator[str]:
    """Return the folders that are searched for images."""
    for name in given:
        if _is_search(name):
            matches = [name] if os.path.isdir(name) else glob.iglob(name, recursive=True)
            yield from filter(os.path.isdir, matches)


def _is_search(name: str) -> bool:
    return os.path.isdir(name) or (glob.has_magic(name) and not os.path.lexists(name))


def _files(name: str, failed: Failed) -> Iterable[str]:
    """Return the files in a folder, or those that match a glob or lie in folders that do."""
    return files_below(name, failed) if os.path.isdir(name) else _matches(name, failed)


def _matches(pattern: str, failed: Failed) -> Iterator[str]:
    found: set[str] = set()  # ** matches folders and what is in them
    for match in sorted(glob.iglob(pattern, recursive=True)):
        try:
            os.stat(match)
        except OSError as error:
            failed(match, error)
            continue
        for path in files_below(match, failed) if os.path.isdir(match) else [match]:
            if path not in found:
                found.add(path)
                yield path
    _name_passed_over(pattern, failed)


def _name_passed_over(pattern: str, failed: Failed) -> None:
    """Name the folders that a glob could not look into; `glob` passes over them."""
    parent, child = os.path.split(pattern)
    while glob.has_magic(parent):
        for folder in glob.iglob(os.path.join(parent, ""), recursive=True):
            try:
                if glob.has_magic(child):
                    os.scandir(folder).close()
                else:
                    os.stat(os.path.join(folder, child))
            except FileNotFoundError:
                pass
            except OSError as error:
                failed(folder, error)
        parent, child = os.path.split(parent)


def reason(error: OSError) -> UnreadableImage:
    """Return why an image cannot be read."""
    gone = isinstance(error, FileNotFoundError)
    return UnreadableImage(
        "does not exist" if gone else f"cannot be read ({error.strerror or first_line(error)})"
    )


def names_image(path: str) -> bool:
    """Return whether a path is that of an image by its suffix, readable or not."""
    return path.lower().endswith(SUFFIXES + OTHER_IMAGES)


def unreadable(path: str) -> UnreadableImage | None:
    """Return why an image cannot be read if its suffix says so.

    Decoding would not do: a raw file passes for a TIFF that has nothing but its thumbnail.
    """
    other = path.lower().endswith(OTHER_IMAGES)
    return UnreadableImage(f"is none of {', '.join(FORMATS)}") if other else None


def walk(folder: str, failed: Failed) -> Iterator[str]:
    """Return the images in a folder and the folders below it, sorted, without hidden ones.

    Args:
        folder: to search.
        failed: as for `files_below`.
    """
    return filter(names_image, files_below(folder, failed))


def listed(lines: Iterable[str]) -> Iterator[str]:
    """Return the paths in a list, one in each line; blank lines are skipped."""
    return (line.rstrip("\r\n") for line in lines if line.strip())


def items(named: list[str], files_from: str | None) -> Iterator[Item]:
    """Return the images of the command line.

    Args:
        named: files, folders, globs; - is the content of one image on standard input.
        files_from: a file with one path in each line, - for standard input, or None.

    Raises:
        PipelineError: a folder, a list or standard input holds no images, or a glob matches none.
        OSError: the list cannot be read.
    """
    found = expand([name for name in named if name != "-"])
    if files_from is not None:
        found = itertools.chain(found, _of_list(files_from))
    if "-" in named:
        found = itertools.chain(found, [Item("-", _standard_input())])
    return found


def _of_list(files_from: str) -> Iterator[Item]:
    paths = listed(_lines(files_from))
    first = next(paths, None)
    if first is None:
        where = "standard input" if files_from == "-" else files_from
        raise PipelineError(f"{where} names no images: it has only blank lines, or none")
    return map(_item, itertools.chain([first], paths))


def _lines(file: str) -> Iterator[str]:
    if file != "-":
        # Names of files need not be UTF-8.
        with open(file, encoding="utf-8", errors="surrogateescape") as lines:
            yield from _limited(lines, file)
    elif sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        yield from _limited(sys.stdin, "standard input")


def _limited(lines: TextIO, where: str) -> Iterator[str]:
    for number in itertools.count(1):
        line = lines.readline(LONGEST_PATH)
        if len(line) == LONGEST_PATH:
            raise PipelineError(f"{where}: line {number} is longer than any path")
        if not line:
            return
        yield line


def _standard_input() -> bytes | UnreadableImage:
    content = bytearray()
    if sys.stdin is not None:
        while len(content) <= MOST_BYTES and (read := sys.stdin.buffer.read(2**20)):
            content += read
    if not content:
        raise PipelineError("standard input holds no image (0 bytes)")
    if len(content) > MOST_BYTES:
        return UnreadableImage(f"is larger than {MOST_BYTES / 1e9:g} GB")
    return bytes(content)
