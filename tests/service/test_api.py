"""The API: in process for what it refuses, as a real server for what it does."""

import errno
import json
import os
import signal
import tempfile
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backends import LOCAL, backend, client
from conftest import ROOT, Server, free_port, wait_for
from defect_detection.registry import store as stores
from defect_detection.registry import versions
from defect_detection.service.access import Role
from defect_detection.service.health import StoreWatch
from defect_detection.service.jobs import Jobs

CHILD = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from defect_detection.service.reporter import Reporter
reporter = Reporter(dict(os.environ))
reporter.progress(0, 4, "run-1")
print("started with", *sys.argv[1:], flush=True)
while not Path("go").exists():
    time.sleep(0.01)
if Path("go").read_text() == "fail":
    sys.exit("error: it went wrong")
reporter.progress(4, 4, "run-1")
reporter.result("Testing_Reg", 2, 0.55)
"""


def make(tmp_path: Path, token: str | None = None, store: StoreWatch | None = None):
    """Make a client of an application whose jobs end at once; it calls from elsewhere."""
    tokens = {Role.ENGINEER: token} if token else None
    return client(backend(tmp_path, tokens, store), {})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "The body: "),
        ("[]", "The body: "),
        ('{"epoch": 3}', "epoch is not a known key, did you mean epochs?"),
        ('{"size": 3}', "size is not a known key, expected one of: epochs, batch_size, learn"),
        ('{"epochs": "3"}', 'epochs is "3", expected a whole number, at least 1'),
        ('{"epochs": 0}', "epochs is 0, expected a whole number, at least 1"),
        ('{"epochs": 1e9}', "at most 1000"),
        ('{"batch_size": 1.5}', "batch_size is 1.5, expected a whole number"),
        ('{"learning_rate": -1}', "learning_rate is -1, expected a number, more than 0"),
        ('{"learning_rate": NaN}', "The body: "),
    ],
)
def test_wrong_body_is_400_with_what_is_expected(tmp_path, body, message):
    answer = make(tmp_path).post("/retrain", data=body, environ_base=LOCAL)
    assert answer.status_code == 400
    assert message in answer.json["message"]
    assert answer.json["status"] == 400
    assert str(ROOT) not in answer.text
    assert not list((tmp_path / "jobs").glob("*/job.json"))


def test_health_names_the_version_in_production_also_without_an_accuracy(tmp_path, monkeypatch):
    with stores.connected(f"sqlite:///{tmp_path}/mlflow.db", create=True):
        stores.open_experiment("any")
    store = StoreWatch(f"sqlite:///{tmp_path}/mlflow.db", "Production_Reg")
    client = make(tmp_path, store=store)
    store.look()
    assert client.get("/health").json["store"] == "reachable"
    assert client.get("/health").json["production"] is None
    for acc, expected in ((0.9, 0.9), (float("nan"), None)):
        version = versions.Version("Production_Reg", 3, acc)
        monkeypatch.setattr(versions, "in_production", lambda *_, found=version: found)
        store.look()
        assert client.get("/health").json["production"] == {
            "registry": "Production_Reg",
            "version": 3,
            "acc": expected,
        }


def test_large_body_is_413(tmp_path):
    answer = make(tmp_path).post("/retrain", data=" " * 20_000, environ_base=LOCAL)
    assert (answer.status_code, answer.json["status"]) == (413, 413)


@pytest.mark.parametrize("method", ["post", "delete"])
@pytest.mark.parametrize("forwarded", ["X-Forwarded-For", "X-Real-IP", "Forwarded"])
def test_without_a_token_changes_from_other_machines_are_403(tmp_path, method, forwarded):
    path = "/retrain" if method == "post" else "/retrain/1"
    headers = {forwarded: "for=127.0.0.1" if forwarded == "Forwarded" else "127.0.0.1"}
    answer = getattr(make(tmp_path), method)(
        path, headers=headers, environ_base={"REMOTE_ADDR": "192.168.0.7"}
    )
    assert answer.status_code == 403
    assert "from this machine only" in answer.json["message"]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_without_a_token_changes_from_this_machine_are_taken(tmp_path, address):
    answer = make(tmp_path).post("/retrain", environ_base={"REMOTE_ADDR": address})
    assert answer.status_code == 202


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://elsewhere.example"}, {"Host": "rebound.example:5001"}]
)
def test_pages_of_other_sites_cannot_change_anything_through_a_local_browser(tmp_path, headers):
    answer = make(tmp_path).post("/retrain", headers=headers, environ_base=LOCAL)
    assert answer.status_code == 403


@pytest.mark.parametrize("header", ["Host", "Origin"])
@pytest.mark.parametrize(
    "value", ["[", "http://[", "http://[::1", "//[x]:1", "[]:5001", "\xff", ""]
)
def test_malformed_host_or_origin_is_refused(tmp_path, header, value):
    answer = make(tmp_path).post("/retrain", headers={header: value}, environ_base=LOCAL)
    assert answer.status_code == (202 if (header, value) == ("Origin", "") else 403)


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-FORWARDED-BY", "forwarded", "via"])
def test_forwarded_call_needs_the_token(tmp_path, header):
    headers = {header: "for=127.0.0.1"}
    answer = make(tmp_path).post("/retrain", headers=headers, environ_base=LOCAL)
    assert answer.status_code == 403
    assert "came through a proxy" in answer.json["message"]
    headers["Authorization"] = "Bearer secret"
    answer = make(tmp_path, "secret").post("/retrain", headers=headers, environ_base=LOCAL)
    assert answer.status_code == 202
    assert answer.json["started_by"].startswith("127.0.0.1, by token")


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer ", "secret", "Basic secret", "é"])
def test_with_a_token_changes_need_it_from_everywhere(tmp_path, given):
    headers = {} if given is None else {"Authorization": given}
    answer = make(tmp_path, "secret").post("/retrain", headers=headers, environ_base=LOCAL)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_with_the_token_changes_are_taken_from_everywhere(tmp_path):
    answer = make(tmp_path, "secret").post(
        "/retrain",
        headers={"Authorization": "Bearer secret"},
        environ_base={"REMOTE_ADDR": "192.168.0.7"},
    )
    assert answer.status_code == 202


def test_looking_needs_no_token(tmp_path):
    client = make(tmp_path, "secret")
    assert client.get("/retrain", environ_base={"REMOTE_ADDR": "192.168.0.7"}).json == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("get", "/none", 404), ("put", "/retrain", 405), ("get", "/retrain/none", 404)]
    + [("get", "/retrain/none/log", 404), ("delete", "/retrain/none", 404)],
)
def test_errors_are_json_with_status_and_message(tmp_path, method, path, status):
    answer = getattr(make(tmp_path), method)(path, environ_base=LOCAL)
    assert answer.status_code == answer.json["status"] == status
    assert answer.json["message"]


def test_failure_inside_tells_nothing_of_the_inside(tmp_path, monkeypatch):
    client = make(tmp_path)
    monkeypatch.setattr(Jobs, "all", lambda *_: 1 / 0)
    answer = client.get("/retrain", environ_base=LOCAL)
    assert answer.status_code == 500
    assert set(answer.json) == {"status", "message"}
    assert "division" not in answer.text and "/" not in answer.json["message"]


def test_health_tells_of_a_store_that_cannot_be_reached(tmp_path):
    store = StoreWatch(f"http://127.0.0.1:{free_port()}", "Production_Reg")
    store.look()
    answer = make(tmp_path, store=store).get("/health")
    assert answer.json["store"] == "unreachable"
    assert answer.json["production"] is None


def past_jobs(tmp_path: Path, count: int) -> list[str]:
    """Write jobs that have failed; return their ids, newest first."""
    ids = [f"20250101-000000-{number:06}-abcd" for number in range(count)]
    for job_id in ids:
        (tmp_path / "jobs" / job_id).mkdir(parents=True)
        asked = {"created_at": "2025-01-01T00:00:00.000+00:00", "parameters": {}}
        (tmp_path / "jobs" / job_id / "job.json").write_text(json.dumps(asked))
    return ids[::-1]


def test_jobs_come_in_pages_that_lead_to_the_next(tmp_path):
    ids, found, path = past_jobs(tmp_path, 120), [], "/retrain"
    client = make(tmp_path)
    for size in (50, 50, 20):
        answer = client.get(path)
        assert len(answer.json) == size
        found += [job["id"] for job in answer.json]
        link = answer.headers.get("Link", "")
        path = link.removeprefix("<").removesuffix('>; rel="next"')
    assert (found, link) == (ids, "")
    answer = client.get("/retrain?limit=2")
    assert [job["id"] for job in answer.json] == ids[:2]
    assert answer.headers["Link"] == f'</retrain?limit=2&before={ids[1]}>; rel="next"'
    assert len(client.get("/retrain?limit=120").json) == 120
    assert "Link" not in client.get("/retrain?limit=120").headers


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", "limit is 0: Input should be greater than or equal to 1"),
        ("limit=501", "limit is 501: Input should be less than or equal to 500"),
        ("limit=-1", "limit is -1: Input should be"),
        ("limit=", "limit is : Input should be a valid integer"),
        ("limit=\u0663", "limit is \u0663: Input should be a valid integer"),
        ("limit=" + "9" * 5000, "limit is " + "9" * 57 + "...: "),
        ("before=..", "before is ..: String should match pattern"),
        ("before=%00", "before is \\x00: String should match pattern"),
    ],
    ids=range(8),
)
def test_wrong_page_is_400_with_what_is_expected(tmp_path, query, message):
    answer = make(tmp_path).get(f"/retrain?{query}")
    assert answer.status_code == answer.json["status"] == 400
    assert message in answer.json["message"]


def test_of_a_long_log_the_end_is_shown_and_said_how_much_is_left_out(tmp_path):
    (job_id,) = past_jobs(tmp_path, 1)
    client, log = make(tmp_path), tmp_path / "jobs" / job_id / "log"
    log.write_bytes(b"a" * 1024 * 1024)
    assert client.get(f"/retrain/{job_id}/log").data == log.read_bytes()
    with log.open("wb") as file:
        file.truncate(3_000_000_000)  # takes no room on the disk
        file.seek(0, os.SEEK_END)
        file.write(b"the end\n")
    shown = client.get(f"/retrain/{job_id}/log").data
    first, _, rest = shown.partition(b"\n")
    left_out = 3_000_000_008 - 1024 * 1024
    assert first == b"(%d bytes before this are left out)" % left_out
    assert len(rest) == 1024 * 1024 and rest.endswith(b"the end\n")


@pytest.mark.parametrize(
    "job_id",
    ["a" * 300, "a" * 200_000, "%00", "%0aforged", "%ff", "..", "%2e%2e", "\u202e" * 70],
    ids=range(8),
)
def test_unknown_id_is_404_and_repeated_in_part(tmp_path, job_id):
    client = make(tmp_path)
    for call in (client.get, client.delete):
        answer = call(f"/retrain/{job_id}", environ_base=LOCAL)
        assert answer.status_code == answer.json["status"] == 404
        message = answer.json["message"]
        assert message.isprintable() and len(message) <= 60 + 45


def test_job_that_cannot_be_kept_is_503_with_the_reason(tmp_path, monkeypatch):
    client = make(tmp_path)

    def mkstemp(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    answer = client.post("/retrain", environ_base=LOCAL)
    assert answer.status_code == 503
    expected = "No retraining could be started: No space left on device"
    assert answer.json["message"] == expected


CHARACTERS = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=80)


@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "HEAD"]),
    path=st.binary(max_size=60),
    query=CHARACTERS,
    headers=st.dictionaries(
        st.sampled_from(["Host", "Origin", "Authorization", "User-Agent", "Content-Type", "Via"]),
        CHARACTERS | st.sampled_from(["http://[", "[", "localhost:x", "http://[::1]:5001"]),
    ),
    body=st.binary(max_size=60) | st.sampled_from([b"[" * 9000, b'{"epochs": %s}' % (b"9" * 9000)]),
)
@example("GET", b"%00", "", {}, b"")
@example("POST", b"", "", {"Host": "localhost"}, b'{"epochs": %s}' % (b"9" * 9000))
def test_no_call_is_an_error_of_the_server(tmp_path_factory, method, path, query, headers, body):
    answer = make(tmp_path_factory.mktemp("api")).open(
        "/retrain" + urllib.parse.quote(b"/" + path if path else b"", safe="/%"),
        method=method,
        query_string=urllib.parse.quote(query, safe="=&%"),
        headers=headers,
        data=body,
        environ_base=LOCAL,
    )
    assert answer.status_code < 500


class Waiting(Server):
    """A server whose jobs wait for the file `go`."""

    def go(self, how: str = "succeed") -> None:
        (self.project.root / "go.new").write_text(how)
        (self.project.root / "go.new").rename(self.project.root / "go")


@pytest.fixture
def server(project, tmp_path):
    (project.root / "re_train" / "re_train.py").write_text(CHILD)
    running = Waiting(project, tmp_path / "api.log")
    running.start()
    yield running
    for job in running.call("GET", "/retrain")[1]:
        running.call("DELETE", f"/retrain/{job['id']}")
    running.process.terminate()
    running.process.wait(20)


def test_job_from_start_to_end(server):
    status, job, headers = server.call("POST", "/retrain", {"epochs": 4})
    assert (status, job["state"]) == (202, "running")
    assert headers["Location"] == f"/retrain/{job['id']}"
    status, refused, headers = server.call("POST", "/retrain")
    assert (status, refused["job"]["id"]) == (409, job["id"])
    assert headers["Location"] == f"/retrain/{job['id']}"
    assert job["id"] in refused["message"]
    assert server.call("GET", "/health")[1]["job"] == job["id"]
    wait_for(lambda: server.call("GET", f"/retrain/{job['id']}")[1]["progress"])
    server.go()
    wait_for(lambda: server.state(job["id"]) == "succeeded")
    ended = server.call("GET", headers["Location"])[1]
    assert ended["progress"] == {"epoch": 4, "epochs": 4}
    assert ended["result"] == {"registry": "Testing_Reg", "version": 2, "acc": 0.55}
    assert ended["run_id"] == "run-1"
    assert server.call("GET", ended["log"])[1] == "started with --epochs=4\n"
    assert [one["id"] for one in server.call("GET", "/retrain")[1]] == [job["id"]]
    wait_for(lambda: server.call("GET", "/health")[1]["job"] is None)


def test_waiting_call_answers_when_the_job_has_ended(server):
    server.go()
    status, job, _ = server.call("POST", "/retrain?wait=true")
    assert (status, job["state"]) == (200, "succeeded")
    server.go("fail")
    status, job, _ = server.call("POST", "/retrain?wait=true")
    assert (status, job["state"]) == (500, "failed")
    assert job["message"].endswith("error: it went wrong")


def test_of_twenty_simultaneous_posts_exactly_one_starts_a_job(server):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: server.call("POST", "/retrain"), range(20)))
    assert sorted(status for status, _, _ in answers) == [202] + [409] * 19
    assert len(server.call("GET", "/retrain")[1]) == 1


def test_killed_api_knows_the_running_job_after_its_restart(server):
    job = server.call("POST", "/retrain")[1]
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server.start()
    assert server.state(job["id"]) == "running"
    assert server.call("POST", "/retrain")[0] == 409
    server.go()
    wait_for(lambda: server.state(job["id"]) == "succeeded")


def test_job_that_died_while_the_api_was_away_is_failed(server):
    job = server.call("POST", "/retrain")[1]
    wait_for(lambda: "started" in server.call("GET", job["log"])[1])
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    os.kill(server.pid_of(job["id"]), signal.SIGKILL)
    server.start()
    ended = server.call("GET", f"/retrain/{job['id']}")[1]
    assert ended["state"] == "failed"
    assert ended["message"] == "started with"
    assert server.call("POST", "/retrain")[0] == 202


def test_killed_child_is_failed(server):
    job = server.call("POST", "/retrain")[1]
    os.kill(server.pid_of(job["id"]), signal.SIGKILL)
    wait_for(lambda: server.state(job["id"]) == "failed")


def test_cancelled_job_leaves_no_process(server):
    job = server.call("POST", "/retrain")[1]
    pid = server.pid_of(job["id"])
    status, cancelled, _ = server.call("DELETE", f"/retrain/{job['id']}")
    assert (status, cancelled["state"]) == (200, "cancelled")
    wait_for(lambda: not Path(f"/proc/{pid}").exists() and _is_gone(pid))


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_post_answers_before_the_job_ends(server):
    _, job, _ = server.call("POST", "/retrain")
    for _ in range(10):
        status, answer, _ = server.call("POST", "/retrain")
        assert (status, answer["job"]["id"]) == (409, job["id"])
    assert server.state(job["id"]) == "running"


def test_port_that_is_taken_is_one_line(server):
    done = server.project.run("api.py", "--port", server.port, "--host", "127.0.0.1")
    assert done.returncode == 1
    assert f"error: 127.0.0.1:{server.port} cannot be served" in done.stderr
    assert "Traceback" not in done.stderr
