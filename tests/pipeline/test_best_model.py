"""The file that training leaves for the evaluation."""

import mlflow
import pytest

from defect_detection import PipelineError
from defect_detection.pipeline.best_model import BestModel
from defect_detection.registry import store as stores


def _best(run_id: str) -> BestModel:
    return BestModel(run_id, "models:/m-1", 0.9, "0" * 64, "2026-01-01T00:00:00+00:00")


def test_best_model_comes_back_as_it_was_written(store, tmp_path):
    with mlflow.start_run(experiment_id=stores.open_experiment("train/test")) as run:
        pass
    best = _best(run.info.run_id)
    best.write(tmp_path / "best_model.json")
    assert BestModel.read(tmp_path / "best_model.json", "python src/train.py --data d") == best


@pytest.mark.parametrize("gone", ["0123456789abcdef0123456789abcdef", None])
def test_best_model_of_a_run_that_is_gone_is_refused(store, tmp_path, gone):
    if gone is None:
        with mlflow.start_run(experiment_id=stores.open_experiment("train/test")) as run:
            gone = run.info.run_id
        mlflow.delete_run(gone)
    _best(gone).write(tmp_path / "best_model.json")
    with pytest.raises(PipelineError, match=f"run {gone}, which is not in the tracking store"):
        BestModel.read(tmp_path / "best_model.json", "python src/train.py --data d")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id": "1"}', '{"unknown": 1}'])
def test_damaged_best_model_is_refused(tmp_path, text):
    (tmp_path / "best_model.json").write_text(text)
    with pytest.raises(PipelineError, match="is damaged"):
        BestModel.read(tmp_path / "best_model.json", "python src/train.py --data d")


def test_missing_best_model_names_the_script_that_writes_it(tmp_path):
    with pytest.raises(
        PipelineError, match=r"does not exist. Run 'python src/train\.py --data d' first"
    ):
        BestModel.read(tmp_path / "best_model.json", "python src/train.py --data d")
