"""Jobs: real child processes, real locks."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from conftest import ROOT, wait_for
from defect_detection import PipelineError
from defect_detection.service.job_files import Job
from defect_detection.service.jobs import Busy, Jobs
from defect_detection.settings import RetrainOverrides

CHILD = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT / "src")!r})
from pathlib import Path
from defect_detection.service.reporter import Reporter
reporter = Reporter(dict(os.environ))
print("options", *sys.argv[1:])
print("token", os.environ.get("API_TOKEN"), "nice", os.nice(0))
Path("by").write_text(os.environ["RETRAIN_STARTED_BY"])
reporter.progress(1, 2, "run-1")
if Path("with-child").exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path("grandchild").write_text(str(child.pid))
Path("pid").write_text(str(os.getpid()))
while not Path("go").exists():
    if Path("report").exists():
        reporter.progress(1, 2, "run-1")
    time.sleep(0.01)
how = Path("go").read_text()
if how == "fail":
    sys.exit("error: it went wrong")
reporter.prepare("Production_Reg", 3, 0.9)
if how == "die":
    os.kill(os.getpid(), 9)
if how != "hang":
    reporter.result("Production_Reg", 3, 0.9)
if how == "fail late":
    sys.exit("error: the examples are away")
while how in ("hang", "linger"):
    time.sleep(0.01)
"""


class Bench:
    """A folder of jobs whose child waits for the file `go`."""

    def __init__(self, root: Path):
        self.root = root
        (root / "child.py").write_text(CHILD)

    def jobs(self, time_limit: float = 60) -> Jobs:
        command = [sys.executable, str(self.root / "child.py")]
        return Jobs(self.root / "jobs", command, self.root, time_limit, os.environ)

    def go(self, how: str = "succeed") -> None:
        (self.root / "go.new").write_text(how)
        (self.root / "go.new").rename(self.root / "go")

    def child(self) -> int:
        """Wait until the child of a job runs; return its process id."""
        wait_for(lambda: (self.root / "pid").exists() and (self.root / "pid").read_text())
        return int((self.root / "pid").read_text())

    def started(self, job: Job) -> int:
        """Return the process id of the child of a job, which may not run yet."""
        return json.loads((self.root / "jobs" / job.id / "process.json").read_text())["pid"]


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    for job in made.jobs().all():
        made.jobs().cancel(job.id)


@pytest.fixture
def full_disk(monkeypatch):
    """Let this process write no file of a job as long as it is set."""
    full = threading.Event()
    real = tempfile.mkstemp

    def mkstemp(*arguments, **options):
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    return full


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie whose parent is gone waits for its collector
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_job_runs_with_its_options_and_succeeds_with_its_result(bench, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "secret")
    jobs = bench.jobs()
    started = jobs.start(RetrainOverrides(epochs=2, learning_rate=0.001))
    assert started.state == "running"
    assert jobs.running().id == started.id
    bench.child()
    assert jobs.get(started.id).progress == {"epoch": 1, "epochs": 2}
    bench.go()
    ended = jobs.wait(started.id)
    assert ended.state == "succeeded"
    assert ended.result == {"registry": "Production_Reg", "version": 3, "acc": 0.9}
    assert ended.run_id == "run-1"
    assert ended.parameters == {"epochs": 2, "learning_rate": 0.001}
    assert started.created_at <= ended.ended_at
    options, details = jobs.log(started.id).splitlines()
    assert options == "options --epochs=2 --learning-rate=0.001"
    assert details == f"token None nice {os.nice(0) + 10}"
    wait_for(lambda: jobs.running() is None)


def test_child_that_fails_is_a_failed_job_with_its_last_lines(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    bench.go("fail")
    ended = jobs.wait(job.id)
    assert ended.state == "failed"
    assert ended.message.endswith("error: it went wrong")
    assert ended.ended_at


def test_killed_child_is_a_failed_job_and_the_next_can_start(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    os.kill(bench.child(), signal.SIGKILL)
    assert jobs.wait(job.id).state == "failed"
    (bench.root / "pid").unlink()
    second = jobs.start(RetrainOverrides())
    bench.go()
    assert jobs.wait(second.id).state == "succeeded"
    assert [one.id for one in jobs.all()] == [second.id, job.id]
    assert jobs.get(job.id).state == "failed"


def test_second_start_is_refused_and_names_the_running_job(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    with pytest.raises(Busy) as refused:
        jobs.start(RetrainOverrides())
    assert refused.value.job.id == job.id
    with pytest.raises(Busy):
        bench.jobs().start(RetrainOverrides())  # as another process sees the folder
    assert len(jobs.all()) == 1


def test_of_twenty_simultaneous_starts_exactly_one_succeeds(bench):
    jobs, outcomes = bench.jobs(), []

    def start() -> None:
        try:
            outcomes.append(jobs.start(RetrainOverrides()))
        except Busy as busy:
            outcomes.append(busy.job.id)

    threads = [threading.Thread(target=start) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (job,) = [outcome for outcome in outcomes if isinstance(outcome, Job)]
    assert [outcome for outcome in outcomes if outcome != job] == [job.id] * 19
    assert len(jobs.all()) == 1


def test_of_simultaneous_processes_exactly_one_starts_a_job(bench):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "import os\n"
        "from pathlib import Path\n"
        "from defect_detection.service.jobs import Busy, Jobs\n"
        "from defect_detection.settings import RetrainOverrides\n"
        f"root = Path({str(bench.root)!r})\n"
        "command = [sys.executable, str(root / 'child.py')]\n"
        "jobs = Jobs(root / 'jobs', command, root, 60, os.environ)\n"
        "try: print('started', jobs.start(RetrainOverrides()).id)\n"
        "except Busy as busy: print('busy', busy.job.id)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = sorted(process.communicate()[0].split() for process in processes)
    assert [answer[0] for answer in answers] == ["busy"] * 3 + ["started"]
    assert len({answer[1] for answer in answers}) == 1
    # Those that started and refused are gone; the job lives and is known.
    assert bench.jobs().running().id == answers[0][1]
    bench.child()
    bench.go()
    assert bench.jobs().wait(answers[0][1]).state == "succeeded"


def test_cancel_ends_the_child_and_its_children(bench):
    (bench.root / "with-child").touch()
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    child = bench.child()
    grandchild = int((bench.root / "grandchild").read_text())
    cancelled = jobs.cancel(job.id)
    assert cancelled.state == "cancelled"
    assert cancelled.message == "Cancelled on request"
    wait_for(lambda: not alive(child) and not alive(grandchild))
    assert jobs.running() is None
    assert jobs.cancel(job.id) == cancelled


def test_cancelling_a_job_that_has_succeeded_changes_nothing(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    bench.go()
    ended = jobs.wait(job.id)
    assert jobs.cancel(job.id) == ended


def test_job_is_ended_at_its_time_limit(bench):
    jobs = bench.jobs(time_limit=1)
    job = jobs.start(RetrainOverrides())
    child = bench.started(job)
    ended = jobs.wait(job.id)
    assert (ended.state, ended.message) == ("failed", "Ended after the limit of 1 s")
    wait_for(lambda: not alive(child))


def test_time_limit_holds_for_a_job_of_a_process_that_is_gone(bench):
    first = bench.jobs(time_limit=3600)
    job = first.start(RetrainOverrides())
    bench.child()
    adopted = bench.jobs(time_limit=0.5)
    assert adopted.wait(job.id).state == "failed"


def test_unknown_and_malicious_ids_are_refused(bench):
    jobs = bench.jobs()
    for job_id in ("none", "..", ".", "../jobs", "a/b", ""):
        with pytest.raises(KeyError):
            jobs.get(job_id)


def test_state_is_never_half_written(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    for file in (bench.root / "jobs" / job.id).glob("*.json"):
        json.loads(file.read_text())
    bench.go()
    seen = set()
    deadline = time.monotonic() + 30
    while "succeeded" not in seen and time.monotonic() < deadline:
        seen.add(jobs.get(job.id).state)
    assert "succeeded" in seen and seen <= {"running", "succeeded"}


# What a full disk may not do.


def test_job_is_cancelled_while_the_disk_is_full_and_its_end_written_down_later(
    bench, full_disk, monkeypatch
):
    monkeypatch.setattr("defect_detection.service.jobs.GRACE_SECONDS", 2)
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    child = bench.child()
    full_disk.set()
    assert jobs.cancel(job.id).state == "cancelled"
    wait_for(lambda: not alive(child))
    assert not (bench.root / "jobs" / job.id / "ended.json").exists()
    full_disk.clear()
    wait_for((bench.root / "jobs" / job.id / "ended.json").exists)
    assert bench.jobs().get(job.id) == jobs.get(job.id)


def test_time_limit_holds_while_the_disk_is_full(bench, full_disk):
    jobs = bench.jobs(time_limit=3)
    job = jobs.start(RetrainOverrides())
    full_disk.set()
    child = bench.started(job)
    wait_for(lambda: not alive(child))
    assert jobs.get(job.id).message == "Ended after the limit of 3 s"


@pytest.mark.parametrize("written", [0, 1])
def test_job_whose_files_cannot_be_written_is_not_started(bench, monkeypatch, written):
    real, calls = tempfile.mkstemp, []

    def mkstemp(*arguments, **options):
        calls.append(arguments)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    jobs = bench.jobs()
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "mkstemp", mkstemp)
        with pytest.raises(PipelineError, match="No space left"):
            jobs.start(RetrainOverrides())
    assert jobs.all() == []
    assert [file.name for file in (bench.root / "jobs").iterdir()] == ["lock"]
    assert jobs.start(RetrainOverrides()).state == "running"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_on_a_disk_that_is_really_full_a_job_is_cancelled_and_one_that_goes_on_succeeds(bench):
    (bench.root / "jobs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", bench.root / "jobs"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    filling = bench.root / "jobs" / "filling"
    try:
        (bench.root / "report").touch()
        jobs = bench.jobs()
        for how in ("cancel", "succeed"):
            job = jobs.start(RetrainOverrides())
            child = bench.child()
            with pytest.raises(OSError, match="No space left"):
                filling.write_bytes(b"0" * 1_000_000)
            if how == "cancel":
                assert jobs.cancel(job.id).state == "cancelled"
            else:
                filling.unlink()
                bench.go()
                assert jobs.wait(job.id).state == "succeeded"
            assert not alive(child)
            filling.unlink(missing_ok=True)
            (bench.root / "pid").unlink()
    finally:
        subprocess.run(["umount", "-l", bench.root / "jobs"], check=True)


# What the end of a job tells.


def test_result_counts_also_if_something_fails_after_it_and_that_is_said(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    bench.go("fail late")
    ended = jobs.wait(job.id)
    assert (ended.state, ended.message) == ("succeeded", "error: the examples are away")
    assert ended.result["version"] == 3


def test_result_counts_also_if_the_job_is_cancelled_after_it(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    bench.child()
    bench.go("linger")
    wait_for(lambda: jobs.get(job.id).result)
    assert jobs.get(job.id).state == "running"
    cancelled = jobs.cancel(job.id)
    assert cancelled.state == "succeeded"
    assert cancelled.result == {"registry": "Production_Reg", "version": 3, "acc": 0.9}
    assert cancelled.message.startswith("Cancelled on request, but too late")


@pytest.mark.parametrize(("how", "state"), [("die", "failed"), ("hang", "cancelled")])
def test_end_between_registration_and_result_says_what_was_registered(bench, how, state):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    bench.child()
    bench.go(how)
    wait_for((bench.root / "jobs" / job.id / "result.next").exists)
    if how == "hang":
        jobs.cancel(job.id)
    ended = jobs.wait(job.id)
    assert (ended.state, ended.result) == (state, {})
    assert "It had registered Production_Reg version 3" in ended.message
    assert "'python src/promote.py --list' shows whether prod moved" in ended.message


# What changes of the clock may not do.


def test_clock_that_is_set_forward_ends_no_job(bench, monkeypatch):
    jobs = bench.jobs(time_limit=3600)
    job = jobs.start(RetrainOverrides())
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 7200)
    time.sleep(0.6)  # three looks at the limit
    assert jobs.get(job.id).state == "running"


@pytest.mark.parametrize(("hours", "limit", "state"), [(-2, 3600, "running"), (2, 0.5, "failed")])
def test_clock_that_was_set_since_the_start_moves_no_limit_after_a_restart(
    bench, monkeypatch, hours, limit, state
):
    monkeypatch.setattr("defect_detection.service.jobs.POLL_SECONDS", 3600)  # of the first one
    first = bench.jobs(time_limit=3600)
    job = first.start(RetrainOverrides())
    bench.child()
    time.sleep(0.6)
    file = bench.root / "jobs" / job.id / "job.json"
    created = json.loads(file.read_text())
    moved = datetime.fromisoformat(created["created_at"]) + timedelta(hours=hours)
    file.write_text(json.dumps(created | {"created_at": moved.isoformat()}))
    monkeypatch.setattr("defect_detection.service.jobs.POLL_SECONDS", 0.2)
    adopted = bench.jobs(time_limit=limit)
    if state == "failed":
        assert adopted.wait(job.id).message == "Ended after the limit of 0.5 s"
    else:
        time.sleep(0.6)
        assert adopted.get(job.id).state == "running"


# Files that go away under a running job.


def delete(folder: Path) -> None:
    """Delete a folder at once, whatever is written into it meanwhile."""
    shutil.rmtree(folder.rename(folder.parent.parent / "deleted"))


@pytest.mark.parametrize("lost", ["lock", "log", "job.json", "process.json", "folder", "all"])
def test_running_job_stays_known_when_its_files_are_deleted(bench, lost):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides(epochs=2))
    child = bench.child()
    folder = bench.root / "jobs"
    if lost in ("folder", "all"):
        delete(folder if lost == "all" else folder / job.id)
    else:
        (folder / lost if lost == "lock" else folder / job.id / lost).unlink()
    assert [one.id for one in jobs.all()] == [job.id]
    assert jobs.running().id == job.id
    with pytest.raises(Busy) as refused:
        jobs.start(RetrainOverrides())
    assert refused.value.job.id == job.id
    wait_for(lambda: jobs.get(job.id).parameters == {"epochs": 2})
    wait_for((folder / job.id / "process.json").exists)
    assert jobs.get(job.id).created_at == job.created_at
    assert jobs.cancel(job.id).state == "cancelled"
    assert not alive(child)


@pytest.mark.parametrize("lost", ["lock", "log", "all"])
def test_job_whose_files_were_deleted_is_known_after_a_restart(bench, lost):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    bench.child()
    folder = bench.root / "jobs"
    if lost == "all":
        delete(folder)
        (bench.root / "report").touch()  # the child reports its progress, and finds no log
        wait_for((folder / job.id / "log").exists)
        wait_for((folder / job.id / "process.json").exists)
    else:
        (folder / lost if lost == "lock" else folder / job.id / lost).unlink()
    again = bench.jobs()
    assert again.running().id == job.id
    with pytest.raises(Busy):
        again.start(RetrainOverrides())
    bench.go()
    assert again.wait(job.id).state == "succeeded"


def test_damaged_process_file_of_a_running_job_is_mended_and_the_job_ends(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    child = bench.child()
    file = bench.root / "jobs" / job.id / "process.json"
    for content in ("null", '{"pid": 0}', '{"pid": 1}', "{"):
        file.write_text(content)
        wait_for(lambda: file.read_text().startswith(f'{{"pid": {child}'))
    file.write_text('{"pid": 0}')
    assert jobs.cancel(job.id).state == "cancelled"
    assert not alive(child)


# Jobs of former versions.


def test_job_of_a_former_version_is_known_ended_at_its_limit_and_keeps_others_out(bench):
    folder = bench.root / "jobs" / "20260101-000000-000000-abcd"
    folder.mkdir(parents=True)
    with (bench.root / "jobs" / "lock").open("w") as lock, (folder / "log").open("w") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(folder.name)
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            stdout=log,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    started = datetime.now(timezone.utc) - timedelta(seconds=100)
    asked = {"created_at": started.isoformat(timespec="milliseconds"), "parameters": {"epochs": 3}}
    (folder / "job.json").write_text(json.dumps(asked))
    (folder / "process.json").write_text(json.dumps({"pid": child.pid}))
    jobs = bench.jobs(time_limit=105)
    assert jobs.get(folder.name).state == "running"
    assert jobs.get(folder.name).parameters == {"epochs": 3}
    with pytest.raises(Busy):
        jobs.start(RetrainOverrides())
    assert child.wait(60) == -signal.SIGTERM
    ended = jobs.wait(folder.name)
    assert (ended.state, ended.message) == ("failed", "Ended after the limit of 105 s")
    assert jobs.start(RetrainOverrides()).state == "running"


# Which jobs are kept.


def past_jobs(folder: Path, count: int) -> list[str]:
    """Write jobs that have failed; return their ids, newest first."""
    ids = [f"20250101-000000-{number:06}-abcd" for number in range(count)]
    for job_id in ids:
        (folder / job_id).mkdir(parents=True)
        asked = {"created_at": "2025-01-01T00:00:00.000+00:00", "parameters": {}}
        (folder / job_id / "job.json").write_text(json.dumps(asked))
    return ids[::-1]


def test_start_deletes_all_but_the_newest_jobs(bench):
    ids = past_jobs(bench.root / "jobs", 210)
    (bench.root / "jobs" / f".{ids[0]}").mkdir()  # a start that was cut off
    (bench.root / "jobs" / "notes").mkdir()
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides())
    assert [one.id for one in jobs.all()] == [job.id, *ids[:200]]
    left = {file.name for file in (bench.root / "jobs").iterdir()}
    assert left == {job.id, *ids[:200], "lock", "notes"}


def test_jobs_are_listed_page_by_page(bench):
    ids = past_jobs(bench.root / "jobs", 5)
    jobs = bench.jobs()
    assert [job.id for job in jobs.all(limit=2)] == ids[:2]
    assert [job.id for job in jobs.all(limit=2, before=ids[1])] == ids[2:4]
    assert [job.id for job in jobs.all(before=ids[3])] == ids[4:]


def test_who_started_and_who_cancelled_a_job_is_kept(bench):
    jobs = bench.jobs()
    job = jobs.start(RetrainOverrides(), "10.0.0.7, by token")
    bench.child()
    jobs.cancel(job.id, "10.0.0.8, by token")
    again = bench.jobs().get(job.id)
    assert (again.started_by, again.ended_by) == ("10.0.0.7, by token", "10.0.0.8, by token")
    assert (bench.root / "by").read_text() == "10.0.0.7, by token"
