"""Training and judging on a Ray cluster of two machines: what one machine gives."""

import json
import os
import shutil
from pathlib import Path

import pytest
from pyarrow import parquet

from conftest import SETS, Project, draw_folders

ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")

# Of Ray's own processes and sockets.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def address():
    """The address of a cluster of two nodes, of one core each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    yield made.address
    made.shutdown()


@pytest.fixture
def training(project: Project) -> Project:
    draw_folders(project.data, train=40, test=8)
    project.configure_sets(*SETS[:2])
    project.make_store()
    return project


def test_sets_give_the_same_figures_on_a_cluster(training: Project, address: str):
    here = training.succeed("src/train.py")
    there = training.succeed("src/train.py", "--ray", address)
    print(here, there)


def rows_of(folder: Path) -> dict[str, dict]:
    found = parquet.read_table(folder).to_pylist()
    assert len({row["path"] for row in found}) == len(found)
    return {row["path"]: row for row in found}


def test_verdicts_are_those_of_one_machine_and_a_run_is_resumed(
    project: Project, address: str, model_folder: Path, tmp_path: Path
):
    images = draw_folders(tmp_path / "images", train=30, test=3)
    (images / "broken.jpeg").write_bytes(b"no image")
    (images / "notes.txt").write_text("no image either")
    call = ["src/inference.py", images, "--model", model_folder]
    project.fail(*call, "--jsonl", tmp_path / "rows.jsonl")
    here = {row["path"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
    out = tmp_path / "rows"
    said = project.fail(*call, "--ray", address, "--parquet", out)
    assert "1 of 67 images cannot be read" in said
    assert rows_of(out) == here

    (images / "broken.jpeg").unlink()
    torn = out / "torn.parquet"
    torn.write_bytes(next(out.glob("*.parquet")).read_bytes()[:-9])
    some = next(images.rglob("part_000.jpeg"))
    new = Path(shutil.copy(some, images / "new.jpeg"))
    done = project.run(*call, "--ray", address, "--parquet", out)
    assert done.returncode == 0, done.stderr
    assert "torn.parquet was not written completely" in done.stderr
    assert "66 of 67 images have a row" in done.stderr
    after = rows_of(out)
    assert after.pop(str(new))["verdict"] == here[str(some)]["verdict"]
    assert after == {path: row for path, row in here.items() if row["verdict"] != "error"}
    assert not torn.exists()
