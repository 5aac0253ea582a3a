"""The Postman collection, run by newman against the API and real retrainings."""

import shutil
import subprocess

import pytest

from conftest import ROOT, Server
from defect_detection.service.verdicts import Verdicts

COLLECTION = ROOT / "tests" / "postman" / "defect-detection.postman_collection.json"

pytestmark = pytest.mark.skipif(
    shutil.which("newman") is None, reason="newman is not installed (npm install -g newman)"
)


def test_every_request_of_the_collection_gets_the_answer_it_checks(project, learnable, tmp_path):
    project.data.symlink_to(learnable)
    project.make_store()
    project.configure_retraining(image_size=[64, 64], epochs=4, learning_rate=0.01)
    shutil.copy(learnable / "test" / "def_front" / "part_000.jpeg", tmp_path / "part.jpeg")
    server = Server(project, tmp_path / "api.log")
    server.start()
    try:
        base = f"base=http://127.0.0.1:{server.port}"
        done = subprocess.run(
            ["newman", "run", COLLECTION, "--env-var", base, "--delay-request", "250"]
            + ["--working-dir", tmp_path],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        verdicts = Verdicts(project.root / ".line", ["06:00"]).newest(9)
        assert "part.jpeg" in [one.name for one in verdicts]  # a model was served
    finally:
        server.process.terminate()
        server.process.wait(20)
