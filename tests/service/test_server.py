"""The server under attack: real sockets, a store that hangs, callers that take their time."""

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from waitress.adjustments import Adjustments
from waitress.channel import ClientDisconnected

from conftest import ROOT, Project, Server, free_port, wait_for
from defect_detection.service.server import Connection

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import api_under_attack

pytestmark = pytest.mark.slow

# The real server with less patience, and an application that takes its time.
PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(ROOT / "src")!r})
from flask import Flask
from defect_detection.service import server
server.PATIENCE = int(sys.argv[2])
app = Flask("slow")

@app.get("/quick")
def quick():
    return "quick"

@app.get("/large")
def large():
    return "a" * 2**20

@app.get("/slow")
def slow():
    time.sleep(8)
    return "done"

server.create(app, "127.0.0.1", int(sys.argv[1])).run()
"""


@pytest.fixture(scope="module")
def impatient():
    """The port of a server that gives a call 4 s to arrive."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), "4"])
    try:
        wait_for(lambda: api_under_attack.answers(port))
        yield port
    finally:
        process.terminate()
        process.wait(20)


def open_for(caller: socket.socket, seconds: float, every: float = 0.2) -> float:
    """Send a byte now and then; return after how long the server has closed the connection."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if not api_under_attack.is_open(caller):
            return passed
        try:
            caller.send(b"a")
        except OSError:
            return passed
        time.sleep(every)
    return seconds


def test_call_that_arrives_byte_by_byte_is_cut_off(impatient):
    with socket.create_connection(("127.0.0.1", impatient)) as caller:
        caller.send(b"GET /quick HTTP/1.1\r\nX-Slow: ")
        assert 3 < open_for(caller, 60) < 60


@pytest.mark.long
def test_callers_that_read_no_answer_hold_no_thread_and_are_cut_off(impatient):
    callers = [socket.create_connection(("127.0.0.1", impatient)) for _ in range(20)]
    try:
        for caller in callers:  # more than there are threads
            caller.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
        time.sleep(1)
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=60)
        connection.request("GET", "/quick")
        assert connection.getresponse().read() == b"quick"
        connection.close()
        assert time.monotonic() - began < 3
        one = socket.create_connection(("127.0.0.1", impatient))
        callers.append(one)
        one.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(2 * 4 + 5)  # its patience, and some
        for caller in callers:
            assert received(caller) < 2**20 * 16
        assert received(one) == 0  # all that was on the way is read, and it is closed
    finally:
        for caller in callers:
            caller.close()


def received(caller: socket.socket) -> int:
    """Read all that is on the way until the server has closed the connection; return its bytes."""
    caller.settimeout(5)
    count = 0
    try:
        while part := caller.recv(2**20):
            count += len(part)
    except ConnectionError:
        pass
    return count


@pytest.mark.long
def test_call_that_takes_long_to_answer_is_not_cut_off(impatient):
    connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=60)
    for path, text in (("/slow", b"done"), ("/quick", b"quick")):  # the connection lives on
        connection.request("GET", path)
        assert connection.getresponse().read() == text
    connection.close()


def test_large_headers_are_refused(impatient):
    connection = http.client.HTTPConnection("127.0.0.1", impatient, timeout=60)
    connection.request("GET", "/quick", headers={"X-Large": "a" * 20_000})
    assert connection.getresponse().status == 431
    connection.close()


def test_health_answers_at_once_while_the_store_hangs_and_callers_are_slow():
    with (
        api_under_attack.hanging_store() as store,
        api_under_attack.api(store) as port,
        api_under_attack.slow_callers(port),
    ):
        took = api_under_attack.call_health(port, 8)
    assert len(took) >= 54
    assert statistics.median(took) < 0.1
    assert sorted(took)[int(0.99 * len(took))] < 2  # on a machine that does other things too


def test_api_ends_at_once_while_the_store_hangs():
    with api_under_attack.hanging_store() as store, api_under_attack.api(store) as port:
        assert api_under_attack.call_health(port, 0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 15


def test_query_that_hangs_is_given_up_within_seconds(project, tmp_path):
    with api_under_attack.hanging_store() as store:
        (project.root / ".env").write_text(f"MLFLOW_TRACKING_URI={store}\n")
        running = Server(project, tmp_path / "api.log")
        running.start()
        try:
            wait_for(lambda: "Read timed out" in running.log.read_text())
        finally:
            running.process.terminate()
            running.process.wait(20)


def test_three_hundred_callers_are_served_where_few_files_may_be_open():
    port = free_port()
    limited = ["sh", "-c", 'ulimit -S -n 256; exec "$@"', "sh"]  # as macOS does by default
    process = subprocess.Popen([*limited, sys.executable, "-c", PROGRAM, str(port), "120"])
    callers = []
    try:
        wait_for(lambda: api_under_attack.answers(port))
        for _ in range(300):
            callers.append(socket.create_connection(("127.0.0.1", port), 60))
        callers[-1].sendall(b"GET /quick HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert callers[-1].recv(12) == b"HTTP/1.1 200"
    finally:
        for caller in callers:
            caller.close()
        process.terminate()
        process.wait(20)


CHILD = """
import os, time
print("started by", os.environ["RETRAIN_STARTED_BY"])
print("retries", os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
print("timeout", os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT"), flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.fixture
def server(project: Project, tmp_path):
    (project.root / "re_train" / "re_train.py").write_text(CHILD)
    running = Server(project, tmp_path / "api.log")
    running.start()
    yield running
    for job in running.call("GET", "/retrain")[1]:
        running.call("DELETE", f"/retrain/{job['id']}")
    running.process.terminate()
    running.process.wait(20)


def send(server: Server, method: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


PROXY = ["X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "x-forwarded-server"]
PROXY += ["Forwarded", "X-Real-IP", "Via"]


def test_call_that_came_through_a_proxy_changes_nothing_without_a_token(server):
    for header in PROXY:
        for method, path in (("POST", "/retrain"), ("DELETE", "/retrain/1")):
            status, text = send(server, method, path, **{header: "127.0.0.1"})
            assert status == 403, header
            assert "came through a proxy, so its sender is not known: set API_TOKEN" in text
        assert send(server, "GET", "/retrain", **{header: "127.0.0.1"}) == (200, "[]\n")


def test_who_starts_and_cancels_is_recorded_and_the_job_has_its_own_limits(server):
    assert send(server, "POST", "/retrain", **{"User-Agent": '"é\\' + "a" * 200})[0] == 202
    (job,) = server.call("GET", "/retrain")[1]
    shown = '"?\\' + "a" * 74 + "..."
    assert job["started_by"] == f"127.0.0.1, by this machine, {json.dumps(shown)}"
    wait_for(lambda: "timeout" in server.call("GET", job["log"])[1])
    output = server.call("GET", job["log"])[1]
    assert output == f"started by {job['started_by']}\nretries 4\ntimeout None\n"
    send(server, "DELETE", f"/retrain/{job['id']}", **{"User-Agent": "curl/8.5"})
    cancelled = server.call("GET", f"/retrain/{job['id']}")[1]
    assert cancelled["ended_by"] == '127.0.0.1, by this machine, "curl/8.5"'
    assert cancelled["started_by"] == job["started_by"]


def test_job_whose_process_is_not_known_cannot_be_cancelled_and_the_answer_says_so(server):
    job = server.call("POST", "/retrain")[1]
    pid = server.pid_of(job["id"])
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    (server.project.root / ".jobs" / job["id"] / "process.json").write_text("{")
    server.start()
    status, answer, _ = server.call("DELETE", f"/retrain/{job['id']}")
    assert (status, answer["job"]["state"]) == (409, "running")
    assert "could not be ended" in answer["message"]
    assert "process.json" in answer["job"]["message"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.state(job["id"]) == "failed")


RAW = [
    b"GET /retrain HTTP/1.1\r\nHost: [\r\n\r\n",
    b"POST /retrain HTTP/1.1\r\nHost: [\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
    b"GET http://[/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /retrain/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /retrain/" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /retrain?limit=%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /retrain HTTP/1.1\r\nHost: \xff\r\nOrigin: http://[\r\nContent-Length: 0\r\n\r\n",
    b"POST /retrain HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n",
    b"POST /retrain HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /retrain HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n",
    b"POST /retrain HTTP/1.0\r\n\r\n",
    b"\x16\x03\x01\x00\x05hello\r\n\r\n",
]


def test_malformed_calls_are_refused_and_no_errors_of_the_server(server):
    for call in RAW:
        with socket.create_connection(("127.0.0.1", server.port), 60) as caller:
            caller.sendall(call)
            version, status = caller.recv(12).split(b" ")
        assert version in (b"HTTP/1.0", b"HTTP/1.1") and int(status) < 500, call
    assert server.call("GET", "/retrain")[1] == []
    lines = server.log.read_text().splitlines()
    assert len(lines) == 2, lines
    assert sum(line.startswith("There is no tracking store") for line in lines) == 1


def test_caller_of_a_malformed_call_who_hangs_up_is_no_error(monkeypatch):
    limits, (ours, theirs) = Adjustments(), socket.socketpair()
    serving = SimpleNamespace(adj=limits, active_channels={})
    serving.add_task = serving.pull_trigger = mock.Mock()
    connection = Connection(serving, ours, "", limits, {})
    connection.received(b"GET http://[/health HTTP/1.1\r\n\r\n")
    monkeypatch.setattr(connection, "write_soon", mock.Mock(side_effect=ClientDisconnected))
    with ours, theirs:
        connection.service()
    assert connection.close_when_flushed
