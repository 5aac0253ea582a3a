"""What all scripts share: the parser, logging, and errors in one line."""

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from defect_detection import PipelineError
from defect_detection.names import printable

DATA_OPTIONS = ("data", "config")


def parser(docstring: str, example: str, data: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the script's docstring as help and an example.

    Args:
        docstring: of the script.
        example: of a call.
        data: whether it has the options `--data` and `--config`.
    """
    made = argparse.ArgumentParser(
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


class _OneLine(logging.Formatter):
    """Messages name files, whose names may hold control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit with its exit code, or with an error in one line and 1."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    for noisy in ("mlflow", "alembic", "absl", "tensorflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
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
        if error.filename is None:
            raise
        sys.exit(printable(f"error: {error.filename}: {error.strerror}"))
    except KeyboardInterrupt:
        sys.exit(130)
