"""Encoded images that would take all memory or time."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import ROOT, within
from defect_detection.runtime import preprocessing
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage

TAKES = ImageFormat(32, 32)
GREY = Image.fromarray(np.tile(np.arange(0, 240, 6, np.uint8), (30, 1)))  # 30 x 40
KINDS = ["JPEG", "PNG", "BMP", "TIFF", "WEBP"]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Return a black image; `chunks` come before its pixels."""
    compress = zlib.compressobj(9)
    rows = b"".join(compress.compress(bytes(1 + width)) for _ in range(height)) + compress.flush()
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0))
    ends = (chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join((*chunks, *ends))


def tiff(tags: dict[int, int], content: bytes, notes: int = 0) -> bytes:
    """Return an 8 x 8 image with more tags, and `notes` ones that all point to `content`."""
    kept = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 278: 8} | tags
    begin = 8 + 2 + 12 * (len(kept) + notes) + 4
    entries = [struct.pack("<HHLL", tag, 4, 1, begin + v) for tag, v in kept.items() if tag == 273]
    entries += [struct.pack("<HHLL", tag, 4, 1, v) for tag, v in kept.items() if tag != 273]
    entries += [struct.pack("<HHLL", 40000 + n, 7, len(content), begin) for n in range(notes)]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    return (
        struct.pack("<2sHLH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4) + content
    )


def refused(content: bytes, takes: ImageFormat = TAKES) -> str:
    """Return why an image is refused, having seen that little memory was used for it."""
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage) as raised:
            preprocessing.decode(content, takes)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 20 * len(content) + 2**22
    return str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_pixels_are_refused_by_the_header(kind):
    content = encode(GREY, kind)
    most = GREY.width * GREY.height
    assert preprocessing.decode(content, ImageFormat(32, 32, most_pixels=most)).any()
    preprocessing.decode_within(content, 16, most_pixels=most)
    preprocessing.bits_of(content, most)
    few = f"has 1 megapixels, at most {(most - 1) / 1e6:g} are decoded (max_megapixels in src/"
    for decode in (
        lambda: preprocessing.decode(content, ImageFormat(32, 32, most_pixels=most - 1)),
        lambda: preprocessing.decode_within(content, 16, most_pixels=most - 1),
        lambda: preprocessing.bits_of(content, most - 1),
    ):
        with pytest.raises(UnreadableImage) as raised:
            decode()
        assert str(raised.value).startswith(few)


@pytest.mark.parametrize("kind", [*KINDS, "TIFF, packed"])
def test_the_limit_is_the_formats_and_not_that_of_the_process(kind, monkeypatch):
    """Pillow's own is 89 million pixels for a warning, which is an error here, and twice that."""
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF, packed" else {}
    content = encode(GREY, kind.split(",")[0], **options)
    for limit in (GREY.width * GREY.height - 1, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert preprocessing.decode(content, TAKES).any()
        assert preprocessing.decode_within(content, 16).any()
        assert limit == Image.MAX_IMAGE_PIXELS


def test_little_memory_is_used_for_a_small_file_with_many_pixels(tmp_path):
    """In a process of its own, since Pillow's memory is not Python's."""
    (tmp_path / "a.png").write_bytes(png(13300, 13300))
    assert (tmp_path / "a.png").stat().st_size < 700_000
    program = f"""
import resource
from pathlib import Path
from defect_detection.runtime import preprocessing
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    preprocessing.decode(Path({str(tmp_path)!r}, "a.png"), preprocessing.ImageFormat(64, 64))
except preprocessing.UnreadableImage as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "src", capture_output=True, text=True
    )
    *said, megabytes = done.stdout.splitlines()
    assert said == [
        "has 177 megapixels, at most 100 are decoded "
        "(max_megapixels in src/config.yaml, when the model is trained)"
    ]
    assert float(megabytes) < 32


def jpeg_with_notes(content: bytes) -> bytes:
    """Return a JPEG with EXIF in as many segments as it takes; Pillow joins them."""
    plain = encode(GREY, "JPEG")
    parts = [b"Exif\0\0" + content[i : i + 65000] for i in range(0, len(content), 65000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(one) + 2) + one for one in parts)
    return plain[:2] + segments + plain[20:]  # without JFIF, so that EXIF says the resolution


ALIKE = tiff({273: 0}, bytes(100_000), notes=8000)  # 8,000 notes of 100 KB at the same place


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (ALIKE, "parts that share the same bytes"),
        (png(8, 8, chunk(b"eXIf", ALIKE)), "bytes of EXIF"),
        (jpeg_with_notes(ALIKE), "bytes of EXIF"),
        (encode(GREY, "WEBP", exif=ALIKE), "bytes of EXIF"),
    ],
    ids=["TIFF", "PNG", "JPEG", "WEBP"],
)
def test_notes_that_all_lie_at_the_same_place_are_not_read_again_and_again(content, why):
    assert len(content) < 250_000
    assert why in refused(content)


def test_text_of_a_png_may_not_hold_many_notes_either():
    raw = b"\nexif\n%8d\n" % len(ALIKE) + ALIKE.hex().encode()
    text = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))
    assert "EXIF" in refused(png(8, 8, text))


def test_notes_of_a_tiff_that_point_to_further_ones_are_left_alone():
    """Pillow reads the notes of the camera, tag 34665, when it decodes."""
    further = struct.pack("<H", 4000) + b"".join(
        struct.pack("<HHLL", 40000 + n, 7, 48_000, 0) for n in range(4000)
    )
    content = tiff({273: 0, 34665: 8 + 2 + 12 * 9 + 4 + 64}, bytes(64) + further + bytes(4))
    tracemalloc.start()
    preprocessing.decode(content, TAKES)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**22


def test_notes_and_images_that_point_to_themselves_come_to_an_end():
    plain = tiff({273: 0}, bytes(64))
    end = 10 + 12 * struct.unpack_from("<H", plain, 8)[0]
    content = plain[:end] + struct.pack("<L", 8) + plain[end + 4 :]  # the next image is this one
    exif = struct.pack("<2sHLH", b"II", 42, 8, 2) + struct.pack("<HHLL", 0x8769, 4, 1, 8)
    exif += struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0) + struct.pack("<L", 8)
    with within(20):
        preprocessing.decode(content, TAKES)
        preprocessing.decode(encode(GREY, "JPEG", exif=b"Exif\0\0" + exif), TAKES)


def test_rows_of_a_tiff_may_lie_in_any_order():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)).T)
    content = encode(ramp, "TIFF", tiffinfo={278: 1})  # a strip for each row
    with Image.open(io.BytesIO(content)) as image:
        places = image.tag_v2[273]
    before, after = (struct.pack("<200L", *each) for each in (places, places[::-1]))
    assert content.count(before) == 1
    np.testing.assert_array_equal(
        preprocessing.decode(content.replace(before, after), TAKES),
        preprocessing.decode(encode(ramp.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "PNG"), TAKES),
    )


def test_profile_of_a_png_that_unpacks_to_much_is_refused():
    profile = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(50_000_000), 9))
    assert "cannot be decoded" in refused(png(8, 8, profile))


def test_tile_that_is_larger_than_the_image_is_refused():
    packed = zlib.compress(bytes(64))
    tags = {259: 8, 322: 40000, 323: 40000, 324: 8 + 2 + 12 * 11 + 4, 325: len(packed)}
    assert "has 1600 megapixels in a tile, at most 100" in refused(tiff(tags, packed))


def test_many_scans_of_a_large_jpeg_are_refused():
    plain = encode(GREY, "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    takes = ImageFormat(32, 32, most_pixels=GREY.width * GREY.height)
    for more, few in ((30, True), (60, False)):
        content = plain[:-2] + more * last + plain[-2:]
        if few:
            assert preprocessing.decode(content, takes).any()
        else:
            scans = more + plain.count(b"\xff\xda")
            assert f"has {scans} scans" in refused(content, takes)
        assert preprocessing.decode(content, TAKES).any()  # a small one is soon decoded


@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_of_several_images_in_a_file_the_first_counts(kind):
    others = [Image.new("L", GREY.size, 255)] * 3
    content = encode(GREY, kind, save_all=True, append_images=others)
    found = preprocessing.decode(content, TAKES).astype(int)
    np.testing.assert_allclose(found, preprocessing.decode(encode(GREY, "PNG"), TAKES), atol=12)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_their_orientation_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(GREY, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        upright = encode(ImageOps.exif_transpose(image), "PNG")
    takes = ImageFormat(30, 40, fit="stretch")
    np.testing.assert_array_equal(
        preprocessing.decode(content, takes), preprocessing.decode(upright, takes)
    )


def test_damaged_images_are_refused_or_decoded_and_nothing_else():
    """Each is damaged in a few bytes; no other exception, and no warning."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind in KINDS:
        plain = np.frombuffer(encode(GREY, kind, **({} if kind == "BMP" else {"exif": exif})), "u1")
        for _ in range(100):
            damaged = plain.copy()
            damaged[rng.integers(0, min(300, len(plain)), 3)] = rng.integers(0, 256, 3)
            try:
                found = preprocessing.decode(damaged.tobytes(), TAKES)
            except UnreadableImage:
                continue
            assert found.shape == TAKES.shape


def test_dimensions_are_those_of_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    for kind in KINDS:
        path = tmp_path / kind
        path.write_bytes(encode(GREY, kind))
        assert preprocessing.dimensions(path) == GREY.size


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_dimensions_of_what_is_no_image_say_why(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match="is none of"):
        preprocessing.dimensions(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="does not exist"):
        preprocessing.dimensions(Path(tmp_path / "gone.png"))
