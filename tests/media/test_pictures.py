"""media/pictures.py: what may be given as a picture, and bytes and the networks' range."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from odd_media import EIGHT, corners
from PIL import Image

from vfengine.media.pictures import (
    as_picture,
    fitted,
    network_to_pixels,
    opaque,
    pixels_to_network,
    read_picture,
    to_network,
)
from vfengine.serving.uploads import store_picture


def test_every_byte_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(2, 16, 8, 1).expand(2, 16, 8, 3)
    x = pixels_to_network(pixels)
    assert (x.shape, x.dtype) == ((2, 3, 16, 8), torch.float32)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(network_to_pixels(x), pixels)


def test_values_beyond_the_range_are_clipped():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5)
    assert network_to_pixels(x).flatten().tolist() == [0, 0, 128, 255, 255]


# -- files and pictures of Pillow ------------------------------------------------------------------


def every_way(file):
    """The picture in a file as the command, a pipeline and the server read it."""
    sent = file.with_suffix(".sent")
    shown = read_picture(file)
    with file.open("rb") as source:
        store_picture(source, SimpleNamespace(width=shown.width, height=shown.height), sent)
    with Image.open(file) as opened:
        given = [file, str(file), opened, sent]
        return [np.asarray(opaque(as_picture(image))) for image in given]


@pytest.mark.parametrize("place", EIGHT, ids=lambda place: str(place.exif))
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_all_eight_orientations_of_pictures(tmp_path, place, suffix):
    exif = Image.Exif()
    exif[0x0112] = place.exif
    file = tmp_path / f"a{suffix}"
    Image.fromarray(corners()).save(file, exif=exif, lossless=True)
    for shown in every_way(file):
        assert np.array_equal(shown, place.shows(corners()))


def test_a_picture_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = io.BytesIO()
    Image.fromarray(corners()).save(photo, "PNG", exif=exif)
    with Image.open(photo) as opened:
        once = as_picture(opened)
        assert opened.size == (48, 32)  # the caller's own stays as it is
    assert once.size == (32, 48)
    assert np.array_equal(as_picture(once), once)


def test_what_is_transparent_is_black_whatever_colour_it_hides(tmp_path):
    pixels = np.full((8, 8, 4), (250, 100, 0, 255), np.uint8)
    pixels[4:, :, 3] = 0
    pixels[:, :4, 3] //= 2
    expected = np.zeros((8, 8, 3), int)
    expected[:4, 4:], expected[:4, :4] = (250, 100, 0), (124, 50, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exact=True)
    Image.fromarray(pixels).save(tmp_path / "b.png", format="TIFF")
    for name in ("a.png", "a.webp"):
        for shown in every_way(tmp_path / name):
            assert np.abs(shown - expected).max() < 2
    for image in (pixels, torch.from_numpy(pixels).movedim(-1, 0), tmp_path / "b.png"):
        assert np.abs(np.asarray(opaque(as_picture(image))) - expected).max() < 2


def test_a_colour_that_stands_for_transparent_is_black(tmp_path):
    for mode, key in (("RGB", (200, 30, 30)), ("L", 90), ("P", 1)):
        image = Image.new(mode, (4, 4), key)
        image.save(tmp_path / "a.png", transparency=key)
        assert not np.asarray(opaque(read_picture(tmp_path / "a.png"))).any()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_modes_of_8_bits_are_taken(tmp_path, mode, size):
    image = Image.new("RGB", size, "white").convert(mode)
    kind = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    image.save(tmp_path / "a", format=kind)
    for given in (image, tmp_path / "a"):
        assert (to_network(given, 3, 4, 6) == 1).all()
        assert (to_network(given, 1, 4, 6) == 1).all()


def test_other_depths_are_refused_by_name(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: not an image .*8 bits a channel.*I;16"):
        read_picture(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"image: not an image .*8 bits a channel.*F"):
        as_picture(Image.new("F", (4, 4)))


def test_a_picture_that_breaks_off_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with Image.open(tmp_path / "cut.png") as opened:
        for image in (opened, tmp_path / "cut.png", str(tmp_path / "cut.png")):
            with pytest.raises(ValueError, match=r"cut\.png: not an image that can be read"):
                as_picture(image)
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such image"):
        as_picture("none.png")


# -- arrays and tensors ----------------------------------------------------------------------------


def test_arrays_and_tensors_are_read_as_frames_are_returned():
    pixels = corners()
    frames, grey = (pixels / 255).astype(np.float32), pixels[..., :1]
    tensor = torch.from_numpy(pixels).movedim(-1, 0)
    for image in (
        *(pixels, frames, frames.astype(np.float64), frames.astype(np.float16), pixels[:, :, ::1]),
        *(tensor, tensor / 255, (tensor / 255).double().requires_grad_()),
    ):
        assert np.array_equal(as_picture(image), pixels)
    for image in (grey, grey[..., 0], grey / 255, torch.from_numpy(grey).movedim(-1, 0)):
        assert np.array_equal(as_picture(image), grey[..., 0])
    assert np.array_equal(as_picture(pixels[::-1, ::-1]), pixels[::-1, ::-1])
    assert fitted(as_picture(pixels), 3, 32, 48).size == (48, 32)


@pytest.mark.parametrize(
    ("image", "error", "said"),
    [
        (7, TypeError, "a path, a PIL image, an array .* or a tensor .*, got int"),
        (b"a.png", TypeError, "got bytes"),
        ([[0, 0], [0, 0]], TypeError, "got list"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "floating point or uint8, got int64"),
        (np.zeros((4, 4, 3), bool), TypeError, "got bool"),
        (np.zeros((4, 4, 3), complex), TypeError, "got complex128"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\[H, W, C\] with C = 1, 3 .*\[4, 4, 2\]"),
        (np.zeros((3, 4, 4), np.uint8)[None], ValueError, r"got \[1, 3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got \[0, 4, 3\]"),
        (np.zeros(()), ValueError, r"got \[\]"),
        (np.full((4, 4, 3), 1.5), ValueError, r"in 0\.\.1 in floating point, got 1\.5\.\.1\.5"),
        (np.full((4, 4, 3), -0.1), ValueError, r"in 0\.\.1"),
        (np.full((4, 4, 3), np.nan), ValueError, r"in 0\.\.1 .*nan"),
        (torch.zeros(8, 8, 3), ValueError, r"a tensor \[C, H, W\] with C = .*got \[8, 8, 3\]"),
        (torch.zeros(4, 4), ValueError, r"got \[4, 4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, "got int32"),
    ],
)
def test_what_is_no_picture_is_refused(image, error, said):
    with pytest.raises(error, match=said):
        as_picture(image)
