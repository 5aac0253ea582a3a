"""Training and judging on a Ray cluster of two machines: what one machine gives."""

import contextlib
import json
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pyarrow
import pytest
from mlflow.entities import Run
from pyarrow import parquet

from conftest import (
    SETS,
    Project,
    draw_folders,
    files_of,
    free_port,
    log_model,
    small_cnn,
    wait_for,
    within,
)
from defect_detection import PipelineError, cluster, locks
from defect_detection.registry import store
from plant import FAULTS, figures

KILLS = max(2, FAULTS)  # of workers that judge
ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")

# Of Ray's own processes and sockets.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def addresses():
    """The addresses of a cluster of two nodes, of one core each, for them and for others."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    port = free_port()
    head = {"num_cpus": 1, "ray_client_server_port": port}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1)
    yield made.address, f"ray://127.0.0.1:{port}"
    made.shutdown()


@pytest.fixture
def address(addresses: tuple[str, str]) -> str:
    return addresses[0]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, _trained: Project) -> Project:
    """A project that has fitted its set without a cluster."""
    made = Project(tmp_path_factory.mktemp("training") / "project")
    made.become(_trained)
    return made


@pytest.fixture(scope="module")
def training_two(tmp_path_factory: pytest.TempPathFactory, _trained: Project) -> Project:
    """A project that has fitted two sets without a cluster."""
    made = Project(tmp_path_factory.mktemp("training") / "project")
    made.become(_trained)
    made.configure_sets(*SETS[:2])
    made.succeed("src/train.py")
    return made


@contextlib.contextmanager
def same_figures(training: Project, sets: int) -> Iterator[None]:
    """See that the sets that the block fits have the figures of those fitted before."""
    before = fitted(training)
    yield
    after = fitted(training)
    assert len(before) == len(after) == sets
    for name, run in after.items():
        assert run.info.run_id != before[name].info.run_id
        assert len(figures(run)) > 10
        # The last digit depends on how many threads add numbers up.
        assert figures(run) == pytest.approx(figures(before[name]), rel=1e-9)


def fitted(training: Project) -> dict[str, Run]:
    """Return the newest run of each set."""
    with store.connected(f"sqlite:///{training.root}/mlflow.db"):
        found = mlflow.search_runs(experiment_names=["train/casting"], output_format="list")
    of_sets = [run for run in found if "best_val_accuracy" in run.data.metrics]  # and not of folds
    return {run.info.run_name: run for run in reversed(of_sets)}


def test_a_set_gives_the_same_figures_on_a_cluster(training: Project, address: str):
    with same_figures(training, sets=1):
        training.succeed("src/train.py", "--ray", address)


@pytest.mark.long
def test_sets_give_the_same_figures_on_a_cluster(training_two: Project, addresses: tuple[str, str]):
    for address in addresses:
        with same_figures(training_two, sets=2):
            training_two.succeed("src/train.py", "--ray", address)


def rows_of(folder: Path) -> dict[str, dict]:
    files = list(map(str, folder.glob("verdicts-*.parquet")))
    found = pyarrow.concat_tables(map(parquet.read_table, files)).to_pylist()
    assert len({row["path"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def test_verdicts_are_those_of_one_machine_and_a_run_is_resumed(
    project: Project, addresses: tuple[str, str], model_folder: Path, tmp_path: Path
):
    address, from_elsewhere = addresses
    images = draw_folders(tmp_path / "images", train=30, test=3)
    (images / "broken.jpeg").write_bytes(b"no image")
    (images / "notes.txt").write_text("no image either")
    os.mkfifo(images / "pipe.jpeg")
    (images / "lost.jpeg").symlink_to(images / "nowhere.jpeg")
    some = next(images.rglob("part_000.jpeg"))
    latin = images / os.fsdecode(b"pi\xe8ce.jpeg")
    shutil.copy(some, latin)
    call = ["src/inference.py", images, images / "train", "--model", model_folder]
    project.fail(
        "src/inference.py", images, "--model", model_folder, "--jsonl", tmp_path / "rows.jsonl"
    )
    here = {row["path"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
    named = str(images / r"pi\xe8ce.jpeg")  # Parquet has UTF-8 only
    here[named] = here.pop(str(latin)) | {"path": named}
    out = tmp_path / "rows"
    out.mkdir()
    foreign = out / "foreign.parquet"
    parquet.write_table(pyarrow.table({"casting": [1]}), foreign)
    (out / "torn.parquet").write_bytes(foreign.read_bytes()[:-9])
    of_others = out / "line 1" / "verdicts-torn.parquet"  # which another call may write just now
    of_others.parent.mkdir()
    of_others.write_bytes(foreign.read_bytes()[:-9])
    left = [foreign, out / "torn.parquet", of_others]
    before = [file.read_bytes() for file in left]
    said = project.fail(*call, "--ray", address, "--parquet", out)
    assert "3 of 70 images cannot be read" in said
    assert rows_of(out) == here

    for name in ("broken.jpeg", "pipe.jpeg", "lost.jpeg"):
        (images / name).unlink()
    torn = out / "verdicts-torn.parquet"
    torn.write_bytes(next(out.glob("verdicts-*.parquet")).read_bytes()[:-9])
    new = Path(shutil.copy(some, images / "new.jpeg"))
    done = project.run(*call, "--ray", from_elsewhere, "--parquet", out)
    assert done.returncode == 0, done.stderr
    assert "verdicts-torn.parquet was not written completely" in done.stderr
    assert "67 of 68 images have a row" in done.stderr
    after = rows_of(out)
    assert after.pop(str(new))["verdict"] == here[str(some)]["verdict"]
    assert after == here  # what is in no folder of this call keeps its row
    assert not torn.exists()
    assert [file.read_bytes() for file in left] == before

    # A row with an error is replaced by the row of a later call, and only then.
    shutil.copy(some, images / "broken.jpeg")
    with locks.held(out / ".lock", make=True):
        said = project.fail(*call, "--ray", address, "--parquet", out)
        assert "Another call writes into" in said
        assert rows_of(out)[str(images / "broken.jpeg")]["verdict"] == "error"
    project.succeed(*call, "--ray", address, "--parquet", out)
    assert rows_of(out)[str(images / "broken.jpeg")]["verdict"] == here[str(some)]["verdict"]


def test_valid_row_is_the_same_for_all_calls_however_often_files_are_rewritten(tmp_path: Path):
    """Calls into one bucket rewrite files at the same time; none may leave what another deletes."""
    from defect_detection.inference import on_ray
    from defect_detection.inference.judge import NamedModel

    images = draw_folders(tmp_path / "images", train=1, test=0)
    paths = sorted(map(str, images.rglob("*.jpeg")))
    out = tmp_path / "rows"
    out.mkdir()
    names = ("verdicts-1.parquet", "verdicts-2.parquet")
    for name, verdict in zip(names, ("ok", "defect"), strict=True):
        rows = [(path, verdict, 0.5, False, "", name) for path in paths]
        columns = dict(zip(on_ray.SCHEMA.names, zip(*rows, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns, on_ray.SCHEMA), out / name)
    os.utime(out / names[1], (1, 1))  # the other one was rewritten since
    model = NamedModel("judges nothing", None)
    counts = on_ray.judge_all([str(images)], model, tmp_path, str(out), {})
    assert counts == {"defect": len(paths)}
    assert {row["model"] for row in rows_of(out).values()} == {names[1]}


def test_rows_are_seen_when_all_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from defect_detection.inference import on_ray

    place = on_ray.Place(str(tmp_path), {})
    rows = pyarrow.table({"path": ["one.jpeg"]})

    def full(table, file, **_):
        Path(file).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    with place.held("20261127"):
        (tmp_path / ".verdicts-20261127-1.parquet.of-a-killed-worker").touch()
        place.write("verdicts-1.parquet", rows)
        before = (tmp_path / "verdicts-1.parquet").read_bytes()
        monkeypatch.setattr(parquet, "write_table", full)
        for name in ("verdicts-1.parquet", "verdicts-2.parquet"):
            with pytest.raises(PipelineError, match=f"{name}.* cannot be written .No space left"):
                place.write(name, rows)
    assert sorted(os.listdir(tmp_path)) == [".lock", "verdicts-1.parquet"]
    assert (tmp_path / "verdicts-1.parquet").read_bytes() == before


def test_images_that_are_judged_again_replace_their_rows(model_folder: Path, tmp_path: Path):
    """As after a worker died that had written them."""
    from defect_detection.inference import on_ray

    images, target = on_ray.Place(str(tmp_path), {}), on_ray.Place(str(tmp_path / "rows"), {})
    files = sorted(map(str, draw_folders(tmp_path / "images", train=1, test=0).rglob("*.jpeg")))
    rows = [{"folder": images.uri, "file": os.fsencode(file), "path": file} for file in files]
    contents = on_ray.contents(model_folder)
    with target.held("1"):
        for worker in range(2):
            judging = on_ray.Judging(f"model {worker}", contents, [images], target, "1")
            assert len(judging(pyarrow.Table.from_pylist(rows))) == 0
    found = rows_of(tmp_path / "rows")
    assert sorted(found) == files
    assert {row["model"] for row in found.values()} == {"model 1"}


def test_share_without_locks_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    from defect_detection.inference import on_ray

    def no_locks(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with on_ray.Place(str(tmp_path / "rows"), {}).held("20261127"):
        assert "there are no locks here (No locks available)" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray uses its own old options
def test_rows_that_a_worker_cannot_write(
    addresses: tuple[str, str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from defect_detection.inference import on_ray
    from defect_detection.inference.judge import NamedModel

    images = draw_folders(tmp_path / "images", train=1, test=0)
    out = tmp_path / "rows"  # is on this machine only
    monkeypatch.setattr(on_ray.Place, "held", lambda place, call: contextlib.nullcontext())
    with pytest.raises(PipelineError) as raised, cluster.connected(addresses[1]):
        on_ray.judge_all([str(images)], NamedModel("a model", None), model_folder, str(out), {})
    assert f"{platform.node()}: {out} is another folder there than on" in str(raised.value)
    assert not out.exists()


@contextlib.contextmanager
def workers_killed(named: str, times: int, gap: float) -> Iterator[list[int]]:
    """Kill processes of the cluster that do something, one after another; yield those killed."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while len(killed) < times and not over.wait(gap):
            found = subprocess.run(["pgrep", "-f", f"ray::.*{named}"], capture_output=True)
            for pid in map(int, found.stdout.split()[:1]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


@pytest.mark.long
def test_workers_that_die_lose_no_verdict(
    project: Project, address: str, _store: str, tmp_path: Path
):
    images = draw_folders(tmp_path / "images", train=40, test=1)
    for number in range(max(5, min(25, FAULTS))):  # again and again, so that there is time to kill
        shutil.copytree(images / "train", images / "more" / str(number))
    model = files_of(_store, log_model(_store, small_cnn)[1], tmp_path)
    call = ["src/inference.py", images, "--model", model]
    project.succeed(*call, "--jsonl", tmp_path / "rows.jsonl")
    here = {row["path"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
    times, calls = 0, 0
    while times < KILLS:
        calls += 1
        out = tmp_path / f"rows {calls}"
        with workers_killed("Judging", KILLS - times, 1.5) as killed:
            project.succeed(*call, "--ray", address, "--parquet", out)
        assert rows_of(out) == here
        assert killed
        times += len(killed)
    print(f"\n{times} workers killed in {calls} calls of {len(here)} images, no verdict lost")


@pytest.mark.long
def test_worker_that_dies_in_a_fit_is_replaced(training: Project, address: str):
    folds = ("--folds", "2", "--set", "one")
    with workers_killed("_task", 1, 4) as killed:
        said = training.succeed("src/train.py", "--ray", address, *folds)
    assert len(killed) == 1
    here = training.succeed("src/train.py", *folds)
    assert table(said) == table(here)


def table(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("  one", "  two", "  fold"))]


@pytest.mark.long
def test_images_and_rows_in_a_bucket(
    project: Project, address: str, model_folder: Path, tmp_path: Path, bucket, monkeypatch
):
    from moto.moto_server import werkzeug_app

    keys, s3 = bucket
    images = draw_folders(tmp_path / "images", train=4, test=1)
    for file in images.rglob("*.jpeg"):
        s3.upload_file(str(file), "castings", f"line 3/{file.relative_to(images)}")
    call = ["src/inference.py", "--model", model_folder, "--ray", address]
    where = ["s3://castings/line 3", "--parquet", "s3://castings/rows"]
    busy = iter(range(4))

    def answer(app, environ, start_response):
        if "verdicts-" in environ["PATH_INFO"] and next(busy, None) is not None:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>"]
        return whole(app, environ, start_response)

    whole = werkzeug_app.DomainDispatcherApplication.__call__
    monkeypatch.setattr(werkzeug_app.DomainDispatcherApplication, "__call__", answer)
    said = project.succeed(*call, *where, **keys)
    assert next(busy, None) is None
    assert "10 images have a row" in said
    assert "10 of 10 images have a row" in project.run(*call, *where, **keys).stderr
    # Ray writes the environment of its workers into logs that all users of a machine can read.
    logs = [one for one in Path("/tmp/ray/session_latest/logs").rglob("*") if one.is_file()]
    assert any("runtime_env" in one.read_text(errors="replace") for one in logs)
    secret = keys["AWS_SECRET_ACCESS_KEY"]
    assert not [one for one in logs if secret in one.read_text(errors="replace")]
    done = s3.list_objects(Bucket="castings", Prefix="rows/")["Contents"]
    assert {one["Key"].rpartition(".")[2] for one in done} <= {"rows/", "parquet"}
    refused = project.fail(*call, "s3://castings/nothing", *where[1:], **keys)
    assert "s3://castings/nothing" in refused
    refused = project.fail(*call, *where[:2], "s3://casting/rows", **keys)
    assert "s3://casting/rows cannot be" in refused
    refused = project.fail(*call, *where, **keys | {"AWS_ENDPOINT_URL": "localhost:9000"})
    assert "begin it with http:// or https://" in refused
    refused = project.fail(*call, *where, **keys | {"AWS_SECRET_ACCESS_KEY": ""})
    assert "s3://castings/line 3 cannot be" in refused or "s3://castings/rows cannot be" in refused


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_cluster_that_is_not_there_is_told_at_once(address: str):
    with within(20), pytest.raises(PipelineError, match=f"no Ray cluster at {address}") as raised:
        with cluster.connected(address):
            pass
    assert "\n" not in str(raised.value)


class Hosts:
    """Two hosts with a network between them, each with a /tmp of its own and nothing else to share.

    Network namespaces of Linux, which only root can make.
    """

    NAMES, NETWORK = ("one", "two"), "10.77.0"

    def __init__(self) -> None:
        self.tag = f"dd{os.getpid() % 10000}"
        if os.geteuid() != 0 or not shutil.which("ip"):
            pytest.skip("only root can make network namespaces")
        if self._ip("netns", "add", self._host(0)).returncode:
            pytest.skip("there are no network namespaces here")
        self._ip("netns", "add", self._host(1))
        ends = [f"{self.tag}-{number}" for number in range(2)]
        self._ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, end in enumerate(ends):
            self._ip("link", "set", end, "netns", self._host(number))
            inside = ["-n", self._host(number)]
            self._ip(*inside, "addr", "add", f"{self.NETWORK}.{number + 1}/24", "dev", end)
            self._ip(*inside, "link", "set", end, "up")
            self._ip(*inside, "link", "set", "lo", "up")
        self.address = f"{self.NETWORK}.1:6379"
        self.token = {"RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_AUTH_MODE": "token"}
        self.nodes: list[subprocess.Popen] = []

    def start(self) -> None:
        self._start(0, "--head", "--port=6379", "--include-dashboard=false")
        self._start(1)

    def _start(self, number: int, *options: str) -> None:
        """Start Ray on a host; the second one sees no file in /tmp that the first one has."""
        where = () if options else (f"--address={self.address}",)
        ray_start = [
            *(os.path.join(sys.exec_prefix, "bin", "ray"), "start", "--block", "--num-cpus=1"),
            *(f"--node-ip-address={self.NETWORK}.{number + 1}", "--disable-usage-stats"),
            *options,
            *where,
        ]
        alone = shlex.join(ray_start)
        if number:
            alone = f"mount -t tmpfs tmpfs /tmp && exec {alone}"
        started = subprocess.Popen(
            ["ip", "netns", "exec", self._host(number), "unshare", "-m", "sh", "-c", alone],
            stdout=subprocess.DEVNULL,
            env=os.environ | self.token,
            start_new_session=True,
        )
        self.nodes.append(started)
        wait_for(lambda: self.cores() == number + 1, 90)

    def cores(self) -> int:
        """How many cores the cluster has."""
        code = (
            f"import ray; ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR');"
            f"print(int(ray.cluster_resources().get('CPU', 0)))"
        )
        done = self.run([sys.executable, "-c", code], os.environ | self.token)
        return int(done.stdout.split()[-1]) if done.returncode == 0 else 0

    def run(self, command: list[object], env: dict[str, str]) -> subprocess.CompletedProcess:
        """Run something on the first host."""
        inside = ["ip", "netns", "exec", self._host(0), *map(str, command)]
        return subprocess.run(inside, capture_output=True, text=True, env=env, timeout=240)

    def _host(self, number: int) -> str:
        return f"{self.tag}-{self.NAMES[number]}"

    @staticmethod
    def _ip(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    def end(self) -> None:
        for node in self.nodes:
            os.killpg(node.pid, signal.SIGKILL)  # SIGTERM drains for half a minute
            node.wait()
        for number in range(2):
            for pid in self._ip("netns", "pids", self._host(number)).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self._ip("netns", "delete", self._host(number))


@pytest.fixture
def hosts():
    made = Hosts()
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.mark.long
def test_two_hosts_give_the_same_figures(training_two: Project, hosts: Hosts):
    script = training_two.root / "src" / "train.py"
    command, env = [sys.executable, script, "--ray", hosts.address], training_two.environment()
    with same_figures(training_two, sets=2):
        done = hosts.run(command, env | hosts.token)
        assert done.returncode == 0, done.stderr
    done = hosts.run(command, env | {"RAY_AUTH_MODE": "disabled"})
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last.startswith("error: There is no Ray cluster") and "RAY_AUTH_MODE=token" in last
