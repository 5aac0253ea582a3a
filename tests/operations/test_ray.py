"""Training and judging on a Ray cluster of two machines: what one machine gives."""

import os

import pytest

from conftest import SETS, Project, draw_folders

ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")


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
