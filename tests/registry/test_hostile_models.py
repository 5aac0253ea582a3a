"""Models in the store that were made to run code where they are loaded: they run nothing."""

import io
import json
import marshal
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from conftest import long
from defect_detection import PipelineError
from defect_detection.inference import fetch
from defect_detection.inference.production import Source
from defect_detection.registry import saved_model, versions
from defect_detection.runtime import checksums
from defect_detection.runtime.classifier import Classifier


class Payload:
    """Makes the file `ran` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def pickled(name: str, dump: Callable = cloudpickle.dumps) -> Callable[[Path, Path], None]:
    def make(model: Path, marker: Path) -> None:
        (model / name).write_bytes(dump({"layer": Payload(marker)}))

    return make


def source(name: str) -> Callable[[Path, Path], None]:
    """A module in `code/`, and every flavour says that its code lies there."""

    def make(model: Path, marker: Path) -> None:
        path = model / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        former = path.read_text() if path.exists() else ""
        path.write_text(f"open({str(marker)!r}, 'w').close()\n{former}")
        describe(model, lambda flavors: [one.update(code="code") for one in flavors.values()])

    return make


def naming(flavor: str, **entries: str) -> Callable[[Path, Path], None]:
    """A flavour that names a module in `code/` as one to import."""

    def make(model: Path, marker: Path) -> None:
        source("evil.py")(model, marker)
        describe(model, lambda flavors: flavors[flavor].update(entries))

    return make


def describe(model: Path, change: Callable[[dict], object]) -> None:
    described = yaml.safe_load((model / "MLmodel").read_text())
    change(described["flavors"])
    (model / "MLmodel").write_text(yaml.safe_dump(described))


def yaml_tag(model: Path, marker: Path) -> None:
    with (model / "MLmodel").open("a") as file:
        file.write(f"\nx: !!python/object/apply:os.system ['touch {marker}']\n")


def object_array(model: Path, marker: Path) -> None:
    with np.load(model / "scope.npz") as known:
        arrays = dict(known)
    np.savez(model / "scope.npz", **arrays | {"mean": np.array([Payload(marker)], object)})


def keras_config(change: Callable[[dict, Path], None]) -> Callable[[Path, Path], None]:
    """A Keras file of which a layer, the second, is described otherwise."""

    def make(model: Path, marker: Path) -> None:
        file = model / "data" / "model.keras"
        with zipfile.ZipFile(file) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        config = json.loads(content["config.json"])
        change(config["config"]["layers"][1], marker)
        content["config.json"] = json.dumps(config).encode()
        with zipfile.ZipFile(file, "w") as archive:
            for name, one in content.items():
                archive.writestr(name, one)

    return make


def as_lambda(layer: dict, marker: Path) -> None:
    import base64

    code = compile(f"(lambda x: open({str(marker)!r}, 'w'))", "", "eval").co_consts[0]
    body = base64.b64encode(marshal.dumps(code)).decode()
    config = {"code": body, "defaults": None, "closure": None}
    function = {"class_name": "__lambda__", "config": config}
    layer.update(module="keras.layers", class_name="Lambda", registered_name=None)
    layer["config"] = {"name": "pad", "function": function}


def calling(module: str, name: str, **config: object) -> Callable[[dict, Path], None]:
    """A layer that is another callable of Python."""

    def change(layer: dict, marker: Path) -> None:
        filled = {
            key: value.format(marker=marker) if isinstance(value, str) else value
            for key, value in config.items()
        }
        layer.update(module=module, class_name=name, registered_name=None, config=filled)

    return change


def as_function(module: str, name: str, argument: str) -> Callable[[dict, Path], None]:
    """A Lambda whose function is found by its name, and called with the arguments given."""

    def change(layer: dict, marker: Path) -> None:
        function = {"class_name": "function", "config": name, "module": module}
        function["registered_name"] = name
        arguments = {argument: f"touch {marker}", "origin": f"file://{marker}"}
        layer.update(module="keras.layers", class_name="Lambda", registered_name=None)
        layer["config"] = {"name": "pad", "function": function, "arguments": arguments}

    return change


def as_activation(layer: dict, marker: Path) -> None:
    run = {
        "module": "os",
        "class_name": "function",
        "config": "system",
        "registered_name": "system",
    }
    layer.update(module="keras.layers", class_name="Activation", registered_name=None)
    layer["config"] = {"name": "pad", "activation": run}


def torch_module(layer: dict, marker: Path) -> None:
    layer.update(module="keras.layers", class_name="TorchModuleWrapper", registered_name=None)
    layer["config"] = {"name": "pad", "module": pickle.dumps(Payload(marker)).decode("latin-1")}


def saved_function(layer: dict, marker: Path) -> None:
    layer.update(module="keras.layers", class_name="TFSMLayer", registered_name=None)
    layer["config"] = {"name": "pad", "filepath": str(marker.parent), "call_endpoint": "serve"}


def former_format(model: Path, marker: Path) -> None:
    """HDF5 under the name of a Keras file, with a Lambda."""
    import h5py

    layer: dict = {}
    as_lambda(layer, marker)
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
    with h5py.File(model / "data" / "model.keras", "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.15.0"
        file.attrs["backend"] = "tensorflow"
        file.create_group("model_weights")


def leading_out(model: Path, marker: Path) -> None:
    """An archive with a name that leads out of where it is unpacked."""
    with zipfile.ZipFile(model / "data" / "model.keras", "a") as archive:
        archive.writestr(f"../../../../../../../..{marker}", b"")
        archive.writestr(f"assets/../../../../../../../..{marker}", b"")


def numpy_weights(model: Path, marker: Path) -> None:
    """Weights as a NumPy archive of objects."""
    file = model / "data" / "model.keras"
    with zipfile.ZipFile(file) as archive:
        config, metadata = archive.read("config.json"), archive.read("metadata.json")
    weights = io.BytesIO()
    np.savez(weights, __root__=np.array([Payload(marker)], object))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("config.json", config)
        archive.writestr("metadata.json", metadata)
        archive.writestr("model.weights.npz", weights.getvalue())


HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    "custom objects": pickled("data/custom_objects.cloudpickle"),
    "global custom objects": pickled("data/global_custom_objects.cloudpickle"),
    "pickle for a Keras file": pickled("data/model.keras", pickle.dumps),
    "pickle for a LiteRT file": pickled("model.tflite", pickle.dumps),
    "pickle for limits": pickled("scope.npz", pickle.dumps),
    "objects among limits": object_array,
    "package of this project": source("defect_detection/__init__.py"),
    "its loader": source("defect_detection/pyfunc.py"),
    "sitecustomize": source("sitecustomize.py"),
    "module of the standard library": source("hashlib.py"),
    "loader module": naming("python_function", loader_module="evil"),
    "keras module": naming("tensorflow", keras_module="evil"),
    "older save format": naming("tensorflow", keras_module="evil", save_format="h5"),
    "model type": naming("tensorflow", model_type="tf2-module", saved_model_dir="data"),
    "tag of YAML": yaml_tag,
    "lambda": keras_config(as_lambda),
    "lambda in the former format": former_format,
    "shell by name": keras_config(calling("os", "system", command="touch {marker}")),
    "exec by name": keras_config(calling("builtins", "exec", source="open('{marker}', 'w')")),
    "process by name": keras_config(calling("subprocess", "Popen", args=["touch", "{marker}"])),
    "function of the shell": keras_config(as_function("os", "system", "command")),
    "function that fetches": keras_config(as_function("keras.utils", "get_file", "fname")),
    "activation": keras_config(as_activation),
    "module of PyTorch": keras_config(torch_module),
    "saved function": keras_config(saved_function),
    "way out of the archive": leading_out,
    "objects for weights": numpy_weights,
}


def test_there_are_at_least_twenty():
    assert len(HOSTILE) >= 20


@pytest.fixture
def stored(store, model_folder, tmp_path) -> Path:
    """The files of a version in production, which is from before there were checksums."""
    model = Path(shutil.copytree(model_folder, tmp_path / "stored"))
    describe(model, lambda flavors: flavors["litert"].pop("checksums"))
    (model / checksums.FILE).unlink()
    return model


@pytest.mark.parametrize("how", HOSTILE)
def test_model_runs_nothing_where_it_is_loaded(how, stored, store, tmp_path, monkeypatch):
    """Neither in evaluation (both forms) and retraining, nor in inference."""
    marker = tmp_path / "ran"
    monkeypatch.chdir(tmp_path)
    HOSTILE[how](stored, marker)
    name = f"Hostile_{tmp_path.name}"
    client = MlflowClient()
    client.create_registered_model(name)
    client.create_model_version(name, stored.as_uri(), tags={"acc": "0.9"})
    version = versions.Version(name, 1, 0.9)
    versions.set_alias(version, versions.PRODUCTION_ALIAS)
    for load in (
        lambda: saved_model.load_classifier(version.uri),
        lambda: saved_model.load_keras(version.uri),
        lambda: Classifier.load(Path(fetch.fetch(Source(store, name, str(tmp_path))).folder)),
    ):
        try:
            load()
        except PipelineError:
            pass
        assert not marker.exists()


NAIVE = {
    "custom objects": "import mlflow; mlflow.tensorflow.load_model(model)",
    "loader module": "import mlflow; mlflow.pyfunc.load_model(model)",
    "lambda": "import keras; keras.saving.load_model(f'{model}/data/model.keras', safe_mode=False)",
    "objects among limits": "import numpy; numpy.load(f'{model}/scope.npz', allow_pickle=True)"
    "['mean']",
    "tag of YAML": "import yaml; yaml.unsafe_load(open(f'{model}/MLmodel'))",
    "pickle for a LiteRT file": "import pickle; pickle.load(open(f'{model}/model.tflite', 'rb'))",
}
SLOW = {"custom objects", "lambda"}  # to load


@pytest.mark.parametrize("how", [long(one) if one in SLOW else one for one in NAIVE])
def test_such_a_model_runs_something_where_it_is_loaded_otherwise(how, stored, tmp_path):
    """Else the test above could not fail."""
    marker = tmp_path / "ran"
    HOSTILE[how](stored, marker)
    program = f"import sys; model = sys.argv[1]; {NAIVE[how]}"
    subprocess.run([sys.executable, "-c", program, stored], capture_output=True)
    assert marker.exists()


def test_model_that_was_changed_in_the_store_is_refused(stored, store, logged_model, tmp_path):
    """Also if its checksums were changed with it: the registry knows them."""
    name = f"Changed_{tmp_path.name}"
    run, uri = logged_model
    tags = {saved_model.CHECKSUM: saved_model.checksum(uri)}
    version = versions.register(uri, run, 0.9, "", name, tags)
    assert tags[saved_model.CHECKSUM] and saved_model.load_classifier(version.uri)
    files = Path(stored / "model.tflite")
    client = MlflowClient()
    client.create_model_version(name, stored.as_uri(), tags={"acc": "0.9"} | tags)
    changed = versions.Version(name, 2, 0.9)
    with pytest.raises(PipelineError, match=f"{changed.uri}: .*SHA256SUMS is missing"):
        saved_model.load_classifier(changed.uri)
    checksums.write(files.parent)
    for load in (saved_model.load_classifier, saved_model.load_keras):
        with pytest.raises(PipelineError, match="is not the one that was saved with the model"):
            load(changed.uri)
