"""The GitHub workflow and the shell scripts that it runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, SMALL, free_port

WORKFLOW = ROOT / ".github" / "workflows" / "mlops.yml"


@pytest.fixture(scope="module")
def workflow() -> dict:
    return yaml.safe_load(WORKFLOW.read_text())


def test_workflow_is_valid_for_github():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    done = subprocess.run(
        [*command, "vendor.github-workflows", WORKFLOW], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_runs_on_every_push_with_least_rights_and_limits(workflow):
    assert workflow[True] == "push"  # YAML 1.1 reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    assert workflow["jobs"]["pipeline"]["runs-on"] == ["self-hosted", "macOS", "ARM64"]
    assert workflow["jobs"]["pipeline"]["needs"] == "test"
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if "uses" in step:
                action, commit = step["uses"].split("@")
                assert len(commit) == 40, f"{action} is not pinned to a commit"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["start_api.sh", ".ci/setup", ".ci/run"])
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_workflow(workflow, tmp_path):
    for number, step in enumerate(steps(workflow)):
        file = tmp_path / f"{number}.sh"
        file.write_text(step["run"])
        done = subprocess.run(["shellcheck", "-s", "bash", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def steps(workflow: dict) -> list[dict]:
    return [step for step in workflow["jobs"]["pipeline"]["steps"] if "run" in step]


class Runner:
    """Runs the `run:` steps of the job in order, as GitHub's runner does on a clean clone."""

    def __init__(self, clone: Path, home: Path, variables: dict[str, str]):
        self.clone = clone
        self.variables = variables
        self.files = {name: home / name for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
        for file in self.files.values():
            file.touch()
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "API", "DATA"))
        }
        self.env |= {k: str(v) for k, v in self.files.items()}
        self.env |= {"HOME": str(home), "RUNNER_TRACKING_ID": "github_test", "CI": "true"}
        self.env |= {"API_PORT": str(free_port())}

    def run(self, step: dict) -> str:
        env = dict(self.env)
        for line in self.files["GITHUB_ENV"].read_text().splitlines():
            name, _, value = line.partition("=")
            env[name] = value
        for name, value in step.get("env", {}).items():
            for variable, content in self.variables.items():
                value = value.replace("${{ vars." + variable + " }}", content)
            assert "${{" not in value
            env[name] = value
        assert "${{" not in step["run"], "values go through the environment, not into the script"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.clone,
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def runner(tmp_path, learnable):
    clone, home = tmp_path / "clone", tmp_path / "home"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    config = yaml.safe_load((clone / "src" / "config.yaml").read_text())
    config["model_parameters"] |= SMALL
    (clone / "src" / "config.yaml").write_text(yaml.safe_dump(config))
    home.mkdir()
    # What `make setup` would install is what runs this test.
    (clone / ".venv").symlink_to(sys.prefix)
    made = Runner(
        clone, home, {"MLFLOW_TRACKING_URI": "", "DATA_PATH": str(learnable), "JOBS_PATH": ""}
    )
    yield made
    subprocess.run(
        [clone / "start_api.sh", "stop"],
        env=made.env | {"JOBS_PATH": str(home / "defect-detection" / "jobs")},
        check=True,
    )


def test_steps_of_the_workflow_pass_in_order_in_a_clean_clone(workflow, runner):
    printed = {step["name"]: runner.run(step) for step in steps(workflow)}
    assert "prod is version 1" in printed["Evaluate"]
    assert "The API is running" in printed["Restart the API"]
    summary = runner.files["GITHUB_STEP_SUMMARY"].read_text()
    for name in ("one", "two", "three"):
        assert re.search(
            rf"^\| (\*\*)?{name}(\*\*)? \| \d+ \| [01]\.\d{{4}} \| \d+ \|$", summary, re.M
        )
    assert summary.count("| **") == 1
    assert "Production_Reg version 1" in summary
    assert summary.count("```mermaid") == 1
    for figure in ("escapes", "overkill"):
        rate = r"\d+ of \d+ \(\d+\.\d%, 95% bounds \d+\.\d% to \d+\.\d%\)"
        assert re.search(rf"^\| {figure} \| {rate} \| {rate} \|$", summary, re.M)
    assert "There was no version in production to compare with. Registered as" in summary
    # Nothing that must outlive the next checkout lies in the work tree.
    kept = runner.files["GITHUB_ENV"].parent / "defect-detection"
    assert {path.name for path in kept.iterdir()} >= {"mlflow.db", "mlruns", "jobs"}
    left = subprocess.run(
        ["git", "-C", runner.clone, "status", "--porcelain", "--ignored"],
        capture_output=True,
        text=True,
    )
    ignored = {line.split()[1] for line in left.stdout.splitlines()}
    assert "mlflow.db" not in ignored and "mlruns/" not in ignored
