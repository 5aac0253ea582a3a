"""src/config.yaml and .env."""

from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from defect_detection import PipelineError, settings
from defect_detection.settings import CONFIG_FILE, ROOT, Config, RetrainOverrides


@pytest.fixture
def broken(tmp_path: Path):
    """Write the real configuration with one change; return the message that it gets."""

    def message(change) -> str:
        config = yaml.safe_load(CONFIG_FILE.read_text())
        change(config)
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        with pytest.raises(PipelineError) as raised:
            settings.read_yaml(file, Config)
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return message


def test_the_configuration_has_three_sets_that_differ_in_more_than_one_respect():
    sets = settings.read_yaml(CONFIG_FILE, Config).model_parameters.sets
    assert len(sets) == 3
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            differing = [k for k, v in vars(one).items() if v != getattr(other, k) and k != "name"]
            assert len(differing) > 1


def test_unknown_key_is_named_with_the_known_ones(broken):
    message = broken(lambda c: c["model_parameters"].update(dropout=3))
    assert "model_parameters.dropout is not a known key, expected one of: image_size" in message


def test_misspelt_key_is_named_with_the_one_that_was_meant(broken):
    message = broken(lambda c: c["model_parameters"].update(varaints=3))
    assert "model_parameters.varaints is not a known key, did you mean variants?" in message


def test_a_key_that_is_written_wrongly_is_named_and_not_the_one_that_is_missing(broken):
    def misspell(config: dict) -> None:
        one = config["model_parameters"]["sets"][0]
        one["epohcs"] = one.pop("epochs")

    assert "epohcs is not a known key, did you mean epochs?" in broken(misspell)


def test_product_that_is_no_name_is_told_which_characters_are(broken):
    message = broken(lambda c: c.update(product="my tiles"))
    assert 'product is "my tiles", expected a text of letters, digits, dots' in message


def test_missing_key_is_named_with_what_is_expected(broken):
    message = broken(lambda c: c["model_parameters"].pop("variants"))
    assert "model_parameters.variants is missing, expected a whole number, at least 10" in message


def test_missing_section_is_named_with_its_keys(broken):
    message = broken(lambda c: c.pop("paths"))
    assert "paths is missing, expected the keys data_path, best_model, cache" in message


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("model_parameters", "variants", "12", 'variants is "12", expected a whole number'),
        ("model_parameters", "variants", True, "variants is true, expected a whole number"),
        ("model_parameters", "variants", 0, "variants is 0, expected a whole number, at least 10"),
        ("model_parameters", "variants", 1.5, "variants is 1.5, expected a whole number"),
        ("model_parameters", "sets", [], "sets is [], expected a list that is not empty"),
        ("model_parameters", "sets", None, "sets is null, expected a list that is not empty"),
        ("model_parameters", "image_size", [128], "image_size"),
        ("model_parameters", "image_size", [128, 4], "image_size.1 is 4, expected a whole number"),
        ("model_parameters", "validation_share", 1.0, "more than 0, less than 1"),
        ("mlflow", "evaluation_threshold", "60 %", 'threshold is "60 %", expected a number'),
        ("mlflow", "experiment_name", "", "experiment_name"),
        ("decisions", "promotion", "best", "expected one of: highest_acc, significant"),
        ("decisions", "max_escape_rate", 1.0, "expected a number, at least 0, less than 1"),
        ("model_parameters", "color", "rgb", "expected one of: auto, grey"),
        ("model_parameters", "max_megapixels", 0, "is 0, expected a number, more than 0"),
        ("model_parameters", "max_megapixels", "9", 'megapixels is "9", expected a number'),
        ("decisions", "refuse_chance", "no", 'refuse_chance is "no", expected true or false'),
        ("paths", "data_path", 3, "data_path is 3, expected a text"),
    ],
)
def test_wrong_value_is_named_with_what_is_expected(broken, section, key, value, expected):
    assert expected in broken(lambda c: c[section].update({key: value}))


def test_configuration_without_the_most_megapixels_allows_a_hundred(tmp_path):
    content = yaml.safe_load(CONFIG_FILE.read_text())
    del content["model_parameters"]["max_megapixels"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    read = settings.read_config(str(tmp_path / "config.yaml")).model_parameters
    assert read.most_pixels == 100_000_000


def test_wrong_value_inside_a_set_is_named_by_its_place(broken):
    message = broken(lambda c: c["model_parameters"]["sets"][1].update(learning_rate="high"))
    assert 'model_parameters.sets.1.learning_rate is "high", expected a number' in message


def test_two_sets_of_one_name_are_refused(broken):
    message = broken(lambda c: c["model_parameters"]["sets"][1].update(name="local"))
    assert "two sets are named 'local'" in message


@pytest.mark.parametrize("text", ["a: [1", "", "- 1\n- 2", "3"])
def test_file_that_is_no_mapping_is_refused_in_one_line(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(PipelineError, match="config.yaml") as raised:
        settings.read_yaml(file, Config)
    assert "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"none\.yaml: cannot be read"):
        settings.read_yaml(tmp_path / "none.yaml", Config)


def test_environment_wins_over_the_file_and_empty_is_unset(tmp_path):
    file = tmp_path / ".env"
    file.write_text("A=file\nB=file\nC=file\n")
    assert settings.environment({"A": "shell", "B": ""}, file) == {"A": "shell", "C": "file"}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:///mlflow.db", f"sqlite:///{ROOT}/mlflow.db"),
        ("sqlite:////var/mlflow.db", "sqlite:////var/mlflow.db"),
        ("file:./mlruns", f"file://{ROOT}/mlruns"),
        ("file:///var/mlruns", "file:///var/mlruns"),
        ("mlruns", f"file://{ROOT}/mlruns"),
        ("http://10.0.0.1:5000", "http://10.0.0.1:5000"),
    ],
)
def test_relative_store_counts_from_the_projects_root(uri, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert settings.tracking_uri({"MLFLOW_TRACKING_URI": uri}) == expected


def test_unset_tracking_uri_is_named_with_what_to_write():
    with pytest.raises(PipelineError, match="MLFLOW_TRACKING_URI=sqlite"):
        settings.tracking_uri({})


@pytest.mark.parametrize("given", ["auto", "cpu", "gpu", None])
def test_device_is_one_of_three_and_auto_if_unset(given):
    assert settings.device({} if given is None else {"DEVICE": given}) == (given or "auto")


@pytest.mark.parametrize("given", ["tpu", "CPU", "cpu "])
def test_wrong_device_is_one_line_with_those_there_are(given):
    with pytest.raises(PipelineError, match=f"DEVICE is '{given}', expected one of: auto, cpu, gp"):
        settings.device({"DEVICE": given})


def test_overrides_are_declared_once():
    """The API's body, the options of re_train.py and the job's command have the same fields."""
    given = settings.parse_json('{"epochs": 3, "learning_rate": 0.5}', RetrainOverrides, "The body")
    parser = ArgumentParser()
    RetrainOverrides.add_options(parser)
    assert RetrainOverrides.from_options(parser.parse_args(given.options())) == given
    assert given.given() == {"epochs": 3, "learning_rate": 0.5}
    every = RetrainOverrides(epochs=1, batch_size=2, learning_rate=0.1)
    assert RetrainOverrides.from_options(parser.parse_args(every.options())) == every
    assert RetrainOverrides().options() == []
