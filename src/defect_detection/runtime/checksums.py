"""The SHA-256 of every file of a saved model, in a file that `sha256sum --check` reads."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def write(folder: Path) -> str:
    """Write the checksums of all files in a folder; return the SHA-256 of what was written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    lines = [f"{_of(path.read_bytes())}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    text = "".join(lines).encode()
    (folder / FILE).write_bytes(text)
    return _of(text)


def read(folder: Path, expected: str = "") -> dict[str, str]:
    """Return the checksums of a folder's files by name, none for models from before there were any.

    Args:
        folder: of the model.
        expected: what `write` returned; "" if that is not known.

    Raises:
        ValueError: they are missing although they are expected, damaged, or not the expected ones.
    """
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        if expected:
            raise ValueError(f"{FILE} is missing") from None
        return {}
    if expected and _of(text) != expected:
        raise ValueError(f"{FILE} is not the one that was saved with the model")
    found = {}
    for line in text.decode().splitlines():
        match = _LINE.fullmatch(line)
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise ValueError(f"{FILE} is damaged")
        found[match[2]] = match[1]
    if not found:
        raise ValueError(f"{FILE} is empty")
    return found


def content(folder: Path, name: str, known: Mapping[str, str]) -> bytes:
    """Read a file at the top of a model's folder and compare it with its checksum, if any is known.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not the file that was saved, or the name leads out of the folder.
    """
    if Path(name).name != name:
        raise ValueError(f"{name} is no file of the model's folder")
    found = (folder / name).read_bytes()
    if known and known.get(name) != _of(found):
        raise ValueError(f"{name} is not the file that was saved with the model")
    return found


def verify(folder: Path, expected: str = "") -> None:
    """Compare all files of a folder that have a checksum.

    Args:
        folder: of the model.
        expected: as for `read`.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is not the one that was saved, or as `read` raises it.
    """
    for name, checksum in read(folder, expected).items():
        if _of((folder / name).read_bytes()) != checksum:
            raise ValueError(f"{name} is not the file that was saved with the model")


def _of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
