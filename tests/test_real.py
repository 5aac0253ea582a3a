"""The pipeline and the audit on some of the real castings."""

import shutil
from dataclasses import asdict, replace

import pytest

import truth
from conftest import NETWORK, ROOT, Project
from defect_detection import settings
from defect_detection.dataset import audit
from defect_detection.dataset.folder import DataFolder
from defect_detection.runtime.preprocessing import ImageFormat

pytestmark = pytest.mark.real


@pytest.fixture
def every(tmp_path):
    """Links every n-th of the real castings, where they are."""
    if not truth.CASTINGS.is_dir():
        pytest.skip("the real castings are not here (../shared/data/casting)")
    return lambda n: truth.link(sorted(truth.photographs())[::n], tmp_path / "castings")


def test_photographs_of_castings_are_found(every):
    castings = every(8)
    found = audit.inspect(DataFolder(castings, Project.cache), ImageFormat(64, 64))
    precision, recall = truth.precision_and_recall(found.groups())
    assert precision >= 0.98
    assert recall >= 0.95
    assert sum(map(len, found.leaked.values())) > 0.9 * sum(found.pictures["test"].values())


@pytest.mark.long
def test_castings_are_read_learned_and_judged(every, tmp_path):
    castings = every(12)
    project = Project(tmp_path / "project")
    shutil.copy(ROOT / "src" / NETWORK, project.root / "src" / NETWORK)
    # The project's own model, smaller: the defects of real castings are lost at 64 pixels.
    own = settings.read_yaml(settings.CONFIG_FILE, settings.Config).model_parameters
    one = replace(own, sets=own.sets[:1], variants=300, image_size=(128, 128))
    project.configure(lambda config: config.update(model_parameters=asdict(one)))
    assert "come from a photograph that is also in training" in project.succeed(
        "src/train.py", "--data", castings
    )
    printed = project.succeed("src/evaluation.py", "--data", castings)
    assert float(printed.split("accuracy ")[1].split(",")[0]) > 0.7
