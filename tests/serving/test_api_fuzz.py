"""Random requests: none is an error of the server's, and none leaves anything outside its jobs."""

import http.client
import itertools
import json

from api_server import serving
from fuzz_requests import fuzzed

from vfengine.serving.store import Store

COUNT = 300


def test_random_requests(tmp_path, capfd):
    store = Store(tmp_path / "store", durable=False)
    with serving(store, max_queue=10) as server:
        ids = []
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request("POST", "/v1/videos", json.dumps({"prompt": "jump"}))
            ids.append(json.loads(connection.getresponse().read())["id"])
        statuses = set()
        for request in itertools.islice(fuzzed(0, ids), COUNT):
            try:
                connection.request(request.method, request.path, request.body, request.headers)
                answer = connection.getresponse()
                body = answer.read()
            except http.client.HTTPException as error:
                raise AssertionError(request) from error
            statuses.add(answer.status)
            assert answer.status < 500, request
            if answer.status >= 400 and request.method != "HEAD":
                assert json.loads(body)["error"]["message"], request
        assert {200, 400, 404, 405} <= statuses
        connection.close()
        rows = {job.id for job in store.list(limit=1000)[0]}
    assert {folder.name for folder in (tmp_path / "store" / "jobs").iterdir()} <= rows
    found = {file.name for file in tmp_path.iterdir()} | {
        file.name for file in (tmp_path / "store").iterdir() if not file.name.startswith("jobs")
    }
    assert found == {"store"}
    assert "Traceback" not in capfd.readouterr().err
