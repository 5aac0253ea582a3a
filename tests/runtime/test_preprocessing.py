"""From a file to pixels."""

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import within
from defect_detection.runtime import preprocessing
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.preprocessing import ImageFormat, UnreadableImage


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RAMP = Image.fromarray(np.tile(np.arange(0, 250, 1, np.uint8), (200, 1)))


STRETCHED = ImageFormat(64, 96, fit="stretch")
SMALL = ImageFormat(32, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour_files_of_all_formats_give_the_same_picture(kind, mode):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    decoded = preprocessing.decode(encode(RAMP.convert(mode), kind, **lossless), STRETCHED)
    assert decoded.shape == (64, 96, 1)
    assert decoded.dtype == np.uint8
    expected = np.linspace(0, 249, 96)
    np.testing.assert_allclose(decoded[30, :, 0], expected, atol=3)


def test_colour_is_kept_where_it_is_asked_for():
    red = Image.new("RGB", (40, 40), (200, 30, 60))
    colour = preprocessing.decode(encode(red, "PNG"), ImageFormat(32, 32, channels=3))
    assert colour.shape == (32, 32, 3) and colour[5, 5].tolist() == [200, 30, 60]
    grey = preprocessing.decode(encode(red, "PNG"), SMALL)
    converted = preprocessing.grey(colour[np.newaxis].astype(np.float32))[0]
    np.testing.assert_allclose(converted, grey[..., 0], atol=1)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((90, 30), (10, 21), (0, 32)), ((30, 90), (0, 32), (10, 21)), ((50, 50), (0, 32), (0, 32))],
)
def test_picture_of_another_shape_gets_borders_and_keeps_its_proportions(size, rows, columns):
    decoded = preprocessing.decode(encode(Image.new("L", size, 250), "PNG"), SMALL)[..., 0]
    inside = np.zeros((32, 32), bool)
    inside[slice(*rows), slice(*columns)] = True
    assert (decoded[inside] == 250).all() and (decoded[~inside] == preprocessing.BORDER).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "1"])
def test_other_modes_of_png_decode(mode):
    assert preprocessing.decode(encode(RAMP.convert(mode), "PNG"), SMALL).shape == (32, 32, 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [12, 16])
def test_twelve_and_sixteen_bits_keep_their_shades(kind, bits):
    deep = Image.fromarray(np.asarray(RAMP).astype(np.uint16) * 2 ** (bits - 8))
    takes = ImageFormat(64, 64, fit="stretch", bits=bits)
    decoded = preprocessing.decode(encode(deep, kind), takes)
    np.testing.assert_allclose(decoded[30, :, 0], np.linspace(0, 249, 64), atol=3)


def test_levels_beyond_the_bits_are_white(tmp_path):
    bright = encode(Image.fromarray(np.full((32, 32), 5000, np.uint16)), "PNG")
    assert (preprocessing.decode(bright, ImageFormat(32, 32, bits=12)) == 255).all()
    (tmp_path / "a.png").write_bytes(bright)
    assert preprocessing.bits_of(tmp_path / "a.png") == 14


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((32, 32), 0.5, np.float32), "grey levels of floating point"),
        (np.full((32, 32), 70000, np.int32), "grey levels outside 0 to 65535"),
        (np.full((32, 32), -1, np.int32), "grey levels outside 0 to 65535"),
    ],
)
def test_levels_that_are_no_grey_levels_are_refused(pixels, message):
    with pytest.raises(UnreadableImage, match=message):
        preprocessing.decode(encode(Image.fromarray(pixels), "TIFF"), SMALL)


def test_picture_lying_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    lying = encode(RAMP.rotate(90, expand=True), "JPEG", exif=exif.tobytes())
    upright = preprocessing.decode(encode(RAMP, "JPEG"), ImageFormat(64, 64))
    np.testing.assert_allclose(
        preprocessing.decode(lying, ImageFormat(64, 64)).astype(int), upright.astype(int), atol=4
    )


def test_file_and_bytes_give_the_same_pixels(tmp_path):
    file = tmp_path / "a.jpeg"
    file.write_bytes(encode(RAMP, "JPEG"))
    np.testing.assert_array_equal(
        preprocessing.decode(file, SMALL), preprocessing.decode(file.read_bytes(), SMALL)
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"no image at all", "is none of JPEG, PNG, BMP"),
        (encode(RAMP, "GIF"), "is none of JPEG, PNG, BMP"),
        (encode(RAMP, "JPEG")[:900], "cannot be decoded"),
        (encode(RAMP, "PNG")[:-200], "cannot be decoded"),
    ],
)
def test_unreadable_picture_says_why(content, reason):
    with pytest.raises(UnreadableImage, match=reason):
        preprocessing.decode(content, SMALL)


def test_missing_file_says_so(tmp_path):
    with pytest.raises(UnreadableImage, match="does not exist"):
        preprocessing.decode(Path(tmp_path / "gone.jpeg"), SMALL)


@pytest.mark.parametrize(("size", "expected"), [((64, 32), (16, 32, 1)), ((30, 90), (32, 11, 1))])
def test_decoding_within_keeps_the_proportions(size, expected, tmp_path):
    Image.new("L", size, 77).save(tmp_path / "a.png")
    decoded = preprocessing.decode_within(tmp_path / "a.png", 32)
    assert (decoded.shape, decoded.dtype) == (expected, np.uint8)
    assert np.unique(decoded).tolist() == [77]
    assert preprocessing.dimensions(tmp_path / "a.png") == size


def test_decoding_within_raises_as_decoding_does(tmp_path):
    with pytest.raises(UnreadableImage, match="does not exist"):
        preprocessing.decode_within(tmp_path / "none.png", 32)


READERS = {
    "read_file": preprocessing.read_file,
    "decode": lambda path: preprocessing.decode(path, SMALL),
    "decode_within": lambda path: preprocessing.decode_within(path, 32),
    "bits_of": preprocessing.bits_of,
    "dimensions": preprocessing.dimensions,
}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


def test_what_waits_for_a_writer_is_refused_at_once(read, tmp_path):
    os.mkfifo(tmp_path / "a.jpeg")
    with within(20), pytest.raises(UnreadableImage, match="is a named pipe; only regular files"):
        read(tmp_path / "a.jpeg")


def test_devices_sockets_and_folders_are_refused(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("a.jpeg")
        with within(20), pytest.raises(UnreadableImage, match="is a socket; only regular files"):
            read(Path("a.jpeg"))
    for device in ("/dev/null", "/dev/tty"):  # a terminal, or none: this is no session's leader
        with within(20), pytest.raises(UnreadableImage, match="is a device; only regular files"):
            read(Path(device))
    with within(20), pytest.raises(UnreadableImage, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path)


def test_large_file_is_refused_before_it_is_read(read, tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.write(encode(RAMP, "PNG"))
        file.truncate(10**11)  # takes no room on the disk
    with pytest.raises(UnreadableImage, match=r"has 100\.0 GB, at most 1 GB is read"):
        read(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["gone.png", "link.png"])
def test_missing_files_and_links_to_them_say_so(read, tmp_path, name):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="does not exist"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0.png", "x" * 300 + ".png"])
def test_names_that_no_file_can_have_are_refused(read, name):
    with pytest.raises(UnreadableImage, match="cannot be"):
        read(Path("/tmp") / name)


def test_content_of_a_file_and_of_a_link_to_it(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(RAMP, "PNG"))
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert preprocessing.read_file(tmp_path / "b.png") == encode(RAMP, "PNG")
    assert preprocessing.read_file(str(tmp_path / "a.png")) == encode(RAMP, "PNG")


def test_files_of_other_images_are_told_from_those_that_are_read():
    read, others = preprocessing.SUFFIXES, preprocessing.OTHER_IMAGES
    assert {".jfif", ".jpe"} <= set(read) and {".heic", ".gif", ".dng", ".psd"} <= set(others)
    assert not set(read) & set(others)
    for suffix in (*read, *others):
        assert suffix.startswith(".") and suffix == suffix.lower()
    assert preprocessing.is_image("PART.JFIF") and not preprocessing.is_image("part.heic")


def test_the_most_pixels_of_a_model_are_saved_with_it(tmp_path):
    takes = ImageFormat(32, 48, 3, most_pixels=250_000_000)
    for saved, expected in ((takes, takes), (None, ImageFormat(32, 48, 3))):
        entry = ServedModel(b"", takes).save(tmp_path)
        if saved is None:  # as older versions were
            del entry["most_pixels"]
        del entry["checksums"]
        (tmp_path / "MLmodel").write_text(yaml.safe_dump({"flavors": {"litert": entry}}))
        assert ServedModel.load(tmp_path).takes == expected


def test_the_most_pixels_do_not_name_files_of_pixels():
    assert ImageFormat(32, 32, most_pixels=5).key == SMALL.key
