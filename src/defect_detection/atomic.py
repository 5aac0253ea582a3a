"""Writes that happen completely or not at all."""

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from defect_detection import PipelineError
from defect_detection.names import is_utf8

_FORMULA = tuple("=+-@\t\r\n'")  # how formulas begin, and what `defused` begins with


@contextmanager
def replace_atomically(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move it to `path` if the block succeeds.

    Args:
        path: of the file.
        private: whether only its owner may read it.

    Raises:
        PipelineError: the folder is missing or read-only, or the disk is full.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if not private:  # mkstemp allows only its owner
            umask = os.umask(0)  # only os.umask returns the umask
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Raise PipelineError unless files can be created in `folder`; called before long work."""
    with replace_atomically(folder / ".writable") as probe:
        probe.write_bytes(b"")
    (folder / ".writable").unlink(missing_ok=True)


def read_mapping(path: Path, key: str, value: str) -> dict[str, str]:
    """Read a CSV file with the columns `key` and `value`; each key has one row.

    A key that is not UTF-8 must be the name of a file, from the folder of the CSV file on.

    Raises:
        PipelineError: a column is missing, a row lacks a value, a key has two rows, or the file is
            damaged or in another encoding.
    """
    found: dict[str, str] = {}
    try:
        # Excel writes a byte order mark; names of files may hold any bytes.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file, strict=True)
            if not {key, value} <= set(rows.fieldnames or ()):
                raise PipelineError(f"{path}: its first line must name the columns {key},{value}")
            for row in rows:
                if not row[key] or not row[value]:
                    raise PipelineError(f"{path} line {rows.line_num}: {key} or {value} is empty")
                if not is_utf8(row[key]) and not os.path.lexists(path.parent / row[key]):
                    raise PipelineError(
                        f"{path} line {rows.line_num}: {row[key]} is not UTF-8, and no file has "
                        f"this name. Save {path.name} as UTF-8, or delete the line"
                    )
                if found.setdefault(row[key], row[value]) != row[value]:
                    raise PipelineError(f"{path} line {rows.line_num}: {row[key]} has two values")
    except (OSError, csv.Error) as error:
        raise PipelineError(f"{path}: cannot be read ({error})") from error
    return found


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows, the header among them, as CSV; what is not UTF-8 in names is escaped."""
    return _csv(rows).encode(errors="backslashreplace").decode()


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        # Python writes a carriage return without quotes, and reads it as the end of a line.
        (quoted if any("\r" in str(cell) for cell in row) else plain).writerow(row)
    return text.getvalue()


def defused(text: str) -> str:
    """Return a name for a CSV file that spreadsheets do not take for a formula.

    One that begins like a formula gets an apostrophe before it, which `restored` takes away.
    """
    return f"'{text}" if text.startswith(_FORMULA) and text != "-" else text


def restored(text: str) -> str:
    """Return the name that `defused` was given."""
    return text[1:] if text[:1] == "'" and text[1:].startswith(_FORMULA) else text


def write_mapping(path: Path, key: str, value: str, mapping: Mapping[str, object]) -> None:
    """Write a CSV file that `read_mapping` reads."""
    with replace_atomically(path) as temporary:
        text = _csv([(key, value), *mapping.items()])
        temporary.write_bytes(text.encode(errors="surrogateescape"))
