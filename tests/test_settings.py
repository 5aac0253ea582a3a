"""src/config.yaml and .env."""

import re
import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from defect_detection import PipelineError, settings
from defect_detection.settings import (
    CONFIG_FILE,
    ROOT,
    Config,
    RetrainOverrides,
    RetrainParameters,
)


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


def test_key_of_two_lines_is_told_in_one(broken):
    assert "'a\\nb' is not a known key, expected one of: product" in broken(
        lambda c: c.update({"a\nb": 1})
    )


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
        ("model_parameters", "max_megapixels", float("inf"), "number, more than 0, at most 10000"),
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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("batch_size: 012", 'batch_size is "012", expected a whole number'),
        ("batch_size: 0x20", 'batch_size is "0x20", expected a whole number'),
        ("batch_size: 1_6", 'batch_size is "1_6", expected a whole number'),
        ("batch_size: 1:30", 'batch_size is "1:30", expected a whole number'),
        ("batch_size: 2024-01-02", 'batch_size is "2024-01-02", expected a whole number'),
        ("batch_size: yes", 'batch_size is "yes", expected a whole number'),
        ("learning_rate: .nan", 'learning_rate is ".nan", expected a number'),
        ("learning_rate: 1e999", "learning_rate is Infinity, expected a number"),
    ],
)
def test_value_that_could_mean_something_else_is_text_and_refused(tmp_path, line, expected):
    """YAML 1.1 reads 012 as 10, 1:30 as 90 and yes as true."""
    values = {"image_size": "[64, 64]", "batch_size": "8", "epochs": "1", "learning_rate": "0.1"}
    key, _, value = line.partition(": ")
    file = tmp_path / "part.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in (values | {key: value}).items()))
    with pytest.raises(PipelineError) as raised:
        settings.read_yaml(file, RetrainParameters)
    assert expected in str(raised.value)


def test_number_with_an_exponent_is_a_number(tmp_path):
    file = tmp_path / "part.yaml"
    file.write_text("image_size: [64, 64]\nbatch_size: 8\nepochs: 1\nlearning_rate: 1e-4\n")
    assert settings.read_yaml(file, RetrainParameters).learning_rate == 1e-4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_file_may_begin_with_the_mark_that_windows_writes(tmp_path, encoding):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG_FILE.read_text(encoding="utf-8"), encoding=encoding)
    assert settings.read_yaml(file, Config) == settings.read_config()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("größe: 1\n".encode("latin-1"), r"line 1: is not UTF-8"),
        (b"a: 1\nb: \xff\n", r"line 2: is not UTF-8"),
        ("a: 1\n".encode("utf-16"), r"line 1: is not UTF-8"),
        ("a: 1\n".encode("utf-16-le"), r"line 1: is not UTF-8"),
        (b"a: 1\n" * 300_000, r"is larger than 1 MB"),
    ],
    ids=["latin-1", "byte", "utf-16", "utf-16 without a mark", "large"],
)
def test_file_that_is_no_text_is_one_line(tmp_path, content, expected):
    for name, read in (
        ("config.yaml", lambda file: settings.read_yaml(file, Config)),
        (".env", lambda file: settings.environment({}, file)),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(PipelineError, match=f"{name}:? {expected}") as raised:
            read(file)
        assert "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"none\.yaml: cannot be read"):
        settings.read_yaml(tmp_path / "none.yaml", Config)


def test_environment_wins_over_the_file_and_empty_is_unset(tmp_path):
    file = tmp_path / ".env"
    file.write_text("A=file\nB=file\nC=file\n")
    assert settings.environment({"A": "shell", "B": ""}, file) == {"A": "shell", "C": "file"}


def test_first_variable_is_read_also_behind_the_mark_that_windows_writes(tmp_path):
    file = tmp_path / ".env"
    file.write_text("A=file\n", encoding="utf-8-sig")
    assert settings.environment({}, file) == {"A": "file"}


@pytest.mark.parametrize(
    "line", ["API_TOKEN='secret", "API_TOKEN secret", "API_TOKEN:secret", "secret", "export secret"]
)
def test_line_of_the_file_that_cannot_be_understood_is_not_passed_over(tmp_path, line):
    """An API whose token is in a line that is ignored would run without a token."""
    file = tmp_path / ".env"
    file.write_text(f"A=1\n\n# a comment\n{line}\n")
    with pytest.raises(PipelineError, match=r"\.env line 4: expected NAME=value") as raised:
        settings.environment({}, file)
    assert "secret" not in str(raised.value)


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


def test_without_any_env_the_store_is_the_one_that_env_names(tmp_path):
    named = settings.tracking_uri(settings.environment({}))
    assert settings.tracking_uri(settings.environment({}, tmp_path / ".env")) == named
    assert named == f"sqlite:///{ROOT}/mlflow.db"


@pytest.mark.parametrize("uri", ["sqlite:mlflow.db", "http:/kim:secret@host", "kim:secret@host:5"])
def test_store_that_is_neither_uri_nor_folder_is_refused_without_its_password(uri):
    with pytest.raises(PipelineError, match="MLFLOW_TRACKING_URI is .*, expected") as raised:
        settings.tracking_uri({"MLFLOW_TRACKING_URI": uri})
    assert "secret" not in str(raised.value)


CREDENTIALS = {"MLFLOW_TRACKING_USERNAME": "kim", "MLFLOW_TRACKING_PASSWORD": "p@ss/w:rd%"}


@pytest.mark.parametrize(
    ("uri", "more", "expected"),
    [
        ("http://host:5000", CREDENTIALS, "http://kim:p%40ss%2Fw%3Ard%25@host:5000"),
        ("https://a:b@host", CREDENTIALS, "https://a:b@host"),
        ("http://host", {"MLFLOW_TRACKING_USERNAME": "kim"}, "http://host"),
        ("postgresql://host/db", CREDENTIALS, "postgresql://host/db"),
        ("sqlite:////var/mlflow.db", CREDENTIALS, "sqlite:////var/mlflow.db"),
    ],
)
def test_user_and_password_of_a_server_may_stand_in_variables_of_their_own(uri, more, expected):
    """MLflow itself would read them from the environment only, and not from .env.local."""
    assert settings.tracking_uri({"MLFLOW_TRACKING_URI": uri, **more}) == expected


def test_local_file_wins_over_the_tracked_one_and_the_environment_over_both(tmp_path):
    (tmp_path / ".env").write_text("A=tracked\nB=tracked\nC=tracked\n")
    (tmp_path / ".env.local").write_text("B=local\nC=local\n", encoding="utf-8-sig")
    found = settings.environment({"C": "shell"}, tmp_path / ".env")
    assert found == {"A": "tracked", "B": "local", "C": "shell"}
    (tmp_path / ".env").unlink()
    assert settings.environment({}, tmp_path / ".env") == {"B": "local", "C": "local"}


def test_local_file_never_enters_a_commit():
    command = ["git", "-C", ROOT, "check-ignore", "--no-index", ".env", ".env.example"]
    done = subprocess.run([*command, ".env.local"], capture_output=True, text=True)
    assert done.stdout == ".env.local\n"


def test_example_names_every_variable_that_the_code_reads(tmp_path):
    code = [*(ROOT / "src").rglob("*.py"), ROOT / "api.py", *(ROOT / "re_train").glob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in code)
    read = set(re.findall(r"""\benv(?:ironment)?(?:\.get\(|\[)["']([A-Z_]+)""", text))
    read -= {name for name in read if name.startswith("GITHUB_")}  # set by GitHub's runner
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^# ([A-Z_]+)=", example, re.M)) == read
    assert len(read) >= 9
    assert all(line.startswith("#") or not line for line in example.splitlines())
    (tmp_path / ".env").write_text(re.sub(r"^# ([A-Z_]+=)", r"\1", example, flags=re.M))
    assert settings.environment({}, tmp_path / ".env").keys() == read


def test_tracked_file_names_the_default_store_and_nothing_else():
    """Whatever else is set belongs into .env.local, which no commit takes along."""
    (line,) = re.findall(r"^[^#\n]+$", (ROOT / ".env").read_text(encoding="utf-8"), re.M)
    assert line == "MLFLOW_TRACKING_URI=sqlite:///mlflow.db"


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
