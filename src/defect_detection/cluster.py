"""A Ray cluster, connected for a block; its errors come in one line."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from defect_detection import PipelineError
from defect_detection.names import first_line

PACKAGE = Path(__file__).resolve().parent  # is sent to the workers; their packages are their own
ANSWER_WITHIN = 10  # seconds
TRIES = 3  # since Ray and gRPC fork badly now and then
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # plants may have no internet
# What matters comes as an exception.
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")


@contextmanager
def connected(address: str, variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Connect to a cluster for the block.

    Args:
        address: "auto" for the one of this machine, "host:6379" on one of its machines,
            "ray://host:10001" from elsewhere, "local" for one that lasts as long as the block.
        variables: of the environment of this process and of the workers.

    Raises:
        PipelineError: Ray is not installed, the cluster cannot be reached, or a task failed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise PipelineError(
            "Ray is not installed. Run 'pip install -r requirements-ray.txt'"
        ) from error
    for name, value in (variables or {}).items():
        os.environ.setdefault(name, value)
    try:
        _require_answer(address)
        _begin(address, dict(variables or {}))
    except (OSError, OverflowError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
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


def _begin(address: str, variables: dict[str, str]) -> None:
    import ray

    for again in reversed(range(TRIES)):
        try:
            ray.init(
                address=address,
                runtime_env={"py_modules": [str(PACKAGE)], "env_vars": variables},
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
    """Return the cores of each machine of the connected cluster."""
    import ray

    found: list[dict[str, Any]] = ray.nodes()
    return [int(one["Resources"].get("CPU", 0)) for one in found if one["Alive"]]
