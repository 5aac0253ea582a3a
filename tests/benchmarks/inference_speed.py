"""Measure inference against TensorFlow, against decoding alone and against the bare runtime.

    python tests/benchmarks/inference_speed.py

All in one run, with the first set of src/config.yaml at its image size, on the real castings where
they are and else on as many drawn images. The weights are new ones, which take the same time.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "data", "tests")]

import numpy as np  # noqa: E402

PICTURES = 5734
MANY, FEW = 20_000, 1_000
THROUGHPUT = 4  # every fourth image, for the images a second
PRODUCTION = "models:/Production_Reg@prod"
REPEATS = 5
MEMORY = (
    "import atexit, re, resource, runpy, sys;"
    "sys.argv, script = sys.argv[1:], sys.argv[1];"
    "sys.path.insert(0, script.rpartition('/')[0]);"
    # Linux counts in ru_maxrss what the process was before it became this one.
    "status = lambda: open('/proc/self/status').read();"
    "peak = lambda: int(re.search('VmHWM:\\\\s+(\\\\d+)', status())[1]) / 1e3"
    " if sys.platform == 'linux' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6;"
    "atexit.register(lambda: print(peak(), 'tensorflow' in sys.modules, file=sys.stderr));"
    "runpy.run_path(script, run_name='__main__')"
)
WITH_KERAS = """
import os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
if sys.argv[2] == "registry":
    import mlflow
    options = {"compile": False}
    model = mlflow.tensorflow.load_model(sys.argv[1], keras_model_kwargs=options)
else:
    model = keras.models.load_model(sys.argv[1] + "/data/model.keras", compile=False)
def load(path):
    image = keras.utils.load_img(path, color_mode="grayscale", target_size=model.input_shape[1:3])
    return keras.utils.img_to_array(image)[np.newaxis]
if sys.argv[2] in ("one", "registry"):
    print(model.predict(load(sys.argv[3]), verbose=0))
elif sys.argv[2] == "loop":
    image = load(sys.argv[3])
    for _ in range(20): model.predict(image, verbose=0)
    times = []
    for _ in range(100):
        started = time.perf_counter()
        model.predict(image, verbose=0)
        times.append(time.perf_counter() - started)
    print(np.median(times))
else:
    started = time.perf_counter()
    images = keras.utils.image_dataset_from_directory(
        sys.argv[3], labels=None, color_mode="grayscale", shuffle=False,
        image_size=model.input_shape[1:3], batch_size=64, verbose=False)
    found = model.predict(images, verbose=0)
    print(len(found) / (time.perf_counter() - started))
"""


def main() -> None:
    """Prepare a model and images, measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = prepare_pictures(folder)
        paths = sorted(pictures.rglob("*.jpeg"))
        model, environment = prepare_model(folder, paths)
        one_picture(model, paths[0])
        one_core(folder / "sets", paths[0])
        some = folder / "some"
        some.mkdir()
        for number, path in enumerate(paths[::THROUGHPUT]):
            (some / f"{number:05}.jpeg").symlink_to(path)
        throughput(model, some, sorted(some.iterdir()), folder)
        cold_start(model, paths[0], environment)
        memory(model, paths, folder)


def prepare_pictures(folder: Path) -> Path:
    """Return the folder of the castings, or draw as many images."""
    import sample
    import truth

    if truth.CASTINGS.is_dir():
        return truth.CASTINGS
    drawn = folder / "pictures"
    sample.draw_all(drawn, 0, {"train": {"def_front": PICTURES // 2, "ok_front": PICTURES // 2}})
    return drawn


def prepare_model(folder: Path, paths: list[Path]) -> tuple[Path, dict[str, str]]:
    """Register a model, as `evaluation.py` does, in a child: TensorFlow is not to stay here."""
    program = (
        "import sys; sys.path[:0] = ['src', 'tests', 'tests/benchmarks'];"
        "import inference_speed; inference_speed.register(sys.argv[1], sys.argv[2:])"
    )
    command = [
        sys.executable,
        "-c",
        program,
        str(folder),
        *map(str, paths[:: max(1, len(paths) // 300)]),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return folder / "model", environment


def register(folder: str, paths: list[str]) -> None:
    """Build a model, log and register it, and keep its files in `folder/model`."""
    import logging
    import shutil

    import mlflow

    from defect_detection import settings
    from defect_detection.registry import saved_model, store, versions
    from defect_detection.runtime import preprocessing
    from defect_detection.runtime.model_files import ServedModel
    from defect_detection.runtime.ood import OodDetector
    from defect_detection.training import network as cnn

    logging.getLogger("alembic").setLevel(logging.ERROR)
    parameters = settings.read_yaml(settings.CONFIG_FILE, settings.Config).model_parameters
    takes = preprocessing.ImageFormat(*parameters.image_size)
    sets = Path(folder) / "sets"
    sets.mkdir()
    for hyper in parameters.sets:
        litert = cnn.to_litert(cnn.build(takes.shape, hyper))
        (sets / f"{hyper.name}.tflite").write_bytes(litert)
    built = cnn.build(takes.shape, parameters.sets[0])
    ood = OodDetector.fit(np.stack([preprocessing.decode(Path(p), takes) for p in paths]))
    served = ServedModel(cnn.to_litert(built), takes, ood=ood)
    with store.connected(f"sqlite:///{folder}/mlflow.db", create=True):
        with mlflow.start_run(experiment_id=store.open_experiment("train/benchmark")) as run:
            uri = saved_model.log(built, served, Path(paths[0]).read_bytes())
        version = versions.register(uri, run.info.run_id, 0.9, "", "Production_Reg", {})
        versions.set_alias(version, versions.PRODUCTION_ALIAS)
        with saved_model.fetched(uri) as files:
            shutil.copytree(files, Path(folder) / "model")


def one_picture(model: Path, path: Path) -> None:
    """Compare one image in memory with the bare interpreter and with Keras."""
    from defect_detection.runtime import preprocessing
    from defect_detection.runtime.classifier import PROBABILITY, Classifier

    classifier = Classifier.load(model)
    content = path.read_bytes()
    picture = preprocessing.decode(content, classifier.image_size)[np.newaxis]
    bare = classifier._make()
    ready = picture.astype(np.float32)

    def call() -> None:
        bare._interpreter.set_tensor(bare._input, ready)
        bare._interpreter.invoke()
        bare._interpreter.get_tensor(bare._outputs[PROBABILITY])

    bare.run(ready)
    milliseconds = medians(
        call, lambda: classifier.judge(picture), lambda: classifier.classify(content)
    )
    keras = 1e3 * float(with_keras(model, "loop", path))
    alone, judged, decoded = milliseconds
    print(f"one image, pixels in memory: {judged:.3f} ms; decoding its JPEG too {decoded:.3f} ms")
    print(f"  bare interpreter {alone:.3f} ms: {judged / alone:.2f} x of it (at most 1.3)")
    print(f"  keras.predict {keras:.1f} ms: {keras / judged:.0f} x as fast")


def one_core(sets: Path, path: Path) -> None:
    """Time each set of src/config.yaml on one core."""
    from defect_detection import settings
    from defect_detection.runtime import preprocessing
    from defect_detection.runtime.classifier import Classifier
    from defect_detection.runtime.model_files import ServedModel

    size = settings.read_yaml(settings.CONFIG_FILE, settings.Config).model_parameters.image_size
    picture = preprocessing.decode(path, size)[np.newaxis]
    files = sorted(sets.iterdir())
    models = [ServedModel(file.read_bytes(), size) for file in files]
    judges = [Classifier(model, threads=1).probabilities for model in models]
    times = medians(*(lambda judge=judge: judge(picture) for judge in judges))
    shown = ", ".join(f"{f.stem} {t:.1f} ms" for f, t in zip(files, times, strict=True))
    print(f"one image on one core: {shown}")


def medians(*calls: Callable[[], object]) -> list[float]:
    """Return the median milliseconds of each call, a hundred of each in turn."""
    times = [[] for _ in calls]
    for _ in range(20):
        for call, measured in zip(calls, times, strict=True):
            for _ in range(100):
                started = time.perf_counter()
                call()
                measured.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(measured) for measured in times]


def with_keras(model: Path, what: str, pictures: Path) -> str:
    """Run the same through TensorFlow in a child; return the last line that it prints."""
    command = [sys.executable, "-c", WITH_KERAS, str(model), what, str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def throughput(model: Path, pictures: Path, paths: list[Path], folder: Path) -> None:
    """Compare images a second with TensorFlow's and with those of decoding alone."""
    from defect_detection.runtime import preprocessing
    from defect_detection.runtime.classifier import Classifier

    classifier = Classifier.load(model, threads=1)
    ready = np.zeros((1, *classifier.image_size, 1), np.float32)
    chunks = [paths[start : start + 16] for start in range(0, len(paths), 16)]

    def decode(chunk: list[Path]) -> None:
        for path in chunk:
            preprocessing.decode(path, classifier.image_size)

    def invoke(chunk: list[Path]) -> None:
        with classifier._interpreter() as bare:
            for _ in chunk:
                bare.run(ready)

    def rate_of(work: Callable[[list[Path]], None], some: list[list[Path]]) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, some))
        return 16 * len(some) / (time.perf_counter() - started)

    ours, decoding, bare, keras = [], [], [], []
    for _ in range(3):
        decoding.append(rate_of(decode, chunks))
        bare.append(rate_of(invoke, chunks[:50]))
        started = time.perf_counter()
        infer(pictures, "--model", model, "--csv", folder / "rows.csv")
        ours.append(len(paths) / (time.perf_counter() - started))
        (folder / "rows.csv").unlink()
        keras.append(float(with_keras(model, "folder", pictures)))
    rate, alone, run, through = map(statistics.median, (ours, decoding, bare, keras))
    allowed = 1 / (1 / alone + 1 / run)
    print(f"{len(paths)} JPEG files to a CSV, whole process: {rate:.0f} images/s")
    print(f"  image_dataset_from_directory and predict, import left out: {through:.0f} images/s:")
    print(f"  {rate / through:.1f} x as fast")
    print(f"  decoding alone {alone:.0f} images/s, the bare interpreter {run:.0f}: both together")
    print(f"  allow {allowed:.0f}, of which this is {rate / allowed:.0%} (at least 80%)")


def infer(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run src/inference.py."""
    command = [sys.executable, ROOT / "src" / "inference.py", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


def cold_start(model: Path, path: Path, environment: dict[str, str]) -> None:
    """Compare whole processes that judge one image."""
    script = str(ROOT / "src" / "inference.py")
    commands = {
        "mlflow": ["-c", "import mlflow"],
        "registry": [script, str(path)],
        "model": [script, "--model", str(model), str(path)],
        "keras": ["-c", WITH_KERAS, str(model), "one", str(path)],
        "keras, registry": ["-c", WITH_KERAS, PRODUCTION, "registry", str(path)],
    }
    wall, user = {name: [] for name in commands}, {name: [] for name in commands}
    for number in range(REPEATS + 1):
        for name, command in commands.items():
            before = os.times()
            subprocess.run(
                [sys.executable, *command], env=environment, check=True, capture_output=True
            )
            after = os.times()
            if number:  # the first one fetches the model and reads all from the disk
                wall[name].append(after.elapsed - before.elapsed)
                user[name].append(after.children_user - before.children_user)
    seconds = {name: statistics.median(times) for name, times in wall.items()}
    registry, alone = seconds["registry"], seconds["model"]
    print(f"one image, cold, asking the registry: {registry:.2f} s")
    print(f"  import mlflow {seconds['mlflow']:.2f} s: {registry / seconds['mlflow']:.2f} x of it")
    through = seconds["keras, registry"]
    print(f"  (at most 1.6); through TensorFlow, asking it too, {through:.2f} s:")
    print(f"  {through / registry:.1f} x as fast (at least 3)")
    print(f"with --model: {alone:.2f} s, {statistics.median(user['model']):.2f} s of user time")
    print(f"  (at most 0.6); TensorFlow {seconds['keras']:.2f} s: {seconds['keras'] / alone:.1f} x")


def memory(model: Path, paths: list[Path], folder: Path) -> None:
    """Compare the peak memory over few and over many images."""
    peaks = {}
    for count in (FEW, MANY):
        linked = folder / str(count)
        for number in range(count):
            link = linked / f"{number // 10_000}" / f"{number:06}.jpeg"
            if number % 10_000 == 0:
                link.parent.mkdir(parents=True)
            link.symlink_to(paths[number % len(paths)])
        command = [sys.executable, "-c", MEMORY, str(ROOT / "src" / "inference.py")]
        command += ["--model", model, linked, "--csv", folder / f"{count}.csv"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        megabytes, tensorflow = done.stderr.strip().splitlines()[-1].split()
        assert tensorflow == "False"
        assert len((folder / f"{count}.csv").read_text().splitlines()) == count + 1
        peaks[count] = float(megabytes)
        print(f"peak memory with {count} pictures: {peaks[count]:.0f} MB (at most 250)")
    print(f"  {peaks[MANY] / peaks[FEW]:.2f} x of it with {MANY // FEW} times the images")


if __name__ == "__main__":
    main()
