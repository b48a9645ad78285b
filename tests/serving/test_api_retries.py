"""The official client tries again by itself: nothing is done twice."""

from contextlib import ExitStack

import pytest
from api_server import serving
from test_api_client import client_of, png

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def test_a_retry_after_a_full_queue_is_one_job(store, stack):
    """The client waits as it is told, and asks again; then there is room."""
    tries = []

    def watched(app):
        async def watch(scope, receive, send):
            if scope["type"] == "http" and scope["method"] == "POST":
                tries.append(scope["path"])
                if len(tries) == 3:
                    store.delete(first.id)
            await app(scope, receive, send)

        return watch

    server = stack.enter_context(serving(store, paused=True, max_queue=1, wrap=watched))
    client = stack.enter_context(client_of(server, max_retries=2))
    first = client.videos.create(prompt="jump")
    second = client.videos.create(prompt="walk")
    assert len(tries) == 3
    assert [video.id for video in client.videos.list()] == [second.id]


class CutAfterAnswer:
    """An ASGI app whose first answer to a POST never reaches the client."""

    def __init__(self, app):
        self.app, self.posts = app, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        self.posts += 1
        if self.posts > 1:
            return await self.app(scope, receive, send)

        async def nowhere(message):
            pass

        await self.app(scope, receive, nowhere)
        raise ConnectionError("cut")  # the server closes the connection without an answer


@pytest.mark.parametrize("named", [True, False])
def test_a_connection_that_is_cut_after_acceptance(store, stack, named):
    """With an Idempotency-Key the retry finds the job; without one nobody can tell that it is."""
    apps = []

    def cutting(app):
        apps.append(CutAfterAnswer(app))
        return apps[0]

    server = stack.enter_context(serving(store, paused=True, wrap=cutting))
    client = stack.enter_context(client_of(server, max_retries=2))
    headers = {"Idempotency-Key": "order 1"} if named else {}
    picture = ("a.png", png(), "image/png")
    video = client.videos.create(prompt="jump", input_reference=picture, extra_headers=headers)
    assert apps[0].posts == 2
    assert server.rows() == (1 if named else 2)
    folders = [folder.name for folder in (store.folder / "jobs").iterdir()]
    assert len(folders) == server.rows() and video.id in folders


def test_the_names_of_requests_belong_to_their_path_and_key(store):
    with serving(store, paused=True) as server, client_of(server) as client:
        headers = {"extra_headers": {"Idempotency-Key": "a"}}
        first = client.videos.create(prompt="jump", **headers)
        assert client.videos.create(prompt="jump", **headers).id == first.id
        remix = client.videos.remix(first.id, prompt="jump", **headers)
        assert remix.id != first.id and server.rows() == 2
