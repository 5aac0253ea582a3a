"""A Ray cluster, connected for a block; its errors come in one line."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from defect_detection import PipelineError
from defect_detection.names import first_line

PACKAGE = Path(__file__).resolve().parent  # is sent to the workers; their packages are their own
ANSWER_WITHIN = 10  # seconds
ATTEMPTS = 3  # since Ray and gRPC fork badly now and then
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # plants may have no internet
# What matters comes as an exception.
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster for the block.

    Args:
        address: "auto" for the one of this machine, "host:6379" on one of its machines,
            "ray://host:10001" from elsewhere, "local" for one that lasts as long as the block.

    Raises:
        PipelineError: Ray is not installed, the cluster cannot be reached, or a task failed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise PipelineError(
            "Ray is not installed. Run 'pip install -r requirements-ray.txt'"
        ) from error
    try:
        _require_answer(address)
        _begin(address)
    except (OSError, OverflowError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if "ersion mismatch" in str(error):
            which = " ".join(str(error).split())
            raise PipelineError(
                f"The Ray cluster at {address} has other versions ({which}). Install the same "
                f"Python and the same packages everywhere"
            ) from error
        raise PipelineError(
            f"There is no Ray cluster at {address} ({first_line(error)}). Start one with 'ray "
            f"start --head'. One with a token needs RAY_AUTH_MODE=token and ~/.ray/auth_token here"
        ) from error
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise PipelineError(str(error.cause)) from error
        why = first_line(error.cause)
        raise PipelineError(f"A task on the cluster {address} failed: {why}") from error
    except ray.exceptions.RayError as error:
        why = first_line(error)
        raise PipelineError(f"The cluster {address} failed: {why}. Run this again") from error
    finally:
        ray.shutdown()


def _begin(address: str) -> None:
    import ray

    for again in reversed(range(ATTEMPTS)):
        try:
            ray.init(
                address=address,
                runtime_env={"py_modules": [str(PACKAGE)]},
                log_to_driver=False,
                logging_level="ERROR",
            )
        except ConnectionAbortedError:  # the process that a ray:// address starts died at once
            if not again:
                raise
        else:
            return


def _require_answer(address: str) -> None:
    """Raise OSError if nobody listens at an address with a port; Ray would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_WITHIN).close()


def cores() -> list[int]:
    """Return the cores of each machine of the connected cluster that has some to give."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()
    every = [int(one["Resources"].get("CPU", 0)) for one in found if one["Alive"]]
    return [cores for cores in every if cores]
