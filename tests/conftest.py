"""What several tests need: drawn images, a tracking store, a copy of the project to run."""

import compileall
import fcntl
import io
import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each of the workers, and for what they start
    for library in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(library, "1")

import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import hypothesis
import mlflow
import numpy as np
import pytest
import scipy.special
import yaml
from PIL import Image, ImageDraw

import preloaded
from defect_detection import settings
from defect_detection.dataset import split as dataset
from defect_detection.dataset.folder import DataFolder
from defect_detection.dataset.split import Dataset
from defect_detection.operations import stores as stored
from defect_detection.registry import saved_model
from defect_detection.registry import store as stores
from defect_detection.runtime.preprocessing import ImageFormat

ROOT = settings.ROOT
# Models of tests enlarge an image to this shorter side only, and take half the time.
SIDE, NETWORK = 96, Path("defect_detection", "training", "network.py")

# A shell starts background jobs with SIGINT ignored, and the scripts of the tests would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def draw_part(rng: np.random.Generator, defect: bool, side: int = 96) -> Image.Image:
    """Draw a bright disc; a defect is a black spot on it, easy enough to learn in seconds."""
    image = Image.new("L", (side, side), 200)
    pen = ImageDraw.Draw(image)
    radius, centre = side * rng.uniform(0.36, 0.44), side / 2 + rng.uniform(-3, 3)
    box = (centre - radius, centre - radius, centre + radius, centre + radius)
    pen.ellipse(box, fill=int(rng.uniform(120, 150)), outline=60, width=3)
    if defect:
        x, y = centre + rng.uniform(-0.5, 0.5, 2) * radius
        r = side * rng.uniform(0.07, 0.11)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=10)
    noise = rng.normal(0, 3, (side, side))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    """Return an image as the bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def draw_folders(data: Path, train: int, test: int, seed: int = 0) -> Path:
    """Draw `train` and `test` images of each class below `data`; return `data`.

    The first images are the same for any number, so that what is known of them is found once.
    """
    for side, (split, count) in enumerate((("train", train), ("test", test))):
        for label, name in enumerate(("ok_front", "def_front")):
            folder = data / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([seed, side, label, number])
                image = draw_part(rng, defect=label == 1)
                image.save(folder / f"part_{number:03}.jpeg", quality=92)
    return data


def drawn_dataset(images: np.ndarray, labels: np.ndarray, photographs: np.ndarray) -> Dataset:
    """Return a data set of uint8 images (n, height, width) that lie nowhere."""
    names = tuple(str(number) for number in range(len(images)))
    nowhere = DataFolder(Path("/nowhere"), Path("/nowhere"))
    return Dataset(
        folder=nowhere,
        side="train",
        images=images[..., np.newaxis],
        format=ImageFormat(*images.shape[1:]),
        labels=labels,
        paths=names,
        contents=names,
        digest=f"{len(images)} drawn",
        skipped=(),
        photographs=photographs,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small data folder of the test's own, to break as it likes."""
    return draw_folders(tmp_path / "pictures", train=10, test=4)


@pytest.fixture(scope="session")
def _known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the photographs of `data` are known: finding them takes two seconds."""
    drawn = DataFolder(
        draw_folders(tmp_path_factory.mktemp("drawn"), train=10, test=4),
        tmp_path_factory.mktemp("known"),
    )
    dataset.load(drawn, ImageFormat(64, 64))
    for file in drawn.cache.glob("*"):
        if not file.name.startswith("photographs"):
            file.unlink()
    return drawn.cache


@pytest.fixture
def folder(data: Path, tmp_path: Path, _known: Path) -> DataFolder:
    """`data` with a cache of the test's own."""
    return DataFolder(data, shutil.copytree(_known, tmp_path / "cache"))


@pytest.fixture(scope="session")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with enough images to learn from; not to be changed."""
    return draw_folders(tmp_path_factory.mktemp("learnable"), train=60, test=10)


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    with stores.connected(uri, create=True):
        stores.open_experiment("first")  # the migrations of a new store take seconds
    return uri


@pytest.fixture
def store(_store: str):
    """The URI of a connected tracking store, which the tests of a session share."""
    with stores.connected(_store):
        yield _store


def small_cnn(shape: tuple[int, int, int]):
    """Build a small model that judges by chance."""
    from defect_detection.settings import HyperParameters
    from defect_detection.training import network

    cnn = network.build(shape, HyperParameters("small", 8, 1, "map", 0.01, 0.01, 8, 1))
    head = cnn.get_layer(network.MAP)
    kernel, bias = head.get_weights()
    head.set_weights([np.random.default_rng(0).normal(0, 0.02, kernel.shape), bias])
    return cnn


def former_cnn(shape: tuple[int, int, int]):
    """Build a model like those before pretrained layers: nothing of it is frozen."""
    from defect_detection.runtime.classifier import MAP, PROBABILITY
    from defect_detection.training.network import keras, layers, ops

    inputs = keras.Input(shape, name="images")
    x = layers.Conv2D(8, 5, 2, padding="same", activation="relu")(layers.Rescaling(1 / 255)(inputs))
    x = layers.Conv2D(12, 3, 2, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Conv2D(1, 1, activation="softplus", name=MAP)(layers.SpatialDropout2D(0.1)(x))
    powers = layers.GlobalAveragePooling2D()(ops.power(x + 1e-3, 4))
    last = layers.Dense(1, activation="sigmoid", name=PROBABILITY)
    return keras.Model(inputs, last(ops.power(powers, 0.25)))


def log_model(uri: str, build: Callable) -> tuple[str, str]:
    """Log a model for parts as `draw_part` draws them, which calls half of them defects.

    Args:
        uri: of the store.
        build: such as `small_cnn`.

    Returns:
        Its run and its URI.
    """
    from defect_detection.runtime import preprocessing
    from defect_detection.runtime.model_files import ServedModel
    from defect_detection.runtime.ood import OodDetector
    from defect_detection.training import network
    from defect_detection.training.calibration import Calibration

    rng, takes = np.random.default_rng(0), preprocessing.ImageFormat(32, 32)
    parts = [encoded(draw_part(rng, defect=number % 2 == 0)) for number in range(100)]
    network.keras.utils.set_random_seed(0)
    cnn, images = build(takes.shape), np.stack([preprocessing.decode(one, takes) for one in parts])
    log_odds = scipy.special.logit(cnn.predict_on_batch(images))
    scale = 1 / float(log_odds.std())
    network.calibrate(cnn, Calibration(scale, -scale * float(np.median(log_odds))))
    ood = OodDetector.fit(images)
    served = ServedModel(network.to_litert(cnn), takes, ood=ood)
    with stores.connected(uri):
        with mlflow.start_run(experiment_id=stores.open_experiment("train/kept")) as run:
            logged = saved_model.log(cnn, served, parts[0])
    return run.info.run_id, logged


def files_of(uri: str, model: str, folder: Path) -> Path:
    """Fetch the files of a logged model."""
    with stores.connected(uri), saved_model.fetched(model) as files:
        return Path(shutil.copytree(files, folder / "model"))


@pytest.fixture(scope="session")
def logged_model(_store: str) -> tuple[str, str]:
    """Run and URI of a logged model, which is loaded and judges in a fifth of today's time."""
    return log_model(_store, former_cnn)


@pytest.fixture(scope="session")
def model_folder(
    _store: str, logged_model: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The files of `logged_model`."""
    return files_of(_store, logged_model[1], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    Project.cache = tmp_path_factory.mktemp("cache")
    Project.source = Path(shutil.copytree(ROOT / "src", tmp_path_factory.mktemp("source") / "src"))
    network = Project.source / NETWORK
    enlarges = network.read_text().replace("\nSHORTER_SIDE = 256\n", f"\nSHORTER_SIDE = {SIDE}\n")
    assert enlarges != network.read_text()
    network.write_text(enlarges)
    compileall.compile_dir(Project.source, quiet=1)  # once, and not by each script
    Project.empty_store = tmp_path_factory.mktemp("empty") / "mlflow.db"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what MLflow does when it loads a model: its code comes first on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


class Project:
    """A copy of the project in a folder of its own, with small models that are fitted quickly.

    All copies share a cache, so that what is known of the same images is found once.
    """

    cache: Path
    source = ROOT / "src"
    empty_store: Path

    def __init__(self, root: Path):
        self.root = root
        shutil.copytree(self.source, root / "src")
        shutil.copytree(ROOT / "re_train", root / "re_train")
        for file in (".env", "api.py"):
            shutil.copy(ROOT / file, root)
        self.data = root / "data"
        self.configure(lambda config: config["model_parameters"].update(SMALL))
        self.configure(lambda config: config["paths"].update(cache=str(self.cache)))

    def become(self, other: "Project") -> None:
        """Be a copy of another project with its data, its store and its artifacts."""
        for name in ("data", "mlruns", "mlflow.db", "best_model.json"):
            source, target = other.root / name, self.root / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        places = [(other.root / "mlruns").as_uri(), (self.root / "mlruns").as_uri()]
        with stored.read(f"sqlite:///{self.root / 'mlflow.db'}") as engine:
            with engine.begin() as connection:
                stored.move(connection, [stored.Relocation(*places)])

    def make_store(self) -> None:
        """Give the project an empty store; MLflow takes seconds to make one, so one is copied."""
        if not self.empty_store.exists():
            with stores.connected(f"sqlite:///{self.empty_store}", create=True):
                mlflow.search_experiments()
        shutil.copy(self.empty_store, self.root / "mlflow.db")

    def configure(self, change: Callable[[dict], None]) -> None:
        """Change src/config.yaml."""
        self._change(self.root / "src" / "config.yaml", change)

    def configure_sets(self, *sets: dict) -> None:
        """Change the sets that are fitted."""
        self.configure(lambda config: config["model_parameters"].update(sets=list(sets)))

    def configure_retraining(self, **parameters: object) -> None:
        """Change the model parameters of re_train/re_train.yaml."""
        file = self.root / "re_train" / "re_train.yaml"
        self._change(file, lambda config: config["model_parameters"].update(parameters))

    @staticmethod
    def _change(file: Path, change: Callable[[dict], None]) -> None:
        config = yaml.safe_load(file.read_text())
        change(config)
        file.write_text(yaml.safe_dump(config))

    def run(
        self,
        script: str,
        *arguments: object,
        cwd: Path | None = None,
        within: float = 240,
        **env: str,
    ) -> subprocess.CompletedProcess:
        """Run a script as a user would; from another folder if `cwd` says so.

        Raises:
            subprocess.TimeoutExpired: it was not done within some seconds, and was killed.
        """
        call = self._call(script, *arguments, **env)
        return preloaded.run(replace(call, folder=cwd or self.root), within)

    def start(
        self, log: Path, script: str, *arguments: object
    ) -> preloaded.Started | subprocess.Popen:
        """Start a script in the project's folder; append what it writes to a file."""
        return preloaded.start(self._call(script, *arguments), log, log)

    def _call(self, script: str, *arguments: object, **env: str) -> preloaded.Call:
        command = [str(self.root / script), *map(str, arguments)]
        return preloaded.Call(command, self.root, self.environment() | env)

    @staticmethod
    def environment() -> dict[str, str]:
        """Return the environment without what MLflow leaves there in the tests' own process."""
        return {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}

    def succeed(self, script: str, *arguments: object, **options) -> str:
        """Run a script that must end well; return what it printed."""
        done = self.run(script, *arguments, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def fail(self, script: str, *arguments: object, **options) -> str:
        """Run a script that must fail; return its last line, having seen that it is no traceback.

        Warnings that name skipped images may stand before it.
        """
        done = self.run(script, *arguments, **options)
        assert done.returncode not in (0, 2), done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: "), done.stderr
        return last


def long(*values: object):
    """Mark a set of parameters that only `make test-all` tries."""
    return pytest.param(*values, marks=pytest.mark.long)


def resident() -> float:
    """Return the memory of this process for files in MB; skip the test where it is not told."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssFile:"))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail if the block waits for longer, such as for ever; nothing else may use SIGALRM."""

    def fail(*_: object) -> None:
        raise AssertionError(f"did not end within {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """`python api.py` in a copy of the project, on a free port."""

    def __init__(self, project: Project, log: Path):
        self.project = project
        self.port = free_port()
        self.log = log
        self.process = None
        self.open_path = "/retrain"  # that answers without a token

    def start(self) -> None:
        self.process = self.project.start(
            self.log, "api.py", "--port", self.port, "--host", "127.0.0.1"
        )
        wait_for(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("GET", self.open_path)[0] == 200
        except OSError:
            return False

    def call(self, method: str, path: str, body: dict | None = None) -> tuple[int, object, dict]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _parse(answer.read()), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, _parse(error.read()), dict(error.headers)

    def pid_of(self, job_id: str) -> int:
        file = self.project.root / ".jobs" / job_id / "process.json"
        return json.loads(file.read_text())["pid"]

    def state(self, job_id: str) -> str:
        return self.call("GET", f"/retrain/{job_id}")[1]["state"]


def _parse(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


class TrackingServer:
    """A tracking server on a free port of this machine, which can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # Jobs of MLflow's own are six more processes, which nothing here uses.
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self.answers, 120)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory):
    """The URI of a tracking server, which the tests of a session share."""
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    yield server.uri
    server.kill()


@pytest.fixture(scope="module")
def bucket():
    """The variables of an S3 of this machine, with a bucket."""
    moto = pytest.importorskip("moto.server", reason="needs requirements-tests.txt")
    import boto3

    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    # What other modules have put there is in this process.
    urllib.request.urlopen(f"{address}/moto-api/reset", data=b"").close()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "the-key-of-a-bucket"}
    with mock.patch.dict(os.environ, keys):
        s3 = boto3.client("s3", "us-east-1", endpoint_url=address)
        s3.create_bucket(Bucket="castings")
        yield (
            keys | {"MLFLOW_S3_ENDPOINT_URL": address, "AWS_ENDPOINT_URL": address},
            s3,
        )
    server.stop()


SETS = [
    {
        "name": name,
        "blocks": 8,
        "views": views,
        "head": head,
        "learning_rate": 0.02,
        "weight_decay": 0.01,
        "batch_size": 16,
        "epochs": 6,
    }
    for name, views, head in (("one", 1, "map"), ("two", 1, "wide"), ("three", 2, "map"))
]
SMALL = {"image_size": [64, 64], "variants": 160, "sets": SETS[:1]}


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Project:
    """A project with two versions in production, made once for all processes of a test run."""
    alone = worker_id == "master"
    folder = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    with (folder / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "trained" / "whole").exists():
            shutil.rmtree(folder / "trained", ignore_errors=True)
            made = Project(folder / "trained")
            draw_folders(made.data, train=60, test=10)
            made.make_store()
            made.succeed("src/train.py")
            made.succeed("src/evaluation.py")
            made.succeed("src/evaluation.py")
            (folder / "trained" / "whole").touch()
    known = Project.__new__(Project)
    known.root = folder / "trained"
    return known


@pytest.fixture
def trained(project: Project, _trained: Project) -> Project:
    """A project that was trained and evaluated twice; version 2 is the same model again."""
    project.become(_trained)
    return project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A copy of the project without data."""
    return Project(tmp_path / "project")


# What `make test-fast` leaves out: fits, TensorFlow, scripts, servers, browsers, races.
SLOW_FIXTURES = {"project", "trained", "tracking_server", "logged_model", "model_folder", "browsed"}
SLOW_MODULES = {
    "test_augmentation",
    "test_classifier",
    "test_devices",
    "test_documentation",
    "test_faults",
    "test_features",
    "test_fitting",
    "test_line_requirements",
    "test_parity",
    "test_pipeline",
    "test_postman",
    "test_pretrained",
    "test_promotion",
    "test_re_train",
    "test_real",
    "test_robustness",
    "test_saved_model",
    "test_setup",
    "test_start_api",
    "test_team_server",
    "test_workers",
    "test_workflow",
}


# The files that take longest, in their order: begun last, one would be waited for alone.
LONGEST = """
    test_ray test_pipeline test_browser test_team_server test_faults test_kills test_backup
    test_real test_strangers test_delivery test_fitting test_production test_promotion test_audit
    test_re_train test_workflow
    test_server test_start_api test_inference test_postman
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests; begin with the files that take longest."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if item.path.stem in SLOW_MODULES or fixtures & SLOW_FIXTURES:
            item.add_marker("slow")
