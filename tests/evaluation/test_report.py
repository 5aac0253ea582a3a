"""The report: what it says, what it needs, how it comes out in a browser."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from conftest import Project, draw_folders
from defect_detection import settings
from defect_detection.dataset import split as splits
from defect_detection.dataset.folder import DataFolder
from defect_detection.evaluation import metrics, report
from defect_detection.evaluation.metrics import Comparison, Paired, Rate
from defect_detection.evaluation.release import Registration, Release
from defect_detection.evaluation.report import Origin
from defect_detection.evaluation.result import evaluate
from defect_detection.evaluation.robustness import Disturbed, Repeatability, Robustness
from defect_detection.registry.versions import Version
from defect_detection.runtime import heatmap
from defect_detection.runtime.decision import OperatingPoint
from defect_detection.runtime.preprocessing import ImageFormat

TAKES = ImageFormat(32, 32)
POINT = OperatingPoint(0.3, 0.2, 0.45)
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)


class Known:
    """A model whose probabilities and maps are known: both classes overlap."""

    point = POINT
    takes = TAKES
    full_evidence = None
    litert_sha256 = ""

    def __init__(self, labels: np.ndarray):
        rng = np.random.default_rng(0)
        log_odds = rng.normal(0, 1.5, len(labels)) + np.where(labels == 1, 0.5, -2)
        self.probabilities = (1 / (1 + np.exp(-log_odds))).astype(np.float32)

    def examine(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        maps = np.random.default_rng(1).random((len(pictures), 8, 8)).astype(np.float32)
        return self.probabilities, maps

    def ood_reasons(self, pictures: np.ndarray) -> list[str]:
        return ["blurred", "noisy", *[""] * (len(pictures) - 2)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """An evaluation of drawn images."""
    data = draw_folders(tmp_path_factory.mktemp("reported") / "data", train=4, test=60)
    split = splits.load(DataFolder(data, Project.cache), TAKES)
    pairs = 1000 + np.arange(len(split.testing)) // 2  # two images of each photograph
    split = replace(split, testing=replace(split.testing, photographs=pairs))
    return evaluate(Known(split.testing.labels), split)


def test_names_that_are_not_utf8_do_not_end_the_report(drawn):
    """Only the text is tried: the files have their own names."""
    old = drawn.split.testing
    paths = tuple(os.fsdecode(f"{path}\n".encode() + b"\xff") for path in old.paths)
    testing = replace(old, paths=paths)
    named = replace(drawn, split=replace(drawn.split, testing=testing))
    rows = list(csv.DictReader(io.StringIO(report.table(named).encode().decode(), newline="")))
    assert rows[3]["path"] == f"{old.paths[3]}\n\\udcff"
    read = {testing.file(row): old.file(row) for row in range(len(old))}
    for path in read:
        path.symlink_to(read[path])
    try:
        page = write(named)
    finally:
        for path in read:
            path.unlink()
    assert page.encode()
    assert "part_0" in page and r"jpeg\n\xff" in page


COMPARED = Comparison(Paired(12, 3, 120), Paired(4, 2, 90))
GREY = np.full((64, 64, 1), 100, np.uint8)
CHAMPION = Version("Production_Reg", 3, 0.9)
RELEASED = Release((), ())


def write(drawn, asked=0.02, **changes) -> str:
    registration = Registration(
        Version("Production_Reg", 4, 0.8), CHAMPION, COMPARED, RELEASED, "Registered <so>", True
    )
    robustness = Robustness(
        120,
        [Disturbed("darker: 70% of the light", 0.75, Rate(3, 60), Rate(4, 60))],
        Repeatability(Rate(7, 120), Rate(5, 120)),
    )
    origin = changes.pop("origin", Origin("0123456789abcdef", "fedcba987654"))
    decisions = replace(settings.read_config().decisions, max_escape_rate=asked)
    line = changes.pop("line", Rate(0, 0))
    registration = replace(registration, **changes)
    return report.html(drawn, registration, robustness, decisions, origin, line)


@pytest.fixture(scope="module")
def page(drawn) -> str:
    return write(drawn)


def text(page: str) -> str:
    """Return the words of a page, without style and script."""
    bare = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def test_verdict_comes_first_and_says_what_became_of_the_model(drawn, page):
    words = text(page)
    rates = drawn.error_rates
    headline = (
        f"Released and in production: on the test images {rates.escapes.share:.1%} of the "
        f"defective parts pass, {rates.overkill.share:.1%} of the good parts are rejected"
    )
    assert headline in words[:300]
    assert "Production_Reg version 4 has the alias prod" in words[:400]
    assert "Registered &lt;so&gt;." in words  # escaped, like all that comes from outside
    assert "Against version 3, which had the alias prod, on the same images: a difference" in words
    words = text(write(drawn, in_production=False, champion=None, comparison=None))
    assert "Released and not in production" in words[:200]
    assert "Production_Reg version 4 does not have the alias prod" in words[:400]
    assert "There was no version in production to compare it with." in words
    assert "Champion and challenger" not in words
    words = text(write(drawn, comparison=None))
    assert "Version 3, which had the alias prod, was not compared." in words


def test_figures_are_those_of_the_evaluation_with_their_bounds(drawn, page):
    words = text(page)
    for errors in (drawn.error_rates, drawn.photograph_error_rates):
        for name in ("escapes", "overkill", "reviewed", "escapes_past_review"):
            rate = getattr(errors, name)
            low, high = rate.bounds
            assert f"{rate.count} of {rate.of}, {low:.1%} to {high:.1%}" in words
    assert f"ROC AUC {drawn.scores.roc_auc:.4f}" in words
    assert "images +7.50% +0.48% to +11.42% 12 3 0.0352" in words
    assert "photographs +2.22% -3.70% to +6.09% 4 2 0.688" in words
    assert "darker: 70% of the light 75.0% 5.0% 6.7%" in words
    assert "the verdict of 7 of 120 (5.8%" in words and "5 of them outside the band" in words


@pytest.mark.parametrize(
    ("asked", "expected"), [(0.0, "not kept"), (0.9, "kept"), (None, "too few photographs")]
)
def test_largest_escape_rate_is_judged_as_far_as_the_bounds_tell(drawn, asked, expected):
    if asked is None:
        asked = drawn.photograph_error_rates.escapes.share
    assert re.search(rf"by photograph [^:]*: {expected}", text(write(drawn, asked)), re.I)


def test_gallery_shows_the_worst_mistake_of_each_photograph(drawn, page):
    evaluated, testing = drawn, drawn.split.testing
    mistakes = page[: page.index('<section id="right">')]
    shown = re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="([^"]+)">', mistakes)
    assert len(shown) % 2 == 0
    distance = np.abs(evaluated.probabilities - POINT.threshold)
    rejected = evaluated.probabilities >= POINT.threshold
    expected, more = [], 0
    for wrong in ((evaluated.labels == 1) & ~rejected, (evaluated.labels == 0) & rejected):
        worst = {}
        for row in sorted(np.flatnonzero(wrong), key=lambda row: -distance[row]):
            worst.setdefault(testing.photographs[row], row)
        kept = list(worst.values())[: report.MISTAKES_SHOWN]
        expected += [testing.paths[row] for row in kept]
        shared = testing.photographs[wrong].tolist()
        more += sum(shared.count(testing.photographs[row]) == 2 for row in kept)
    assert shown[::2] == expected
    assert shown[1::2] == [f"evidence of a defect in {path}" for path in expected]
    assert page.count(", 1 more of this photograph") == more > 0


def test_heatmap_is_strongest_where_the_evidence_is():
    evidence = np.zeros((8, 8), np.float32)
    evidence[1, 6] = 2
    glowing = np.asarray(heatmap.draw(GREY, evidence, TAKES, None)).astype(int)
    row, column = np.unravel_index((glowing[..., 0] - glowing[..., 2]).argmax(), (64, 64))
    assert (row // 8, column // 8) == (1, 6)
    assert (glowing[40:, :30] == 100).all()


def test_evidence_beyond_all_bounds_glows_like_the_most():
    evidence = np.zeros((8, 8), np.float32)
    evidence[1, 6] = np.inf
    endless = np.asarray(heatmap.draw(GREY, evidence, TAKES, None))
    evidence[1, 6] = 88
    most = np.asarray(heatmap.draw(GREY, evidence, TAKES, None))
    np.testing.assert_array_equal(endless, most)


class References(HTMLParser):
    """Collects what a page refers to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.found.append(value)


def test_page_refers_to_nothing_outside_itself(page):
    references = References()
    references.feed(page)
    assert references.found
    assert {value.split(":")[0][:1] for value in references.found} <= {"d", "#"}
    assert all(value.startswith(("data:", "#")) for value in references.found)
    assert not re.search(r"@import|url\((?!#)", page)


def test_leakage_is_said_beside_the_figures_that_it_flatters(drawn):
    split = drawn.split

    def trained_on(photographs):
        training = replace(split.training, photographs=photographs)
        return replace(drawn, split=replace(split, training=training))

    right = metrics.is_right(drawn.labels, drawn.probabilities, 0.5)
    of = split.testing.photographs
    better = np.setdiff1d(of, of[~right])[:5]  # all of their images are judged rightly
    worse = np.unique(of[~right])[:20]
    assert "These figures are optimistic." in text(write(trained_on(better)))
    assert "optimistic" not in text(write(trained_on(np.array([-1]))))
    assert "optimistic" not in text(write(trained_on(worse)))  # nor does it, if those are worse
    words = text(write(trained_on(of)))  # none is unseen
    assert "These figures may be optimistic." in words
    assert "100.0% of these images show photographs that the model learned from." in words[:400]
    # What memory may explain has no green light.
    assert '<span class="light warn"' in write(trained_on(of))
    assert '<span class="light good"' in write(trained_on(np.array([-1])))
    # One photograph that is unseen and judged wrongly says nothing about the others.
    assert "These figures may be optimistic." in text(write(trained_on(of[of != worse[0]])))


def test_what_is_not_released_is_said_first_with_what_to_try(drawn):
    release = Release(("48 of 50 good parts are rejected",), ("more photographs of ok_front",))
    page = write(drawn, release=release, in_production=False)
    assert "Not released: 48 of 50 good parts are rejected." in text(page)[:300]
    assert "What to try: more photographs of ok_front" in text(page)
    assert '<span class="light bad"' in page


def test_without_defects_escapes_are_said_to_be_unknown(drawn):
    good = np.flatnonzero(drawn.labels == 0)
    testing = drawn.split.testing
    testing = replace(
        testing,
        images=testing.images[good],
        labels=testing.labels[good],
        photographs=testing.photographs[good],
        paths=tuple(testing.paths[row] for row in good),
        contents=tuple(testing.contents[row] for row in good),
    )
    alone = replace(
        drawn,
        split=replace(drawn.split, testing=testing),
        probabilities=drawn.probabilities[good],
        maps=drawn.maps[good],
    )
    words = text(write(alone, comparison=None))
    assert "Escapes are not known , since there is no defect among the test images." in words
    assert "on the test images nothing is known of escapes," in words[:300]
    assert "nan" not in re.findall(r"[a-z]+", words.lower())


def test_examples_judged_rightly_are_shown_of_both_classes(drawn, page):
    right = page[page.index('<section id="right">') :]
    shown = re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="(test/[^"]+)">', right)
    assert len(shown) == 2 * report.RIGHT_SHOWN
    rejected = dict(zip(drawn.split.testing.paths, drawn.probabilities >= 0.3, strict=True))
    assert all(rejected[path] == ("def_front" in path) for path in shown)


def test_training_is_shown_with_its_curves_and_parameters(drawn):
    curves = {name: [0.5, 0.4] for name in ("loss", "val_loss", "accuracy", "val_accuracy")}
    origin = Origin("run", "commit", {"learning_rate": "0.01"}, curves)
    words = text(write(drawn, origin=origin))
    assert "How it was trained" in words and "learning_rate 0.01" in words
    assert "best epoch" in words


def test_table_has_a_row_for_every_image(drawn):
    rows = list(csv.DictReader(report.table(drawn).splitlines()))
    assert [row["path"] for row in rows] == list(drawn.split.testing.paths)
    assert [row["class"] == "def_front" for row in rows] == (drawn.labels == 1).tolist()
    assert [row["verdict"] == "defect" for row in rows] == (drawn.probabilities >= 0.3).tolist()


def test_names_that_spreadsheets_would_compute_are_defused(drawn):
    testing = drawn.split.testing
    names = ("=1+1.png", *testing.paths[1:])
    renamed = replace(drawn, split=replace(drawn.split, testing=replace(testing, paths=names)))
    assert report.table(renamed).splitlines()[1].startswith("'=1+1.png,")


@pytest.fixture(scope="module")
def browsed(page, tmp_path_factory):
    """The page as the browser has it, what its console said and what it asked for."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run(
        [*command, (folder / "report.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, (folder / "net.json").read_text()


def test_browser_shows_no_error_and_asks_no_other_host(browsed):
    _, said, asked = browsed
    assert "CONSOLE" not in said
    events = [event.get("params", {}) for event in json.loads(asked)["events"]]
    remote = [e for e in events if str(e.get("url")).startswith(("http", "ws"))]
    # The browser itself asks for its maker's hosts; a page from a file asks as that file.
    assert not [e["url"] for e in remote if "file://" in json.dumps(e)]


def test_calculator_finds_the_cheapest_threshold(drawn, browsed):
    table = re.search(r'<tbody id="costs">(.*?)</tbody>', browsed[0], re.S).group(1)
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in table.split("</tr>")[:-1]]
    assert [row[0] for row in rows] == [
        "cheapest with the escapes asked for",
        "the model’s",
        "the model’s, a person looks at its band",
        "plain",
        "ship all",
        "a person looks at all",
    ]

    def cost(threshold: float) -> float:
        point = OperatingPoint(threshold, threshold, threshold)
        errors = metrics.error_rates(drawn.labels, drawn.probabilities, point)
        return 20 * errors.escapes.share * 100 + 980 * errors.overkill.share * 5

    def escapes(threshold: float) -> float:
        return (drawn.probabilities[drawn.labels == 1] < threshold).mean()

    thresholds = [t for t in [*drawn.probabilities.tolist(), 1.1] if escapes(t) <= 0.02]
    cheapest = min(map(cost, thresholds))
    assert [float(row[4]) for row in rows[4:]] == [20 * 100, 1000]
    at_band = metrics.error_rates(drawn.labels, drawn.probabilities, POINT)
    seen = POINT.needs_review(drawn.probabilities)
    looks = 20 * seen[drawn.labels == 1].mean() + 980 * seen[drawn.labels == 0].mean()
    mistakes = 20 * 100 * at_band.escapes_past_review.share
    mistakes += 980 * 5 * at_band.overkill_past_review.share
    assert seen.any() and float(rows[2][4]) == pytest.approx(mistakes + looks, abs=0.006)
    assert float(rows[0][4]) == pytest.approx(cheapest, abs=0.006)
    assert float(rows[1][4]) == pytest.approx(cost(POINT.threshold), abs=0.006)
    assert float(rows[3][4]) == pytest.approx(cost(0.5), abs=0.006)
    assert cost(float(rows[0][1])) == pytest.approx(cheapest)
    assert json.loads(re.search(r"const scores = (.*);", browsed[0]).group(1))["threshold"] == 0.3
