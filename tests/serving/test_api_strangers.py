"""Requests of strangers: keys, hosts and origins, sizes, times, paths and pictures."""

import http.client
import json
import socket
import threading
import time

import pytest
from api_server import serving
from test_api_traps import ask

from vfengine.serving.gate import GateOptions, is_loopback, read_keys
from vfengine.serving.http_server import Limits
from vfengine.serving.store import Store

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
    status, headers, answer = ask(server, "GET", "/health")
    assert (status, answer["error"]["code"]) == (503, "too_many_connections")
    assert (headers["retry-after-ms"], headers["connection"]) == ("1000", "close")
    assert headers["x-request-id"].startswith("req_")
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
