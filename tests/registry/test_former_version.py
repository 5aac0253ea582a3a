"""A version that was registered before the package `runtime` existed, kept as it was saved."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient

from defect_detection import PipelineError
from defect_detection.registry import saved_model, versions
from defect_detection.runtime.classifier import Classifier
from defect_detection.runtime.decision import OperatingPoint
from defect_detection.runtime.pyfunc import COLUMN

KEPT = Path(__file__).with_name("version_before_runtime.zip")
POINT = OperatingPoint(0.3, 0.25, 0.45)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The folders and files of the archive: the model, six images, their verdicts then."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.unpack_archive(KEPT, folder)
    return folder


@pytest.fixture(scope="module")
def parts(kept) -> list[Path]:
    return [kept / f"part_{number}.jpeg" for number in range(6)]


@pytest.fixture(scope="module")
def verdicts(kept) -> list[dict]:
    return json.loads((kept / "verdicts.json").read_text())


@pytest.fixture
def registered(store, kept, tmp_path):
    """The kept version in a registry."""
    name = f"Former_{tmp_path.name}"
    client = MlflowClient()
    client.create_registered_model(name)
    client.create_model_version(name, (kept / "model").as_uri(), tags={"acc": "0.9"})
    version = versions.Version(name, 1, 0.9)
    versions.set_alias(version, versions.PRODUCTION_ALIAS)
    return version


def close(verdict: dict, expected: dict) -> bool:
    same = {key: verdict[key] == expected[key] for key in ("verdict", "review", "reason")}
    return all(same.values()) and abs(verdict["probability"] - expected["probability"]) < 1e-5


def test_it_judges_as_it_did(registered, parts, verdicts):
    assert {one["verdict"] for one in verdicts} == {"defect", "ok"}
    classifier = saved_model.load_classifier(registered.uri)
    assert classifier.point == POINT
    found = [one.as_dict() for one in classifier.classify_all(parts)]
    assert all(map(close, found, verdicts))


def test_mlflow_loads_it_in_this_project_and_where_only_its_own_code_is(
    registered, kept, parts, verdicts, tmp_path
):
    images = [part.read_bytes() for part in parts]
    loaded = mlflow.pyfunc.load_model(f"models:/{registered.name}@prod")
    assert all(map(close, loaded.predict(pd.DataFrame({COLUMN: images})), verdicts))
    program = (
        "import json, mlflow, pandas, pathlib, sys;"
        "model = mlflow.pyfunc.load_model(sys.argv[1]);"
        "images = [pathlib.Path(path).read_bytes() for path in sys.argv[2:]];"
        "rows = model.predict(pandas.DataFrame({'picture': images}));"
        "print(json.dumps([rows, sys.modules['defect_detection'].__file__]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(kept / "model"), *map(str, parts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows, file = json.loads(done.stdout)
    assert file == str(kept / "model" / "code" / "defect_detection" / "__init__.py")
    assert all(map(close, rows, verdicts))


def test_its_keras_model_can_be_trained_further(registered):
    if sys.version_info < (3, 11):  # it was saved by Keras 3.15, which needs Python 3.11
        with pytest.raises(PipelineError, match="cannot be read by Keras 3.12.4, which is older"):
            saved_model.load_keras(registered.uri)
        return
    model = saved_model.load_keras(registered.uri)
    assert model.trainable_weights


@pytest.mark.skipif(sys.version_info < (3, 11), reason="its Keras cannot read the whole file")
def test_a_damaged_keras_model_is_not_blamed_on_the_python_version(kept, tmp_path):
    copied = shutil.copytree(kept / "model", tmp_path / "model")
    damaged = copied / "data" / "model.keras"
    content = damaged.read_bytes()
    for left in (b"", content[:2000], content[:-2000] + bytes(2000)):
        damaged.write_bytes(left)
        with pytest.raises(PipelineError, match="since it is damaged, .*. Train a new one$"):
            saved_model.load_keras(copied.as_uri())


def test_its_folder_serves_without_a_registry(kept, parts, verdicts):
    found = Classifier.load(kept / "model").classify(parts[0])
    assert found.verdict == verdicts[0]["verdict"]


@pytest.mark.parametrize("former_first", [True, False])
def test_one_process_loads_it_and_a_new_version(kept, model_folder, tmp_path, former_first):
    """Where the project is not installed, the code of the first one loaded serves both."""
    folders = [str(kept / "model"), str(model_folder)]
    program = (
        "import mlflow, sys\n"
        "for folder in sys.argv[1:]:\n"
        "    print(type(mlflow.pyfunc.load_model(folder)).__name__)"
    )
    command = [sys.executable, "-c", program, *(folders if former_first else folders[::-1])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["PyFuncModel", "PyFuncModel"], done.stderr
