"""What other servers of /v1/videos get wrong, a test each, in raw HTTP."""

import http.client
import json
import socket
import threading

import pytest
from api_server import VIDEO, serving

from vfengine.serving.http_server import listen
from vfengine.serving.log import log_error
from vfengine.serving.metrics import Metrics
from vfengine.serving.store import Store


@pytest.fixture
def server(tmp_path):
    with serving(Store(tmp_path / "store", durable=False), paused=True) as running:
        yield running


def ask(server, method, path, body=None, **headers):
    """(status, headers, body) of one request; a body that is no bytes goes as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body), {"content-type": "application/json", **headers}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, answer.headers, json.loads(data) if data and is_json else data


def new_video(server, **fields) -> str:
    status, _, video = ask(server, "POST", "/v1/videos", {"prompt": "jump", **fields})
    assert status == 200
    return video["id"]


def finished(server, **fields) -> str:
    """A completed video."""
    video = new_video(server, **fields)
    for job in server.engines.claim():
        server.engines.begin(job)
        server.engines.finish(job)
    return video


def test_variant_video_is_the_video(server):
    path = f"/v1/videos/{finished(server)}/content"
    for query in ("", "?variant=video"):
        status, headers, data = ask(server, "GET", path + query)
        assert (status, headers["content-type"], data) == (200, "video/mp4", VIDEO)
    status, _, answer = ask(server, "GET", f"{path}?variant=0")
    assert (status, answer["error"]["param"]) == (400, "variant")


def test_delete_says_deleted(server):
    video = new_video(server)
    answer = ask(server, "DELETE", f"/v1/videos/{video}")[2]
    assert answer == {"id": video, "object": "video.deleted", "deleted": True}


def test_delete_of_a_running_job_is_no_conflict(server):
    video = new_video(server)
    (job,) = server.engines.claim()
    assert ask(server, "DELETE", f"/v1/videos/{video}")[0] == 200
    server.engines.finish(job)
    assert server.store.get(video) is None and not server.store.folder_of(video).exists()


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v1/videos/video_0", 404),
        ("GET", "/v2", 404),
        ("GET", "/v1/videos/", 404),
        ("PUT", "/v1/videos", 405),
        ("PATCH", "/v1/videos/video_0", 405),
        ("POST", "/v1/videos", 400),
        ("GET", "/v1/videos?limit=0", 400),
        ("GET", "/v1/videos?after=video_0", 400),
        ("GET", "/static/nothing.js", 404),
    ],
)
def test_errors_have_the_form_that_clients_read(server, method, path, status):
    found, headers, answer = ask(server, method, path)
    assert found == status and list(answer) == ["error"]
    assert list(answer["error"]) == ["message", "type", "param", "code"]
    assert answer["error"]["message"] and answer["error"]["code"]
    assert headers["x-request-id"].startswith("req_")
    assert status != 405 or headers["allow"]


def test_a_list_has_its_last_id_and_more(server):
    made = [new_video(server) for _ in range(3)]
    page = ask(server, "GET", "/v1/videos?limit=2")[2]
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", made[2], made[1])
    assert page["has_more"] is True and len(page["data"]) == 2
    page = ask(server, "GET", f"/v1/videos?limit=2&after={made[1]}")[2]
    assert (page["last_id"], page["has_more"]) == (made[0], False)


def test_a_queued_job_has_progress_0(server):
    video = ask(server, "GET", f"/v1/videos/{new_video(server)}")[2]
    assert (video["status"], video["progress"]) == ("queued", 0)


def test_progress_has_numbers(server):
    video = new_video(server)
    server.engines.claim()
    for percent in (1, 50, 99):
        server.store.report(video, "fake", "base", percent)
        shown = ask(server, "GET", f"/v1/videos/{video}")[2]
        assert (shown["status"], shown["progress"]) == ("in_progress", percent)
        assert shown["phase"] == "base"


def test_a_failed_job_is_no_http_error(server):
    video = new_video(server)
    server.engines.claim()
    server.store.fail(video, "fake", "out_of_memory", "too large", None)
    status, headers, shown = ask(server, "GET", f"/v1/videos/{video}")
    assert (status, shown["status"]) == (200, "failed")
    assert shown["error"] == {"code": "out_of_memory", "message": "too large"}
    assert headers["openai-poll-after-ms"] is None


def test_clients_are_told_how_soon_to_poll(server):
    video = new_video(server)
    for path in (f"/v1/videos/{video}", "/v1/videos"):
        assert 0 < int(ask(server, "GET", path)[1]["openai-poll-after-ms"]) <= 1000
    (job,) = server.engines.claim()
    server.engines.begin(job)
    server.engines.finish(job)
    assert ask(server, "GET", "/v1/videos")[1]["openai-poll-after-ms"] is None


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
def test_not_ready_is_not_tried_again(server, variant):
    path = f"/v1/videos/{new_video(server)}/content?variant={variant}"
    status, headers, answer = ask(server, "GET", path)
    assert (status, headers["x-should-retry"]) == (404, "false")
    assert "queued" in answer["error"]["message"] and answer["error"]["code"] == "not_ready"


def test_every_field_that_clients_read_is_there(server):
    video = ask(server, "GET", f"/v1/videos/{finished(server)}")[2]
    required = ("id", "object", "model", "status", "progress", "created_at", "seconds", "size")
    optional = ("completed_at", "expires_at", "prompt", "remixed_from_video_id", "error")
    assert all(name in video for name in (*required, *optional))
    assert all(isinstance(video[name], int) for name in ("progress", "created_at", "completed_at"))
    assert isinstance(video["seconds"], str)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, kind",
    [
        ("mp4", "video/mp4"),
        ("webm", "video/webm"),
        ("webp", "image/webp"),
        ("gif", "image/gif"),
    ],
)
def test_types_of_files(server, format, kind):
    path = f"/v1/videos/{finished(server, format=format)}/content"
    status, headers, data = ask(server, "GET", path)
    assert (status, headers["content-type"], len(data)) == (200, kind, len(VIDEO))
    assert headers["content-length"] == str(len(VIDEO)) and format in headers["content-disposition"]


def test_ranges(server):
    """Players of a page ask for parts."""
    path = f"/v1/videos/{finished(server)}/content"
    status, headers, data = ask(server, "GET", path, range="bytes=100-199")
    assert (status, data) == (206, VIDEO[100:200])
    assert headers["content-range"] == f"bytes 100-199/{len(VIDEO)}"
    assert ask(server, "GET", path, range="bytes=-10")[2] == VIDEO[-10:]
    assert ask(server, "GET", path, range="bytes=10000-")[2] == VIDEO[10000:]
    status, headers, answer = ask(server, "GET", path, range="bytes=99999-")
    assert (status, headers["content-range"]) == (416, f"bytes */{len(VIDEO)}")
    assert answer["error"]["code"] == "invalid_range"
    status, _, answer = ask(server, "GET", path, range="bytes=x-y")
    assert (status, answer["error"]["code"]) == (400, "invalid_range")
    etag = ask(server, "GET", path)[1]["etag"]
    fresh = {"range": "bytes=0-9", "if_range": etag}
    assert ask(server, "GET", path, **fresh)[0] == 206
    assert ask(server, "GET", path, range="bytes=0-9", if_range='"other"')[0] == 200


def test_head(server):
    path = f"/v1/videos/{finished(server)}/content"
    status, headers, data = ask(server, "HEAD", path)
    assert (status, headers["content-length"], data) == (200, str(len(VIDEO)), b"")
    assert headers["accept-ranges"] == "bytes"
    assert ask(server, "HEAD", "/v1/videos")[0] == 200
    assert ask(server, "HEAD", "/v1/videos/video_0")[0] == 404


def test_a_file_that_has_gone_is_not_found(server):
    video = finished(server)
    server.store.file(video, "video.mp4").unlink()
    status, headers, _ = ask(server, "GET", f"/v1/videos/{video}/content")
    assert (status, headers["x-should-retry"]) == (404, "false")


def test_health_and_metrics(server):
    finished(server)
    new_video(server)
    health = ask(server, "GET", "/health")[2]
    assert (health["status"], health["model"], health["engines"]) == ("ok", "tiny", 1)
    assert (health["queued"], health["in_progress"]) == (1, 0)
    server.engines.alive = 0
    assert ask(server, "GET", "/health")[0] == 503
    status, headers, page = ask(server, "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    page = page.decode()
    assert 'vfengine_jobs{status="queued"} 1.0' in page
    assert 'vfengine_jobs{status="completed"} 1.0' in page
    assert 'vfengine_http_requests_total{method="POST",route="create",status="200"} 2.0' in page
    assert 'vfengine_memory_bytes{process="server"}' in page


def test_an_error_of_the_servers_own(server, monkeypatch, capfd):
    def broken(job_id):
        raise OSError("the disk is on fire")

    printed = threading.Event()

    def noted(error):
        log_error(error)
        printed.set()

    monkeypatch.setattr("vfengine.serving.gate.log_error", noted)
    monkeypatch.setattr(server.store, "get", broken)
    status, headers, answer = ask(server, "GET", "/v1/videos/video_0")
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert headers["x-request-id"] and "fire" not in answer["error"]["message"]
    assert printed.wait(60)  # once the answer is sent; what is read meanwhile can lose lines
    error = capfd.readouterr().err
    assert "the disk is on fire" in error and error.count("Traceback") == 1
    assert ask(server, "GET", "/health")[0] == 200


def test_a_client_that_hangs_up(server, capfd):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = "POST /v1/videos HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f'{head}content-length: 100\r\n\r\n{{"prompt": '.encode())
    seen = 'vfengine_http_requests_total{method="POST",route="create",status="499"} 1.0'
    while seen not in ask(server, "GET", "/metrics")[2].decode():
        pass
    assert server.rows() == 0 and capfd.readouterr().err == ""


def test_answers_are_sent_without_delay():
    """Of a socket that does not say so, each answer waits for the client's delayed ACK."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # what asyncio goes by


def test_what_engines_say_becomes_figures():
    metrics = Metrics(lambda status: 2)
    batch = {"event": "batch", "clips": 2, "seconds": {"base": 0.2, "residual": 1.5}}
    memory = {"process_memory_mb": 100, "peak_memory_mb": None}
    metrics.engine_event({**batch, **memory, "walked": 1, "found": 1})
    metrics.engine_event({"event": "failed", "code": "out_of_memory"})
    metrics.engine_event({"event": "ready", "model": {}})
    page = metrics.page().decode()
    for line in (
        'vfengine_jobs{status="queued"} 2.0',
        "vfengine_clips_total 2.0",
        'vfengine_failures_total{code="out_of_memory"} 1.0',
        'vfengine_phase_seconds_sum{phase="residual"} 1.5',
        'vfengine_phase_seconds_bucket{le="0.3",phase="base"} 1.0',
        'vfengine_base_paths_total{how="found"} 1.0',
        'vfengine_memory_bytes{process="engine"} 1.048576e+08',
    ):
        assert f"{line}\n" in page


def test_the_page_is_served_with_a_policy(tmp_path, monkeypatch):
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>clips</title>")
    (folder / "app.js").write_text("1")
    (folder / "notes.txt").write_text("not for the page")
    (tmp_path / "secret.js").write_text("2")
    monkeypatch.setattr("vfengine.serving.app._PAGE_FOLDER", folder)
    with serving(Store(tmp_path / "store", durable=False)) as server:
        status, headers, page = ask(server, "GET", "/")
        assert (status, page) == (200, b"<!doctype html><title>clips</title>")
        assert headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'self'" in headers["content-security-policy"]
        status, headers, script = ask(server, "GET", "/static/app.js")
        assert (status, script) == (200, b"1")
        assert headers["content-type"] == "text/javascript; charset=utf-8"
        for name in ("notes.txt", "..%2fsecret.js", "../secret.js", ""):
            assert ask(server, "GET", f"/static/{name}")[0] == 404
