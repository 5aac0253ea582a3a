"""What every script does around its own work: options, logging, errors in one line."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from defect_detection import PipelineError
from defect_detection.settings import from_root


def parser(docstring: str, example: str, data: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the script's docstring as help, an example, and `--data` if wanted."""
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
    return made


def data_folder(argument: str | None, env: Mapping[str, str], configured: str) -> Path:
    """Choose the data folder: the option, the variable DATA_PATH, the configuration.

    The option counts from the caller's folder, as a shell completes it; the others from the
    project's root.

    Raises:
        PipelineError: there is no such folder.
    """
    folder = Path.cwd() / argument if argument else from_root(env.get("DATA_PATH", configured))
    if not folder.is_dir():
        raise PipelineError(
            f"{folder} is not a folder. Name one with --data or DATA_PATH, or run 'make sample'"
        )
    return folder.resolve()


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main; end with its exit code, or with one line and 1 on an error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("mlflow", "alembic", "absl", "tensorflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # As an exception, so that what is open is closed: an MLflow run ends as failed, not never.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except PipelineError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
