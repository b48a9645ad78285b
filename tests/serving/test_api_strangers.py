"""Requests of strangers: keys, hosts and origins, sizes, times, paths and pictures."""

import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from api_server import serving
from PIL import Image
from test_api_traps import ask

from vfengine.media.pictures import fitted, read_picture
from vfengine.serving.gate import GateOptions, is_loopback, read_keys
from vfengine.serving.http_server import Limits
from vfengine.serving.store import Store
from vfengine.serving.uploads import MAX_PIXELS

MAX_BODY = 200_000


@pytest.fixture
def serve(tmp_path):
    """Starts a server whose jobs stay in the queue, with small limits."""
    with pytest.MonkeyPatch.context() as patch:
        running = []

        def start(limits=None, **gate):
            options = GateOptions(**{"max_body": MAX_BODY, **gate})
            store = Store(tmp_path / "store", durable=False)
            server = serving(store, paused=True, gate=options, limits=limits)
            running.append(server)
            return server.__enter__()

        patch.setattr("tempfile.tempdir", str(tmp_path))
        yield start
        for server in running:
            server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for tests whose requests are all refused, so that it stays as it is."""
    store = Store(tmp_path_factory.mktemp("refusing") / "store", durable=False)
    gate = GateOptions(max_body=MAX_BODY)
    with serving(store, paused=True, gate=gate) as running:
        yield running
    assert not list((store.folder / "jobs").iterdir())


def files_of(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


# -- keys ------------------------------------------------------------------------------------------


def test_keys(serve):
    server = serve(keys=("first", "second key"))
    for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/videos/video_0", "/nothing"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
            status, answers, answer = ask(server, "GET", path, **headers)
            assert (status, answers["www-authenticate"]) == (401, "Bearer")
            assert answer["error"]["type"] == "authentication_error"
    for key in ("Bearer first", "bearer second key"):
        assert ask(server, "GET", "/v1/videos", authorization=key)[0] == 200
    for other in ("Basic first", "first", "Bearer firs", "Bearer firstt", "Bearer \xe9", "Bearer"):
        assert ask(server, "GET", "/v1/videos", authorization=other)[0] == 401
    for path, status in (("/health", 200), ("/openapi.json", 200), ("/static/x.js", 404)):
        assert ask(server, "GET", path)[0] == status


def test_a_wrong_key_is_refused_before_the_body_is_read(serve):
    server = serve(keys=("right",))
    with raw(server) as connection:
        connection.sendall(
            b"POST /v1/videos HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer wrong\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"
        )
        assert answer_of(connection)[0] == 401


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert read_keys(file) == ("one", "two")
    file.write_text("\n")
    with pytest.raises(ValueError, match="expected a key on each line"):
        read_keys(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="ASCII"):
        read_keys(file)


# -- browsers --------------------------------------------------------------------------------------


def test_foreign_names_are_refused(server):
    """A page whose name is made to resolve to this machine gets no answer."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", ""):
        status, _, answer = ask(server, "GET", "/v1/videos", host=host)
        assert (status, answer["error"]["code"]) == (403, "unknown_host")
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8000", "[::1]", "127.8.0.1:1"):
        assert ask(server, "GET", "/v1/videos", host=host)[0] == 200


def test_an_address_of_its_own_has_any_name(serve):
    server = serve(any_host=True, keys=("k",))
    headers = {"host": "videos.example:8000", "authorization": "Bearer k"}
    assert ask(server, "GET", "/v1/videos", **headers)[0] == 200
    assert ask(server, "GET", "/v1/videos", origin="https://videos.example:8000", **headers)[0] == (
        200
    )
    assert ask(server, "GET", "/v1/videos", origin="https://evil.example", **headers)[0] == 403


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
def test_pages_of_others_are_refused(server, method):
    here = f"http://127.0.0.1:{server.port}"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", ""):
        status, headers, answer = ask(server, method, "/v1/videos", origin=origin)
        assert (status, answer["error"]["code"]) == (403, "foreign_origin")
        assert not [name for name in headers if name.startswith("access-control")]
    cross = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}
    assert ask(server, method, "/v1/videos", **cross)[0] == 403
    own = {"origin": here, "sec_fetch_site": "same-origin"}
    assert ask(server, method, "/v1/videos", **own)[0] in (200, 400, 405)


def test_answers_are_kept_from_other_pages_and_caches(serve):
    headers = ask(serve(), "GET", "/v1/videos")[1]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert headers["server"] is None


def test_loopback_addresses():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "127.evil.example", "")))


# -- bodies ----------------------------------------------------------------------------------------


def raw(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def answer_of(connection) -> tuple[int, bytes]:
    """Status, and head and body of one answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, bytes(answer.headers) + answer.read()


def test_a_body_that_announces_too_much_is_not_read(server):
    with raw(server) as connection:
        head = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 99999999999999999999\r\n\r\n".encode())
        status, data = answer_of(connection)
    assert status == 413 and b"body_too_large" in data


def test_a_client_that_asks_first_sends_no_body(server):
    """As curl does before a large one."""
    head = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\n"
    with raw(server) as connection:
        connection.sendall(f"{head}content-length: {10 * MAX_BODY}\r\n\r\n".encode())
        assert answer_of(connection)[0] == 413  # and no "100 Continue" before it


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_answered_once_it_is_sent(server, announced):
    """As the official client sends it: all of it, before it looks for an answer."""
    body = json.dumps({"prompt": "x" * (MAX_BODY + 1000)}).encode()
    sent = body if announced else (body[i : i + 5000] for i in range(0, len(body), 5000))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/v1/videos", sent, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "body_too_large")
    connection.close()


def test_a_body_without_end_is_cut(serve):
    limits = Limits(unread=500_000, stop_seconds=1)
    server = serve(limits)
    head = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; "
    head += "boundary=b\r\ntransfer-encoding: chunked\r\n\r\n"
    part = b'--b\r\ncontent-disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    sent = 0
    with raw(server) as connection:
        connection.sendall(head.encode() + f"{len(part):x}\r\n".encode() + part + b"\r\n")
        with pytest.raises(OSError):
            while sent < 2**28:
                connection.sendall(chunk)
                sent += len(chunk)
    assert sent < 2**25  # what the sockets of both sides hold, besides
    assert ask(server, "GET", "/health")[0] == 200 and server.rows() == 0


def test_a_slow_body(serve):
    server = serve(body_seconds=0.3)
    with raw(server) as connection:
        head = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 100\r\n\r\n".encode())
        done = threading.Event()

        def drip():
            while not done.wait(0.05):
                connection.sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        status, data = answer_of(connection)
        done.set()
        dripping.join()
    assert status == 408 and b"x-should-retry: false" in data


@pytest.mark.parametrize("start", [b"", b"GET /v1/videos HT", b"GET / HTTP/1.1\r\nhost: loc"])
def test_a_slow_head(serve, start):
    server = serve(Limits(header_seconds=0.2, stop_seconds=1))
    with raw(server) as connection:
        connection.sendall(start)
        assert connection.recv(1000) == b""  # closed


def test_a_slow_head_after_a_request(serve):
    server = serve(Limits(header_seconds=0.2, stop_seconds=1))
    with raw(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert answer_of(connection)[0] == 200
        connection.sendall(b"GET /heal")
        while connection.recv(1000):
            pass


def test_what_is_no_http(server):
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n"):
        with raw(server) as connection:
            connection.sendall(junk + b"\r\n\r\n")
            status, data = answer_of(connection)
            assert status == 400 and b"x-request-id" in data
    with raw(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000)
        assert answer_of(connection)[0] == 400
    assert ask(server, "GET", "/health")[0] == 200


def test_many_idle_connections(serve):
    server = serve(Limits(connections=8, stop_seconds=1))
    idle = [raw(server) for _ in range(12)]
    time.sleep(0.05)
    assert ask(server, "GET", "/health")[0] == 503
    for connection in idle:
        connection.close()
    while ask(server, "GET", "/health")[0] == 503:
        time.sleep(0.01)


@pytest.mark.parametrize(
    "kind, body",
    [
        ("application/json", b"{"),
        ("application/json", b"[1]"),
        ("application/json", b'"text"'),
        ("application/json", b"\xff\xfe"),
        ("application/json", b'{"prompt": "jump", "seed": 1e999}'),
        ("application/json", b'{"prompt": "jump", "seed": NaN}'),
        ("application/json", b'{"prompt": "jump", "fps": ' + b"9" * 4000 + b"}"),
        ("application/json", b'{"prompt": "jump", "fps": ' + b"9" * 5000 + b"}"),
        ("application/json", b'{"prompt": "\\ud800"}'),
        ("application/json", b'{"prompt": "a\\u0000b"}'),
        ("application/json", b'{"a":' * 9000 + b"1" + b"}" * 9000),
        ("application/json", b"[" * 150_000),
        ("application/json", b"[" + b"1," * 90_000 + b"1]"),
        ("text/plain", b"hello"),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=b", b"--c\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="prompt"',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--\r\n"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\njump\r\n',
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n' * 500 + b"--b--\r\n",
        ),
        ("application/x-www-form-urlencoded", b"prompt=jump&prompt=jump"),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % i for i in range(3000))),
        ("application/x-www-form-urlencoded", b"video[id]=1&video=2"),
    ],
)
def test_broken_bodies(server, kind, body):
    status, _, answer = ask(server, "POST", "/v1/videos", body, content_type=kind)
    assert status == 400 and answer["error"]["code"]
    assert server.rows() == 0 and not list((server.store.folder / "jobs").iterdir())


# -- paths -----------------------------------------------------------------------------------------


IDS = (
    *("..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2fjobs.sqlite3", "%00", "video_%00"),
    *("video_..%2f..%2fjobs.sqlite3", "%ff%fe", "%e2%88%9e", "video_" + "a" * 5000, "video_", "~"),
    *("video_0%0d%0ax-injected:1", "%5c..%5c..", "C:%5cwindows", "video_%2e%2e", "jobs.sqlite3"),
)


@pytest.mark.parametrize("name", IDS)
def test_path_tricks_find_nothing(server, name):
    before = files_of(server.store.folder.parent)
    for method, path in (
        ("GET", f"/v1/videos/{name}"),
        ("DELETE", f"/v1/videos/{name}"),
        ("GET", f"/v1/videos/{name}/content?variant=thumbnail"),
        ("POST", f"/v1/videos/{name}/remix"),
        ("GET", f"/static/{name}"),
        ("GET", f"/v1/models/{name}"),
    ):
        body = {"prompt": "jump"} if method == "POST" else None
        status, headers, _ = ask(server, method, path, body)
        assert status in (404, 405) and headers["x-injected"] is None, (method, path)
    body = {"prompt": "jump", "video": {"id": name}}
    assert ask(server, "POST", "/v1/videos/extensions", body)[0] == 404
    assert ask(server, "GET", f"/v1/videos?after={name}")[0] == 400
    assert files_of(server.store.folder.parent) == before


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


@pytest.mark.parametrize("data", [b"", b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\n"])
def test_videos_that_are_refused(server, data):
    """A playlist names further files: only what begins as a video does gets as far as a job."""
    head = b'content-disposition: form-data; name="video"; filename="a.mp4"'
    status, _, answer = ask(server, "POST", "/v1/videos/extensions", form(head, data), **FORM)
    assert (status, answer["error"]["param"]) == (400, "video") and server.rows() == 0
