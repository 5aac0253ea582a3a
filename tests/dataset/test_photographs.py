"""Which images were made from one photograph."""

import hashlib
import logging
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import kinds
import sample
from conftest import draw_part
from defect_detection import PipelineError
from defect_detection.dataset import alignment, photograph_cache, photographs
from drawings import DESIGNS, encoded, photograph, variant

Groups = dict[str, int]


@pytest.fixture
def find(tmp_path) -> Callable[[dict[str, np.ndarray]], Groups]:
    """Group images by name; each is written as a JPEG file."""

    def one(pictures: dict[str, np.ndarray]) -> Groups:
        names = {}
        for name, pixels in pictures.items():
            path = tmp_path / "pictures" / f"{name}.jpeg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded(pixels))
            names[hashlib.sha256(path.read_bytes()).hexdigest()] = path
        found = photographs.find(names, tmp_path / "cache")
        return {path.stem: found[content] for content, path in names.items()}

    return one


@pytest.mark.parametrize("design", DESIGNS)
def test_variants_of_a_drawing_are_one_photograph_and_drawings_of_a_design_are_not(design, find):
    rng = np.random.default_rng(list(DESIGNS).index(design))
    pictures = {}
    for number in range(8):
        drawn = photograph(rng, design, (240, 240) if number % 2 else (200, 260))
        pictures[f"{number}-0"] = drawn
        for k in range(1, 5):
            pictures[f"{number}-{k}"] = variant(rng, drawn)
    groups = defaultdict(set)
    for name, group in find(pictures).items():
        groups[group].add(name.split("-")[0])
    assert sorted(map(sorted, groups.values())) == [[str(number)] for number in range(8)]


@pytest.mark.parametrize("kind", ["panel", "cap"])
def test_parts_that_are_alike_by_design_and_lie_alike_are_different_photographs(kind, find):
    """Lines, screws and print are the same; the surface and the noise are not."""
    pictures = {}
    for number in range(24):
        drawn = kinds.KINDS[kind](np.random.default_rng([7, number]), False)
        pictures[str(number)] = (
            drawn if drawn.ndim == 2 else cv2.cvtColor(drawn, cv2.COLOR_RGB2GRAY)
        )
    pictures["copy"] = np.clip(pictures["0"] * 1.05, 0, 255).astype(np.uint8)
    groups = find(pictures)
    assert groups.pop("copy") == groups["0"]
    assert len(set(groups.values())) == 24


@pytest.mark.parametrize(
    "change",
    [
        lambda p: np.rot90(p),
        lambda p: p[:, ::-1],
        lambda p: p[::-1],
        lambda p: turned(p, 37, 1),
        lambda p: turned(p, 0, 1.4),
        lambda p: turned(p, 0, 0.75),
        lambda p: np.roll(p, 20, axis=1),
        lambda p: (p * 0.6).astype(np.uint8),
        lambda p: np.clip(p * 1.2 + 20.0, 0, 255).astype(np.uint8),
        lambda p: cv2.imdecode(np.frombuffer(encoded(p, 40), np.uint8), 0),
        lambda p: cv2.resize(p, (480, 480)),
        lambda p: cv2.resize(p, (150, 150), interpolation=cv2.INTER_AREA),
    ],
    ids="quarter mirror flip turn zoom shrink shift dark bright jpeg larger smaller".split(),
)
def test_each_kind_of_copy_is_found(change, find):
    drawn = photograph(np.random.default_rng(4), "bracket")
    found = find({"a": drawn, "b": np.ascontiguousarray(change(drawn))})
    assert found["a"] == found["b"]


def turned(picture: np.ndarray, degrees: float, zoom: float) -> np.ndarray:
    height, width = picture.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, zoom)
    return cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REFLECT)


def test_good_parts_that_differ_by_pose_and_noise_only_are_not_one_photograph(find):
    rng = np.random.default_rng(0)
    drawn = {f"disc{i}": np.asarray(draw_part(rng, defect=False)) for i in range(25)}
    drawn |= {f"casting{i}": np.asarray(sample.draw(rng, None)) for i in range(25)}
    assert len(set(find(drawn).values())) == 50


def test_spot_on_one_of_two_copies_makes_two_photographs(find):
    drawn = photograph(np.random.default_rng(4), "plate")
    spotted = drawn.copy()
    cv2.circle(spotted, (130, 110), 5, 20, -1)
    found = find({"a": drawn, "b": spotted})
    assert found["a"] != found["b"]


def test_pictures_without_anything_on_them_are_photographs_of_their_own(find):
    found = find({f"{tone}": np.full((100, 120), tone, np.uint8) for tone in (0, 128, 255)})
    assert len(set(found.values())) == 3


def test_one_picture_and_none(find):
    assert find({"only": photograph(np.random.default_rng(0), "gear")}) == {"only": 0}
    assert find({}) == {}


@pytest.fixture
def three(find):
    rng = np.random.default_rng(3)
    first, second, third = (photograph(rng, "bracket") for _ in range(3))
    return {"a": first, "a2": variant(rng, first), "b": second, "b2": variant(rng, second)}, {
        "c": third,
        "a3": variant(rng, first),
    }


def test_second_call_computes_nothing_and_a_new_picture_only_its_own(find, three, monkeypatch):
    described, compared = [], []
    describe, compare = photograph_cache.describe, photograph_cache.compare
    monkeypatch.setattr(photograph_cache, "describe", lambda p: described.append(p) or describe(p))
    monkeypatch.setattr(photograph_cache, "compare", lambda *p: compared.append(p) or compare(*p))
    known, new = three
    first = find(known)
    assert len(described) == 4
    described.clear()
    compared.clear()
    assert find(known) == first
    assert (described, compared) == ([], [])
    both = find(known | new)
    assert len(described) == 2
    assert 0 < len(compared) <= 2 * photographs.COMPARISONS
    assert both["a"] == both["a2"] == both["a3"] and both["b"] == both["b2"]
    assert len({both["a"], both["b"], both["c"]}) == 3


def test_second_call_gives_each_photograph_its_number_again(find):
    # What is held back for validation goes by these numbers.
    rng = np.random.default_rng(3)
    pictures = {}
    for number in range(6):
        drawn = photograph(rng, "bracket")
        for k in range(4):
            pictures[f"{number}-{k}"] = variant(rng, drawn)
    assert find(pictures) == find(pictures)


def test_second_call_compares_nothing_where_most_pairs_were_never_compared(find, monkeypatch):
    rng = np.random.default_rng(5)
    known = {f"{i}": photograph(rng, "gear", (120, 120)) for i in range(16)}
    assert len(set(find(known).values())) == 16
    monkeypatch.setattr(photograph_cache, "compare", lambda *_: pytest.fail("compared again"))
    assert len(set(find(known).values())) == 16


def test_what_was_found_through_a_picture_stays_when_it_is_gone(find, monkeypatch):
    rng = np.random.default_rng(5)
    wide = photograph(rng, "gear", (150, 200))
    known = {f"{i}": photograph(rng, "gear", (150, 150)) for i in range(3)}

    def compare(*pair: alignment.Keypoints) -> alignment.Likeness:
        shapes = {one.pixels.shape for one in pair}
        return alignment.Likeness(1, 1, 1, 0) if len(shapes) == 2 else alignment.Likeness()

    monkeypatch.setattr(photograph_cache, "compare", compare)
    assert len(set(find(known | {"wide": wide}).values())) == 1
    monkeypatch.setattr(photograph_cache, "compare", lambda *_: pytest.fail("compared again"))
    assert len(set(find(known).values())) == 1


def test_pictures_that_were_searched_apart_are_searched_together(find):
    rng = np.random.default_rng(6)
    drawn = [photograph(rng, "bracket") for _ in range(3)]
    one = {f"a{i}": picture for i, picture in enumerate(drawn)}
    other = {f"b{i}": variant(rng, picture) for i, picture in enumerate(drawn)}
    assert len(set(find(one).values())) == len(set(find(other).values())) == 3
    both = find(one | other)
    assert [both[f"a{i}"] for i in range(3)] == [both[f"b{i}"] for i in range(3)]
    assert len(set(both.values())) == 3


def test_interrupted_search_is_finished_by_the_next(find, three, monkeypatch):
    known, _ = three
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(photograph_cache, "compare", interrupt)
        find(known)
    found = find(known)
    assert found["a"] == found["a2"] != found["b"] == found["b2"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_it_says_what_it_does_the_first_time_only(find, three, caplog):
    with caplog.at_level(logging.INFO):
        find(three[0])
        assert "Comparing 4 new images with 4" in caplog.text
        assert "2 photographs found in" in caplog.text
        caplog.clear()
        find(three[0])
    assert caplog.text == ""


def no_database(file: Path) -> None:
    file.write_bytes(b"no database at all" * 100)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_tables(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE features (digest TEXT)")


def another_join(file: Path) -> None:
    change(file, "UPDATE pairs SET same = 1")


def lost_pairs(file: Path) -> None:
    change(file, "DELETE FROM pairs WHERE same")


def another_search(file: Path) -> None:
    change(file, "UPDATE searches SET digests = digests || 'f'")


def text_that_is_none(file: Path) -> None:
    change(file, "UPDATE searches SET digests = CAST(x'ff00' AS TEXT)")


def change(file: Path, statement: str) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(statement)


def newer_version(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[47] = 9
    file.write_bytes(content)


DAMAGES = [
    no_database,
    newer_version,
    zeroed,
    cut,
    other_tables,
    another_join,
    lost_pairs,
    another_search,
]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*DAMAGES, text_that_is_none])
def test_damaged_cache_is_made_again_with_a_line(tmp_path, find, three, damage, caplog):
    expected = find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    damage(file)
    caplog.clear()
    assert find(three[0]) == expected
    assert caplog.text.count("photographs-3.sqlite was damaged") == 1
    assert "and is deleted: the images are compared again" in caplog.text
    caplog.clear()
    assert find(three[0]) == expected
    assert not caplog.text


COLUMNS = ("points", "descriptors", "hashes", "pixels")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "value"),
    [
        *((column, f"zeroblob(length({column}))") for column in COLUMNS),
        *(("hashes", value) for value in ("substr(hashes, 1, 8)", "NULL", "7", "'a'")),
        ("height", "7"),
    ],
)
def test_keypoints_that_a_disk_has_changed_are_noticed(
    tmp_path, find, three, column, value, caplog
):
    find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(f"UPDATE features SET {column} = {value}")
    found = find(three[0] | three[1])
    assert found["a"] == found["a2"] == found["a3"] != found["b"] == found["b2"] != found["c"]
    assert "was damaged" in caplog.text


def test_cache_that_says_it_may_not_be_written_is_made_again(tmp_path, find, three, caplog):
    find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[18] = 9  # as newer versions of SQLite might write it
    file.write_bytes(content)
    assert len(set(find(three[0] | three[1]).values())) == 3
    assert "was damaged (attempt to write a readonly database)" in caplog.text


def test_keypoints_under_the_digest_of_another_image_are_noticed(tmp_path, find, three):
    find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    with closing(sqlite3.connect(file)) as database, database:
        rows = [row for (row,) in database.execute("SELECT digest FROM features")]
        turn = {rows[i]: rows[i - 1] for i in range(4)}
        for old in rows:
            database.execute("UPDATE features SET digest = ? WHERE digest = ?", (f"_{old}", old))
        for old, new in turn.items():
            database.execute("UPDATE features SET digest = ? WHERE digest = ?", (new, f"_{old}"))
    found = find(three[0] | three[1])
    assert found["a"] == found["a2"] == found["a3"] != found["b"] == found["b2"] != found["c"]


@pytest.mark.slow
def test_any_damage_is_noticed_or_does_no_harm(tmp_path, find, three):
    """Blocks of the file are zeroed or changed, as disks and crashes do it."""
    find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    expected = find(three[0] | three[1])
    rng = np.random.default_rng(0)
    for number in range(8):
        damaged = bytearray(whole)
        size = int(rng.choice([1024, 8192]))
        start = int(rng.integers(0, len(whole) - size)) // size * size
        damaged[start : start + size] = bytes(size) if number % 2 else rng.bytes(size)
        file.write_bytes(damaged)
        assert find(three[0] | three[1]) == expected


def test_locked_cache_is_one_line_and_stays(tmp_path, find, three, monkeypatch):
    find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    connect = sqlite3.connect
    other = connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout: connect(path, timeout=0.1))
    with pytest.raises(PipelineError, match=r"locked\). If no other process uses it, delete it"):
        find(three[0])
    other.execute("COMMIT")
    other.close()
    assert file.exists()


def test_file_that_is_swapped_before_it_is_compared_is_not_kept(tmp_path, find, three):
    find(three[0])
    file = tmp_path / "pictures" / "b.jpeg"
    other = (tmp_path / "pictures" / "a.jpeg").read_bytes()
    digest = hashlib.sha256(b"another").hexdigest()
    for content in (other, None):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(PipelineError, match="b.jpeg was changed while the images were read"):
            photographs.find({digest: file}, tmp_path / "cache")
        file.touch()


def test_images_with_many_pixels_are_compared_if_they_are_allowed(tmp_path):
    Image.new("L", (100, 100), 90).save(tmp_path / "a.png")
    contents = {hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest(): tmp_path / "a.png"}
    with pytest.raises(PipelineError, match="max_megapixels"):
        photographs.find(contents, tmp_path / "cache", most_pixels=9999)
    assert list(photographs.find(contents, tmp_path / "cache", most_pixels=10000).values()) == [0]


def test_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be used"):
        photographs.find({}, tmp_path / "file" / "cache")


def test_cache_is_shared_by_two_processes_at_once(tmp_path, find, three):
    find(three[0])
    (file,) = (tmp_path / "cache").iterdir()
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # it writes, and takes half a second
    release = threading.Timer(0.5, other.execute, ["COMMIT"])
    release.start()
    assert len(find(three[0] | three[1])) == 6
    release.join()
    other.close()
