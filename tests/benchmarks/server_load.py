"""How many lines a team's server answers, each of which asks once a minute what is in production.

    python tests/benchmarks/server_load.py

The server and those that ask share the cores, so a server of its own answers more.
"""

import logging
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "data", "tests", "tests/benchmarks")]

import inference_speed  # noqa: E402

import preloaded  # noqa: E402

CALLERS, SECONDS = 4, 30
ASKED_EVERY = 60  # seconds: `ASK_EVERY` of `inference.production`


def main() -> None:
    """Start a server with a version in production, ask it, print the rate."""
    from conftest import Project
    from team import TeamServer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Project.cache = folder / "cache"
        images = inference_speed.prepare_pictures(folder)
        _, environment = inference_speed.prepare_model(folder, sorted(images.rglob("*.jpeg")))
        server = TeamServer(Project(folder / "project"))
        try:
            store = {"MLFLOW_TRACKING_URI": environment["MLFLOW_TRACKING_URI"]}
            server.project.succeed("src/server.py", "--migrate", **server.variables | store)
            server.start()
            with ProcessPoolExecutor(CALLERS, preloaded.processes()) as pool:
                caches = [str(folder / f"cache of {number}") for number in range(CALLERS)]
                calls = [pool.submit(asked, server.uri_with_password, cache) for cache in caches]
                rate = sum(call.result() for call in calls) / SECONDS
        finally:
            server.delete()
    print(f"{rate:.1f} questions a second are answered: {rate * ASKED_EVERY:.0f} lines")


def asked(uri: str, cache: str) -> int:
    """Ask as a line does, with the model's files here after the first time; return how often."""
    from defect_detection.inference import fetch
    from defect_detection.inference.production import Source

    logging.disable()
    source = Source(uri, "Production_Reg", cache)
    fetch.fetch(source)
    done, end = 0, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        fetch.fetch(source)
        done += 1
    return done


if __name__ == "__main__":
    main()
