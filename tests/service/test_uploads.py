"""Whatever is sent: an answer that is no error of the server, and no trace outside the log.

The bar's ten thousand uploads: COPIES=10000 python -m pytest tests/service/test_uploads.py -s
"""

import http.client
import io
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import Project, Server, draw_part, wait_for
from defect_detection.registry import store as stores
from defect_detection.registry import versions

pytestmark = pytest.mark.slow

UPLOADS = int(os.environ.get("COPIES", "400"))
AT_ONCE = 4
NAMES = (
    *("part.jpeg", "../../../evil.jpeg", "/etc/passwd", "..\\..\\evil.jpeg", "a/b/c.png", "."),
    *("", "nul", "a" * 250, "\\x00.jpeg", "%2e%2e%2fevil", "é\u202e.jpeg", "=1+1.csv", "a;b.jpeg"),
)
JOB = """
import os, sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from defect_detection.service.reporter import Reporter
Reporter(dict(os.environ)).result("Testing_Reg", 2, 0.55)
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory, _store, logged_model):
    """The real server with a small model in production."""
    root = tmp_path_factory.mktemp("uploads")
    project = Project(root / "project")
    project.configure(lambda config: config.update(product="uploads"))
    (project.root / "re_train" / "re_train.py").write_text(JOB)
    (project.root / ".env").write_text(f"MLFLOW_TRACKING_URI={_store}\n")
    with stores.connected(_store):
        run_id, uri = logged_model
        tags = {versions.RELEASED: "true"}
        name = "Production_Reg-uploads"
        versions.set_alias(versions.register(uri, run_id, 0.9, "", name, tags), "prod")
    server = Server(project, root / "api.log")
    server.start()
    wait_for(lambda: server.call("GET", "/health")[1]["model"])
    yield server
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)


def images(rng: np.random.Generator) -> list[bytes]:
    """Return sound images of all formats, to be spoilt."""
    found = []
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"):
        file = io.BytesIO()
        draw_part(rng, defect=True).save(file, kind)
        found.append(file.getvalue())
    return found


def with_size(png: bytes, width: int, height: int) -> bytes:
    """Return a PNG whose header says another size, with the right checksum."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def spoilt(rng: np.random.Generator, sound: list[bytes]) -> bytes:
    """Return something that looks like an image, more or less."""
    image = sound[rng.integers(len(sound))]
    match int(rng.integers(9)):
        case 0:
            return image[: rng.integers(len(image))]
        case 1:
            changed = bytearray(image)
            for place in rng.integers(0, len(changed), rng.integers(1, 30)):
                changed[place] = rng.integers(256)
            return bytes(changed)
        case 2:
            return with_size(sound[1], *map(int, rng.integers(0, 2**31, 2)))
        case 3:
            return image + b"<html><script>alert(1)</script>" + rng.bytes(50)
        case 4:
            return b"GIF89a/*" + image + b"*/=1;alert(1)"
        case 5:
            return b"%PDF-1.7\n" + image
        case 6:
            start = int(rng.integers(len(image)))
            return image[:start] + rng.bytes(int(rng.integers(2000))) + image[start:]
        case 7:
            return rng.bytes(int(rng.integers(3000)))
        case _:
            return image


def call(rng: np.random.Generator, sound: list[bytes]) -> tuple[str, bytes, dict]:
    """Return address, body and headers of a call, most of them malformed in some way."""
    content, name = spoilt(rng, sound), NAMES[rng.integers(len(NAMES))]
    address = "/predict" + ("?heatmap=1" if rng.random() < 0.1 else "")
    if rng.random() < 0.4:
        kinds = ("image/jpeg", "image/png", "text/html", "application/json", "")
        return address, content, {"Content-Type": kinds[rng.integers(len(kinds))]}
    parts = b""
    for _ in range(int(rng.integers(1, 4))):
        said = f'form-data; name="image"; filename="{name}"'.encode(errors="replace")
        parts += b"--edge\r\nContent-Disposition: " + said + b"\r\n\r\n" + content + b"\r\n"
    body = parts + b"--edge--\r\n"
    if rng.random() < 0.1:
        body = body[: rng.integers(len(body))]
    return address, body, {"Content-Type": "multipart/form-data; boundary=edge"}


def send(port: int, seed: int) -> tuple[int, float]:
    rng = np.random.default_rng(seed)
    address, body, headers = call(rng, images(rng))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    started = time.perf_counter()
    try:
        connection.request("POST", address, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, time.perf_counter() - started
    finally:
        connection.close()


def memory(pid: int) -> float:
    """Return the memory of a process in MB; skip the test where it is not told."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    return int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) / 1024


def files(api: Server) -> set[Path]:
    """Return all files of the project and beside it, but those of the log."""
    root = api.project.root.parent
    ours = (api.project.root / ".line", api.project.root / ".cache")
    return {
        path
        for path in root.rglob("*")
        if "__pycache__" not in path.parts and not path.is_relative_to(ours[0])
    }


def test_no_upload_is_an_error_of_the_server_or_leaves_a_trace(api):
    for seed in range(100):  # so that what is loaded once is loaded
        send(api.port, 10**9 + seed)
    before, used = files(api), memory(api.process.pid)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda seed: send(api.port, seed), range(UPLOADS)))
    statuses = sorted({status for status, _ in answers})
    longest = max(seconds for _, seconds in answers)
    grown = memory(api.process.pid) - used
    print({"uploads": UPLOADS, "statuses": statuses, "longest_s": round(longest, 2)}, end=" ")
    print({"memory_MB": round(used), "grown_MB": round(grown, 1)})
    assert set(statuses) <= {200, 400, 413, 422}
    assert longest < 10
    assert files(api) == before
    assert grown < 40
    assert api.call("GET", "/health")[1]["trouble"] == ""
    assert "Traceback" not in api.log.read_text()


def test_api_keeps_to_its_openapi_document(api):
    pytest.importorskip("schemathesis", reason="needs 'pip install -r requirements-tests.txt'")
    command = [sys.executable, "-m", "schemathesis.cli", "run"]
    command += [f"http://127.0.0.1:{api.port}/openapi.json", "--no-color", "--seed", "1"]
    command += ["--max-examples", str(max(10, UPLOADS // 40)), "--request-timeout", "60"]
    checks = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    checks += ["response_schema_conformance"]
    command += ["--checks", ",".join(checks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=api.log.parent)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
