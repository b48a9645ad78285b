"""The official client, as it is, against a server on loopback."""

import openai
import pytest
from api_server import PICTURES, VIDEO, serving

from vfengine.serving.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


@pytest.fixture
def server(tmp_path):
    with serving(Store(tmp_path / "store", durable=False)) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.api, api_key="x", max_retries=0) as client:
        yield client


def test_create_and_poll_then_every_file(client, tmp_path):
    video = client.videos.create_and_poll(prompt="jump", seconds="0.5", size="32x32", model="tiny")
    assert (video.status, video.progress, video.object) == ("completed", 100, "video")
    assert (video.seconds, video.size, video.model) == ("0.5", "32x32", "tiny")
    assert video.error is None and video.completed_at >= video.created_at
    assert client.videos.download_content(video.id).read() == VIDEO
    for variant in ("thumbnail", "spritesheet"):
        content = client.videos.download_content(video.id, variant=variant)
        assert content.content == PICTURES[f"{variant}.png"]
        assert content.response.headers["content-type"] == "image/png"
    client.videos.download_content(video.id, variant="video").write_to_file(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == VIDEO
