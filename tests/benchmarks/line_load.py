"""Measure POST /predict against the bare interpreter, at half its rate, beside a retraining.

    python tests/benchmarks/line_load.py
    python tests/benchmarks/line_load.py --seconds 10

All in one run and on the same cores: JPEGs of 300 x 300, the first set of src/config.yaml with new
weights, which take the same time. `mlflow models serve` serves the same version.
"""

import argparse
import base64
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "data", "tests", "tests/benchmarks")]

import inference_speed  # noqa: E402

SIDE, IMAGES = 300, 200
CALLERS = 8
RETRAINING = (
    "import numpy, time\n"
    "a = numpy.random.rand(600, 600)\n"
    "while True: a @ a\n"  # on all cores, as a fit does
)


def main() -> None:
    """Serve a model, load it, print rates and latencies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = draw(folder)
        model, environment = inference_speed.prepare_model(folder, images)
        contents = [path.read_bytes() for path in images]
        bare = bare_rate(model, contents, seconds / 4)
        print(f"decoding and the bare interpreter: {bare:.1f} images a second")
        with api(environment, folder) as port:
            send = predict(port, contents)
            print(f"{CALLERS} callers: {told(full(send, seconds), bare)}")
            rate = bare / 2
            print(f"at {rate:.0f} a second: {latencies(paced(send, rate, seconds))}")
            with retraining():
                print(f"the same beside a retraining: {latencies(paced(send, rate, seconds))}")
        with mlflow_serves(environment, folder) as port:
            others = full(invoke(port, contents), seconds / 4)
            print(f"mlflow models serve: {told(others, bare)}")


def draw(folder: Path) -> list[Path]:
    """Draw JPEGs."""
    import numpy as np

    from conftest import draw_part

    rng, paths = np.random.default_rng(0), []
    for label in ("def_front", "ok_front"):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(IMAGES // 2):
            paths.append(folder / "images" / label / f"{number:03}.jpeg")
            draw_part(rng, label == "def_front", SIDE).save(paths[-1], quality=90)
    return paths


def bare_rate(model: Path, contents: list[bytes], seconds: float) -> float:
    """Return how many images a second all cores decode and run through LiteRT, and nothing else."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    from defect_detection.runtime import preprocessing
    from defect_detection.runtime.model_files import ServedModel

    served = ServedModel.load(model)

    def work(start: int) -> int:
        interpreter = Interpreter(model_content=served.litert, num_threads=1)
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, (1, *served.takes.shape))
        interpreter.allocate_tensors()
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            image = preprocessing.decode(contents[(start + done) % len(contents)], served.takes)
            interpreter.set_tensor(index, image[np.newaxis].astype(np.float32))
            interpreter.invoke()
            done += 1
        return done

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return sum(pool.map(work, range(cores))) / seconds


@contextmanager
def serving(command: list[str], environment: dict[str, str], port: int, path: str) -> Iterator[int]:
    """Run a server until the block ends; yield its port when it answers."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not answers(port, path):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(log.read().decode(errors="replace")[-2000:])
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def answers(port: int, path: str) -> bool:
    """Return whether a server answers, and judges if it says so."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            body = answer.read()
    except OSError:
        return False
    return path != "/health" or bool(json.loads(body)["model"])


def api(environment: dict[str, str], folder: Path) -> "contextmanager":
    """Run the API."""
    from conftest import free_port

    port = free_port()
    more = {"LINE_PATH": str(folder / "line"), "JOBS_PATH": str(folder / "jobs")}
    command = [sys.executable, "api.py", "--host", "127.0.0.1", "--port", str(port)]
    return serving(command, environment | more, port, "/health")


def mlflow_serves(environment: dict[str, str], folder: Path) -> "contextmanager":
    """Run `mlflow models serve` with the same version."""
    from conftest import free_port

    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", inference_speed.PRODUCTION, "--port", str(port), "--host", "127.0.0.1"]
    path = f"{Path(sys.executable).parent}:{environment['PATH']}"  # of uvicorn
    return serving(command, environment | {"PATH": path}, port, "/ping")


Send = Callable[[int], float]


def predict(port: int, contents: list[bytes]) -> Send:
    """Return a function that has an image judged, and returns the seconds that takes."""
    return caller(port, "/predict", [("image/jpeg", content) for content in contents])


def invoke(port: int, contents: list[bytes]) -> Send:
    """Return the same for MLflow's server."""
    bodies = [
        json.dumps({"dataframe_records": [{"picture": base64.b64encode(one).decode()}]}).encode()
        for one in contents
    ]
    return caller(port, "/invocations", [("application/json", body) for body in bodies])


def caller(port: int, path: str, bodies: list[tuple[str, bytes]]) -> Send:
    """Return a function that sends a body over its thread's connection."""
    here = threading.local()

    def send(number: int) -> float:
        if not hasattr(here, "connection"):
            here.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        kind, body = bodies[number % len(bodies)]
        started = time.perf_counter()
        here.connection.request("POST", path, body, {"Content-Type": kind})
        answer = here.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {text[:200]!r}")
        return time.perf_counter() - started

    return send


def full(send: Send, seconds: float) -> tuple[float, list[float]]:
    """Send as fast as the server answers; return the rate and the latencies."""
    end = time.perf_counter() + seconds

    def work(start: int) -> list[float]:
        taken = []
        while time.perf_counter() < end:
            taken.append(send(start + CALLERS * len(taken)))
        return taken

    started = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        taken = [one for part in pool.map(work, range(CALLERS)) for one in part]
    return len(taken) / (time.perf_counter() - started), taken


def paced(send: Send, rate: float, seconds: float) -> list[float]:
    """Send at a steady rate, however long answers take; return the latencies."""
    started = time.perf_counter()

    def at(number: int) -> float:
        due = started + number / rate
        time.sleep(max(0, due - time.perf_counter()))
        send(number)
        return time.perf_counter() - due  # waiting for a caller counts

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(at, range(int(rate * seconds))))


@contextmanager
def retraining() -> Iterator[None]:
    """Keep all cores busy at the priority of a retraining."""
    process = subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", RETRAINING])
    try:
        time.sleep(1)
        yield
    finally:
        process.kill()
        process.wait()


def told(measured: tuple[float, list[float]], bare: float) -> str:
    """Return a rate in words."""
    rate, taken = measured
    return f"{rate:.1f} a second, {rate / bare:.0%} of that; {latencies(taken)}"


def latencies(taken: list[float]) -> str:
    """Return latencies in words."""
    ordered = sorted(1000 * one for one in taken)
    median, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    times = f"{p99 / median:.1f} times"
    return (
        f"{len(ordered)} calls, median {median:.1f} ms, p99 {p99:.1f} ms ({times}), maximum "
        f"{ordered[-1]:.1f} ms"
    )


if __name__ == "__main__":
    main()
