"""The GitHub workflow and the shell scripts that it runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from conftest import NETWORK, ROOT, SETS, SMALL, Project, draw_folders, free_port

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
    pipeline = workflow["jobs"]["pipeline"]
    assert pipeline["concurrency"] == {"group": "mlops", "cancel-in-progress": False}
    assert pipeline["runs-on"] == ["self-hosted", "macOS", "ARM64"]
    assert pipeline["needs"] == "test"
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        for step in job["steps"]:
            if "uses" in step:
                action, commit = step["uses"].split("@")
                assert len(commit) == 40, f"{action} is not pinned to a commit"


def test_every_branch_is_tested_and_only_the_default_one_can_move_prod(workflow):
    """The pipeline evaluates, and evaluating gives the alias prod."""
    assert "if" not in workflow["jobs"]["test"]
    assert workflow["jobs"].keys() == {"test", "pipeline"}
    default = "github.ref == format('refs/heads/{0}', github.event.repository.default_branch)"
    assert workflow["jobs"]["pipeline"]["if"] == default
    # A waiting pipeline is given up for a newer one in its group: tests must be in none.
    assert "concurrency" not in workflow and "concurrency" not in workflow["jobs"]["test"]


def test_nothing_runs_from_the_work_tree_that_checkout_cleans(workflow):
    for step in steps(workflow):
        if ".venv" in step["run"] or ".sh" in step["run"]:
            assert step["working-directory"] == "${{ env.RELEASE }}", step["name"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["start_api.sh", ".ci/setup", ".ci/run", ".ci/release"])
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


# Stands in for Python: makes an environment in which the Python of this test runs, and pip nothing.
PYTHON = f"""#!/bin/sh
case "$*" in
    *"-m venv"*)
        for folder; do :; done
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python";;
    *"-m pip"*) ;;
    *) exec {sys.executable} "$@";;
esac
"""


class Runner:
    """Runs the `run:` steps of the job in order, as GitHub's runner does on a clean clone."""

    def __init__(self, clone: Path, home: Path, variables: dict[str, str]):
        self.clone = clone
        self.variables = variables
        self.kept = home / "defect-detection"
        self.files = {name: home / name for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
        for file in self.files.values():
            file.touch()
        python = home / "bin" / "python3"
        python.parent.mkdir()
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "API", "DATA"))
        }
        self.env |= {k: str(v) for k, v in self.files.items()}
        self.env |= {"HOME": str(home), "RUNNER_TRACKING_ID": "github_test", "CI": "true"}
        self.env |= {"API_PORT": str(free_port()), "PATH": f"{python.parent}:{os.environ['PATH']}"}

    def environment(self) -> dict[str, str]:
        """Return the environment of a step, with what former steps wrote into GITHUB_ENV."""
        lines = self.files["GITHUB_ENV"].read_text().splitlines()
        return self.env | dict(line.split("=", 1) for line in lines)

    def start_api(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run start_api.sh of the release."""
        env = self.environment()
        command = [Path(env["RELEASE"]) / "start_api.sh", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    def run(self, step: dict) -> str:
        env = self.environment()
        for name, value in step.get("env", {}).items():
            for variable, content in self.variables.items():
                value = value.replace("${{ vars." + variable + " }}", content)
            assert "${{" not in value
            env[name] = value
        assert "${{" not in step["run"], "values go through the environment, not into the script"
        folder = env["RELEASE"] if "working-directory" in step else self.clone
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{step['name']}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def runner(tmp_path):
    clone, home = tmp_path / "clone", tmp_path / "home"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    config = yaml.safe_load((clone / "src" / "config.yaml").read_text())
    config["model_parameters"] |= SMALL | {"sets": SETS[:2]}
    (clone / "src" / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(Project.source / NETWORK, clone / "src" / NETWORK)
    git = ["git", "-C", clone, "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "commit", "-qam", "small models"], check=True)
    home.mkdir()
    data = draw_folders(tmp_path / "data", train=40, test=8)
    made = Runner(
        clone,
        home,
        {"MLFLOW_TRACKING_URI": "", "DATA_PATH": str(data), "JOBS_PATH": "", "LINE_PATH": ""},
    )
    yield made
    made.start_api("stop")


def test_steps_of_the_workflow_pass_in_order_in_a_clean_clone(workflow, runner):
    printed = {step["name"]: runner.run(step) for step in steps(workflow)}
    assert "prod is version 1" in printed["Evaluate"]
    assert "The API is running" in printed["Restart the API"]
    summary = runner.files["GITHUB_STEP_SUMMARY"].read_text()
    for name in ("one", "two"):
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
    commit = subprocess.run(
        ["git", "-C", runner.clone, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    (run, *_) = MlflowClient(f"sqlite:///{runner.kept}/mlflow.db").search_runs(["1"])
    assert run.data.tags["mlflow.source.git.commit"] == commit
    # Nothing that must outlive the next checkout lies in the work tree.
    names = {path.name for path in runner.kept.iterdir()}
    assert names == {"mlflow.db", "mlruns", "jobs", "line", "releases", "venvs", "cache"}
    clean = ["git", "-C", runner.clone, "clean", "-ffdxn"]
    assert subprocess.run(clean, capture_output=True, text=True).stdout == ""
    assert runner.start_api("status").returncode == 0
