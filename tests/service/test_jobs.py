"""Jobs: real child processes, real locks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT, wait_for
from defect_detection.service.jobs import Busy, Job, Jobs
from defect_detection.settings import RetrainOverrides

CHILD = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT / "src")!r})
from pathlib import Path
from defect_detection.service.jobs import Reporter
reporter = Reporter(dict(os.environ))
print("options", *sys.argv[1:])
print("token", os.environ.get("API_TOKEN"), "nice", os.nice(0))
reporter.progress(1, 2, "run-1")
if Path("with-child").exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path("grandchild").write_text(str(child.pid))
Path("pid").write_text(str(os.getpid()))
while not Path("go").exists():
    time.sleep(0.01)
if Path("go").read_text() == "fail":
    sys.exit("error: it went wrong")
reporter.result("Production_Reg", 3, 0.9)
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
        wait_for(lambda: (self.root / "pid").exists() and (self.root / "pid").read_text())
        return int((self.root / "pid").read_text())


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    for job in made.jobs().all():
        made.jobs().cancel(job.id)


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
        for _ in range(6)
    ]
    answers = sorted(process.communicate()[0].split() for process in processes)
    assert [answer[0] for answer in answers] == ["busy"] * 5 + ["started"]
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
    child = bench.child()
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
