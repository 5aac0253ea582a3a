"""Measure how fast /health answers while the store hangs and slow callers hold connections.

    python tests/benchmarks/api_under_attack.py --minutes 10

The store answers its own /health and nothing else. A hundred callers send a byte now and then and
never a whole call. Meanwhile /health is called ten times a second, each time anew.
"""

import argparse
import http.server
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CALLERS = 100
BYTE_EVERY = 1  # seconds
CALL = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 1000


def main() -> None:
    """Start an API, attack it, and print how long the calls took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    with hanging_store() as store, api(store) as port, slow_callers(port):
        took = sorted(1000 * seconds for seconds in call_health(port, 60 * minutes))
    p99 = took[int(0.99 * (len(took) - 1))]
    print(
        f"{len(took)} calls of /health: median {statistics.median(took):.1f} ms, p99 {p99:.1f} ms, "
        f"maximum {took[-1]:.1f} ms"
    )


@contextmanager
def hanging_store() -> Iterator[str]:
    """Run a tracking server that answers /health and lets every other call hang; yield its URI."""
    end = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            if self.path != "/health":
                end.wait()
                return
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        end.set()
        server.shutdown()
        server.server_close()


@contextmanager
def api(store: str) -> Iterator[int]:
    """Run `python api.py` with a store; yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "api.py"), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--jobs", folder]
        process = subprocess.Popen(command, env=os.environ | {"MLFLOW_TRACKING_URI": store})
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("error: the API does not answer")
                time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait()


def answers(port: int) -> bool:
    """Return whether somebody listens on a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def slow_callers(port: int) -> Iterator[None]:
    """Hold connections to the API during the block, anew whenever it closes one."""
    end = threading.Event()
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(CALLERS)]

    def drip() -> None:
        sent = 0
        while not end.wait(BYTE_EVERY):
            for number, one in enumerate(held):
                if not is_open(one):
                    one.close()
                    held[number] = socket.create_connection(("127.0.0.1", port))
                try:
                    held[number].send(CALL[sent : sent + 1])
                except OSError:  # closed in this moment
                    pass
            sent = (sent + 1) % len(CALL)

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        for one in held:
            one.close()


def is_open(caller: socket.socket) -> bool:
    """Return whether the API has not closed a connection on which it said nothing."""
    caller.setblocking(False)
    try:
        return caller.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def call_health(port: int, seconds: float) -> list[float]:
    """Call /health ten times a second; return the seconds that each call took."""
    took = []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=60) as answer:
            assert json.load(answer)["store"] == "unreachable"
        took.append(time.monotonic() - began)
        time.sleep(max(0.0, 0.1 - took[-1]))
    return took


if __name__ == "__main__":
    main()
