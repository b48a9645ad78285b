"""Pictures and videos of strangers: bombs, broken files, names that are paths, URLs."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from api_server import serving
from PIL import Image
from test_api_traps import ask

from vfengine.media.pictures import fitted, read_picture
from vfengine.serving.store import Store
from vfengine.serving.uploads import MAX_PIXELS


@pytest.fixture
def serve(tmp_path):
    """Starts a server whose jobs stay in the queue."""
    running = []

    def start():
        running.append(serving(Store(tmp_path / "store", durable=False), paused=True))
        return running[-1].__enter__()

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for tests whose requests are all refused, so that it stays as it is."""
    store = Store(tmp_path_factory.mktemp("refusing") / "store", durable=False)
    with serving(store, paused=True) as running:
        yield running
    assert not list((store.folder / "jobs").iterdir())


def files_of(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/evil", "a\0b", "x" * 900, "nul", ".."])
def test_names_of_uploads_name_no_files(serve, tmp_path, name):
    server = serve()
    before = files_of(tmp_path)
    shown = name.encode().replace(b"\0", b"%00")
    head = b'content-disposition: form-data; name="input_reference"; filename="' + shown + b'"'
    status, _, video = ask(server, "POST", "/v1/videos", form(head, png(4, 4)), **FORM)
    assert status == 200
    new = files_of(tmp_path) - before
    assert {file for file in new if "jobs.sqlite3" not in file} == {
        f"store/jobs/{video['id']}/upload"
    }


FORM = {"content_type": "multipart/form-data; boundary=b"}


def form(head: bytes, data: bytes) -> bytes:
    prompt = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\njump\r\n'
    return prompt + b"--b\r\n" + head + b"\r\n\r\n" + data + b"\r\n--b--\r\n"


# -- pictures --------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), "red"), "PNG")


def png_of(width: int, height: int, rows: bytes, text: bytes = b"") -> bytes:
    """A PNG that says what size it has; rows, text: compressed."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    if text:
        head += chunk(b"zTXt", b"a\0\0" + text)
    return head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def many_frames() -> bytes:
    frames = [Image.new("P", (8, 8), i % 250) for i in range(500)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


BOMBS = {
    "huge": lambda: png_of(30_000, 30_000, zlib.compress(bytes(10_000_000), 9)),
    "wide": lambda: png_of(2**31 - 1, 1, zlib.compress(b"")),
    "nothing": lambda: png_of(0, 0, zlib.compress(b"")),
    "lies": lambda: png_of(4000, 4000, zlib.compress(bytes(100))),
    "cut off": lambda: encoded(Image.effect_noise((99, 99), 50), "PNG")[:2000],
    "cut off jpeg": lambda: encoded(Image.effect_noise((99, 99), 50), "JPEG")[:1500],
    "text": lambda: png_of(8, 8, zlib.compress(bytes(200)), zlib.compress(bytes(5_000_000))),
    "empty": lambda: b"",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "tiff": lambda: encoded(Image.new("RGB", (8, 8)), "TIFF"),
    "psd": lambda: b"8BPS\0\1" + bytes(100),
    "ico": lambda: encoded(Image.new("RGB", (16, 16)), "ICO"),
    "junk": lambda: bytes(range(256)) * 20,
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_pictures_that_are_refused(server, name):
    head = b'content-disposition: form-data; name="input_reference"; filename="a.png"'
    status, _, answer = ask(server, "POST", "/v1/videos", form(head, BOMBS[name]()), **FORM)
    assert (status, answer["error"]["param"]) == (400, "input_reference")
    assert " at 0x" not in answer["error"]["message"]  # of the server's memory
    assert server.rows() == 0 and not list((server.store.folder / "jobs").iterdir())


def test_the_first_of_many_frames_is_taken(serve):
    server = serve()
    head = b'content-disposition: form-data; name="input_reference"; filename="a.gif"'
    assert ask(server, "POST", "/v1/videos", form(head, many_frames()), **FORM)[0] == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_pictures_that_are_taken(serve, kind, mode):
    """Whatever can be written in a format; of what cannot be shown, an error says so."""
    try:
        data = encoded(Image.new("RGB", (50, 40), "red").convert(mode), kind)
    except (OSError, KeyError, ValueError):
        data = encoded(Image.new("RGB", (50, 40), "red"), kind)
    head = b'content-disposition: form-data; name="input_reference"; filename="a"'
    status, _, answer = ask(serve(), "POST", "/v1/videos", form(head, data), **FORM)
    assert status == 200 or answer["error"]["code"] == "invalid_image"


def test_memory_of_pictures_goes_back_to_the_system():
    """Of blocks below 32 MiB, malloc keeps as many as each thread ever had."""
    assert MAX_PIXELS < 30_000 * 30_000
    assert Image.core.get_block_size() > 32 * 2**20


def test_a_turned_picture_is_the_one_that_generate_reads(serve, tmp_path):
    """EXIF, transparency and size are dealt with here, and leave an engine nothing to change."""
    image = Image.effect_noise((50, 30), 80).convert("RGBA")
    image.putalpha(Image.effect_noise((50, 30), 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = tmp_path / "a.png"
    image.save(file, exif=exif)
    server = serve()
    head = b'content-disposition: form-data; name="input_reference"; filename="a.png"'
    video = ask(server, "POST", "/v1/videos", form(head, file.read_bytes()), **FORM)[2]
    kept = read_picture(server.store.file(video["id"], "upload"))
    assert np.array_equal(fitted(read_picture(file), 3, 16, 16), fitted(kept, 3, 16, 16))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "ftp://example.com/a.png",
        "data:text/html;base64,aGk=",
        "data:image/png,raw",
        "data:image/png;base64,***",
        "data:image/png;base64,aGVsbG8=",
        "data:image/png;base64," + base64.b64encode(png(2, 2)).decode()[:-3],
        "",
        None,
        7,
        {"url": "x"},
    ],
)
def test_urls_are_not_fetched(server, url):
    body = {"prompt": "jump", "input_reference": {"image_url": url}}
    status, _, answer = ask(server, "POST", "/v1/videos", body)
    assert status == 400 and answer["error"]["param"].startswith("input_reference")
    assert server.rows() == 0


@pytest.mark.parametrize(
    "reference", ["http://x", {}, {"file_id": "file-1"}, {"image_url": "x", "other": 1}, [], 1]
)
def test_other_references(server, reference):
    body = {"prompt": "jump", "input_reference": reference}
    assert ask(server, "POST", "/v1/videos", body)[0] == 400


PLAYLISTS = (b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\n")
AVI = b"RIFF\0\0\0\0AVI LIST"  # which no engine reads


@pytest.mark.parametrize("data", [b"", *PLAYLISTS, AVI])
def test_videos_that_are_refused(server, data):
    """A playlist names further files: only what begins as a video does gets as far as a job."""
    head = b'content-disposition: form-data; name="video"; filename="a.mp4"'
    status, _, answer = ask(server, "POST", "/v1/videos/extensions", form(head, data), **FORM)
    assert (status, answer["error"]["param"]) == (400, "video") and server.rows() == 0
