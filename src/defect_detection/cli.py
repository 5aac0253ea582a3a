"""What all scripts share: the parser, logging, and errors in one line."""

import argparse
import errno
import gc
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from defect_detection import PipelineError
from defect_detection.names import printable

DATA_OPTIONS = ("data", "config")


class Formatter(logging.Formatter):
    """One line for each message, whatever is in it, and one for each line of a traceback."""

    def __init__(self, most: int | None = None, indent: str = ""):
        """Show `most` characters of a line, None for all; indent the lines of a traceback."""
        super().__init__("%(message)s")
        self._most, self._indent = most, indent

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message."""
        return printable(super().formatMessage(record), self._most)

    def formatException(
        self,
        raised: tuple[type[BaseException], BaseException, TracebackType | None]
        | tuple[None, None, None],
    ) -> str:
        """Return the lines of a traceback."""
        lines = super().formatException(raised).split("\n")
        return "\n".join(self._indent + printable(line, self._most) for line in lines)


class _Parser(argparse.ArgumentParser):
    """Makes messages printable."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser(docstring: str, example: str, data: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the script's docstring as help and an example.

    Args:
        docstring: of the script.
        example: of a call.
        data: whether it has the options `--data` and `--config`.
    """
    made = _Parser(
        description=docstring,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if data:
        made.add_argument(
            "--data",
            metavar="DIR",
            help="folder with train/ and test/; default: the variable DATA_PATH, then the YAML's",
        )
        made.add_argument("--config", metavar="FILE", help="instead of src/config.yaml")
    return made


def refuse_empty(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Sequence[str]
) -> None:
    """End with exit code 2 if an option is empty, as a variable of the shell that is not set."""
    for name in names:
        if getattr(options, name) == "":
            parser.error(f"--{name.replace('_', '-')} is empty")


def command(script: str, options: argparse.Namespace, names: Sequence[str] = DATA_OPTIONS) -> str:
    """Return how to call another script with the same data and configuration.

    Args:
        script: its path.
        options: of this script.
        names: of the options that the other script has too.
    """
    words = ["python", script]
    for name in names:
        if getattr(options, name, None):
            words += [f"--{name}", getattr(options, name)]
    return shlex.join(words)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGTERM and SIGINT back during the block; the first that came acts right after it.

    For two steps of which the second must follow the first, such as moving an alias and saying so.
    Only the main thread can call it, as only that handles signals.
    """
    came: list[int] = []
    former = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        for sign in former:
            signal.signal(sign, lambda number, _: came.append(number))
        yield
    finally:
        for sign, handler in former.items():
            signal.signal(sign, handler)
        if came:
            signal.raise_signal(came[0])


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit with its exit code, or with an error in one line and 1."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[shown])
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for noisy in ("mlflow", "alembic", "absl", "tensorflow"):
        # Their errors come as exceptions, too, and are said in one line.
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    # As an exception, so that everything open is closed: an MLflow run then ends as failed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except PipelineError as error:
        sys.exit(f"error: {printable(str(error))}")
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(printable(f"error: {where}{error.strerror}"))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # else Python looks through a million objects before it ends: 2 s
