"""The model as MLflow's python_function, from a process that knows nothing of the project."""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from conftest import draw_part, encoded, free_port, wait_for
from defect_detection.registry import versions
from defect_detection.runtime.pyfunc import COLUMN

NAME = "Served_Reg"
ROWS = ["verdict", "probability", "review", "reason"]


def table(images: list[bytes]) -> pd.DataFrame:
    return pd.DataFrame({COLUMN: images})


@pytest.fixture(scope="module")
def part() -> bytes:
    return encoded(draw_part(np.random.default_rng(2), defect=True))


def test_pictures_are_judged_and_a_broken_one_is_a_row(model_folder, part):
    black = encoded(draw_part(np.random.default_rng(0), False).point(lambda value: 0))
    loaded = mlflow.pyfunc.load_model(str(model_folder))
    good, dark, broken = loaded.predict(table([part, black, part[:500]]))
    assert list(good) == list(dark) == list(broken) == ROWS
    assert good["verdict"] in ("defect", "ok") and 0 <= good["probability"] <= 1
    assert (dark["verdict"], dark["reason"], dark["review"]) == ("unknown", "too dark", True)
    assert (broken["verdict"], broken["probability"]) == ("error", None)
    assert "cannot be decoded" in broken["reason"]


def test_saved_model_brings_all_that_it_imports(model_folder, part, tmp_path):
    (tmp_path / "part.jpeg").write_bytes(part)
    program = (
        "import sys, mlflow, pandas;"
        f"model = mlflow.pyfunc.load_model({str(model_folder)!r});"
        "rows = model.predict(pandas.DataFrame({'picture': [open('part.jpeg', 'rb').read()]}));"
        "print(rows[0]['verdict'], sys.modules['defect_detection'].__file__, "
        "'tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    verdict, file, tensorflow = done.stdout.split()
    assert verdict in ("defect", "ok", "unknown")
    assert file == str(model_folder / "code" / "defect_detection" / "__init__.py")
    assert tensorflow == "False"


def test_mlflow_serves_base64_pictures_of_the_model_behind_prod(
    store, logged_model, model_folder, part, tmp_path
):
    run_id, uri = logged_model
    version = versions.register(uri, run_id, 0.9, "", NAME, {})
    versions.set_alias(version, versions.PRODUCTION_ALIAS)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@prod"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    activated = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow runs uvicorn
    environment = os.environ | {"PATH": activated, "MLFLOW_TRACKING_URI": store}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    picture = base64.b64encode(part).decode()
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            urllib.request.urlopen(f"{url}/ping", timeout=5).close()
            return True
        except OSError:
            time.sleep(0.2)
            return False

    def ask(body: object) -> list[dict]:
        request = urllib.request.Request(
            f"{url}/invocations",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["predictions"]

    try:
        wait_for(answers)
        expected = mlflow.pyfunc.load_model(str(model_folder)).predict(table([part]))
        assert ask({"dataframe_split": {"columns": ["picture"], "data": [[picture]]}}) == expected
        assert ask({"dataframe_records": [{"picture": picture}] * 3}) == expected * 3
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask({"dataframe_records": [{"photo": picture}]})
        assert refused.value.code == 400
        refused.value.close()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait(20)
