"""The official client, as it is, against a server on loopback."""

import asyncio
import base64
import io
import json
import urllib.request
from dataclasses import replace

import openai
import pytest
from api_server import INFO, PICTURES, PROMPTED, VIDEO, serving
from PIL import Image

from vfengine.serving.gate import GateOptions
from vfengine.serving.jobs import SOURCE, UPLOAD

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


@pytest.fixture
def server(store):
    with serving(store) as running:
        yield running


@pytest.fixture
def paused(store):
    """A server whose jobs stay in the queue."""
    with serving(store, paused=True) as running:
        yield running


def client_of(server, **options):
    options = {"api_key": "x", "max_retries": 0, **options}
    return openai.OpenAI(base_url=server.api, **options)


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


def extend(videos, video, **fields):
    """The client takes {"id": …} for a file, and refuses it, unless it is in extra_body."""
    return videos.extend(video=openai.omit, extra_body={"video": {"id": video.id}}, **fields)


def png(size=(20, 16), color=(200, 10, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


# -- what the client can do ------------------------------------------------------------------------


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


def test_fields_beyond_the_clients_own(client, store):
    extra = {
        **{"seed": 7, "num_inference_steps": 5, "guidance_scale": 1.5, "fps": 4, "num_frames": 8},
        **{"solver": "dpmsolver++", "base_path": "stepwise", "format": "webm", "scale": 2},
    }
    video = client.videos.create(prompt="walk", extra_body=extra)
    settings = store.get(video.id).settings
    assert (settings.label, settings.prompt) == ("walk", None)
    assert (settings.base_seed, settings.residual_seed) == (7, 8)
    assert (settings.num_frames, settings.fps, settings.scale) == (8, 4.0, 2)
    assert (settings.solver, settings.base_path, settings.format) == (
        *("dpmsolver++", "stepwise"),
        "webm",
    )
    assert (video.seconds, video.size, video.seed) == ("2", "32x32", 7)
    assert (video.num_frames, video.num_inference_steps, video.guidance_scale) == (8, 5, 1.5)


def test_defaults_are_the_models_and_seeds_are_told(client, store):
    first, second = (client.videos.create(prompt="jump") for _ in range(2))
    settings = store.get(first.id).settings
    assert (settings.num_frames, settings.fps) == (INFO.num_frames, INFO.fps)
    assert (settings.num_inference_steps, settings.solver) == (INFO.steps, INFO.solver)
    assert (first.seconds, first.size, first.model) == ("0.5", "16x16", "tiny")
    assert first.seed != second.seed and 0 <= first.seed < 2**32


def test_a_picture_as_a_file_and_as_a_data_url(client, store):
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    file = {"input_reference": ("a.png", png(), "image/png")}
    by_url = {"extra_body": {"input_reference": {"image_url": url}}}  # as an argument it is refused
    for reference in (file, by_url):
        video = client.videos.create(prompt="jump", **reference)
        assert store.get(video.id).settings.picture and video.animates_picture
        with Image.open(store.file(video.id, UPLOAD)) as kept:
            assert (kept.format, kept.mode, kept.size) == ("PNG", "RGB", (16, 16))
            assert kept.getpixel((3, 3)) == (200, 10, 30)


def test_list_goes_over_all_pages(paused):
    with client_of(paused) as client:
        made = [client.videos.create(prompt="jump").id for _ in range(7)]
        page = client.videos.list(limit=3)
        assert [video.id for video in page.data] == made[:3:-1] and page.has_more
        assert [video.id for video in client.videos.list(limit=3)] == made[::-1]
        assert [video.id for video in client.videos.list(limit=3, order="asc")] == made
        assert [video.id for video in client.videos.list(after=made[2], order="asc")] == made[3:]
        client.videos.delete(made[0])
        assert [video.id for video in client.videos.list(limit=2, order="asc")] == made[1:]


def test_an_empty_list_is_a_page(client):
    assert list(client.videos.list()) == []


def test_delete(client, store):
    video = client.videos.create_and_poll(prompt="jump")
    gone = client.videos.delete(video.id)
    assert (gone.id, gone.object, gone.deleted) == (video.id, "video.deleted", True)
    assert not store.folder_of(video.id).exists()
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError) as caught:
            call(video.id)
        assert caught.value.code == "video_not_found"


def test_delete_of_a_running_job_stops_it(paused):
    with client_of(paused) as client:
        video = client.videos.create(prompt="jump")
        (job,) = paused.engines.claim()
        assert client.videos.retrieve(video.id).status == "in_progress"
        assert client.videos.delete(video.id).deleted
        assert not paused.store.holds(job.id, "fake")  # what its engine asks at every step


def test_the_base_frame_is_there_before_the_clip(paused):
    with client_of(paused) as client:
        video = client.videos.create(prompt="jump")
        (job,) = paused.engines.claim()
        paused.engines.begin(job)
        video = client.videos.retrieve(video.id)
        assert (video.status, video.phase, video.progress) == ("in_progress", "residual", 40)
        thumbnail = client.videos.download_content(video.id, variant="thumbnail")
        assert thumbnail.content == PICTURES["thumbnail.png"]
        with pytest.raises(openai.NotFoundError, match="in progress, 40 %"):
            client.videos.download_content(video.id)


def test_places_in_the_queue(paused):
    with client_of(paused) as client:
        made = [client.videos.create(prompt="jump") for _ in range(3)]
        assert [video.queue_position for video in made] == [1, 2, 3]
        client.videos.delete(made[0].id)
        assert client.videos.retrieve(made[2].id).queue_position == 2


def test_remix_keeps_the_look(client, store):
    video = client.videos.create_and_poll(prompt="jump", extra_body={"seed": 3})
    same = client.videos.remix(video.id, prompt="jump")
    other = client.videos.remix(video.id, prompt="walk", extra_body={"residual_seed": 99})
    again = client.videos.remix(other.id, prompt="cartwheel")
    settings = {one.id: store.get(one.id).settings for one in (video, same, other, again)}
    assert {one.base_seed for one in settings.values()} == {3}
    assert len({one.residual_seed for one in settings.values()}) == 4
    assert other.residual_seed == 99 and other.remixed_from_video_id == video.id
    assert [settings[one.id].label for one in (same, other, again)] == ["jump", "walk", "cartwheel"]
    look = {"label": "jump", "prompt": None, "negative_prompt": ""}
    assert [settings[one.id].look for one in (same, other, again)] == [None, look, look]
    assert client.videos.remix(again.id, prompt="jump").look is None


def test_remix_of_a_picture_has_it_too(client, store):
    video = client.videos.create(prompt="jump", input_reference=("a.png", png(), "image/png"))
    remix = client.videos.remix(video.id, prompt="jump")
    client.videos.delete(video.id)
    assert store.get(remix.id).settings.picture
    with Image.open(store.file(remix.id, UPLOAD)) as kept:
        assert kept.size == (16, 16)


def test_extend_a_video_by_its_id(client, store):
    video = client.videos.create_and_poll(prompt="jump", extra_body={"num_inference_steps": 6})
    longer = extend(client.videos, video, prompt="walk", seconds="0.25")
    settings = store.get(longer.id).settings
    assert (longer.seconds, longer.size) == ("0.75", video.size)  # the whole of it
    assert (settings.num_frames, settings.extends, settings.label) == (2, video.id, "walk")
    assert settings.num_inference_steps == 6
    assert store.file(longer.id, SOURCE).read_bytes() == PICTURES["spritesheet.png"]
    longer = client.videos.poll(longer.id)
    assert (longer.status, longer.seconds, longer.num_frames) == ("completed", "0.75", 6)
    more = extend(client.videos, longer, prompt="walk", seconds="0.5")
    assert more.seconds == "1.25"


def test_extend_a_video_that_is_sent(client, store):
    clip = b"\0\0\0\x20ftypisom" + bytes(5000)
    longer = client.videos.extend(prompt="walk", seconds="0.5", video=("a.mp4", clip, "video/mp4"))
    assert store.file(longer.id, SOURCE).read_bytes() == clip
    settings = store.get(longer.id).settings
    assert (settings.extends, settings.num_frames) == ("", 4)


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "vfengine")
    assert client.models.retrieve("tiny").labels == ["cartwheel", "jump", "walk"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("sora-2")
    assert caught.value.code == "model_not_found"


def test_a_model_whose_name_has_a_slash(store):
    with serving(store, replace(INFO, name="lab/tiny")) as server, client_of(server) as client:
        assert client.models.retrieve("lab/tiny").id == "lab/tiny"
        assert client.videos.create(prompt="jump", model="lab/tiny").model == "lab/tiny"


def test_all_of_it_async(server):
    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=server.api, api_key="x", max_retries=0)
        async with client:
            videos = client.videos
            made = [videos.create_and_poll(prompt="jump", seconds="0.5") for _ in range(4)]
            made = await asyncio.gather(*made)
            assert {video.status for video in made} == {"completed"}
            remix = await videos.remix(made[0].id, prompt="walk")
            longer = await extend(videos, made[1], prompt="jump", seconds="0.5")
            content = await videos.download_content(made[0].id, variant="video")
            assert content.content == VIDEO
            picture = ("a.png", png(), "image/png")
            drawn = await videos.create(prompt="jump", input_reference=picture)
            listed = [video.id async for video in videos.list(limit=3)]
            others = {video.id for video in (remix, longer, drawn, *made)}
            assert len(listed) == 7 and set(listed) == others
            assert (await videos.delete(made[0].id)).deleted
            assert [model.id async for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.NotFoundError):
                await videos.retrieve(made[0].id)

    asyncio.run(run())


# -- errors ----------------------------------------------------------------------------------------


def test_a_bad_field_is_named(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="jump", size="100x100")
    error = caught.value
    assert (error.param, error.code, error.type) == (
        *("size", "invalid_value"),
        "invalid_request_error",
    )
    assert "16x16, 32x32, 48x48, 64x64" in str(error) and error.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError, match="knows no free text: prompt must be one of"):
        client.videos.create(prompt="a dog")
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.create(prompt="jump", extra_body={"num_step": 3})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "num_step")
    assert server.rows() == 0


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.create(prompt="jump", model="sora-2")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_what_is_not_supported_says_what_is(client):
    clip = ("a.mp4", b"\0\0\0\x20ftypisom", "video/mp4")
    with pytest.raises(openai.BadRequestError, match="remix makes another motion") as caught:
        client.videos.edit(prompt="jump", video=clip)
    assert caught.value.code == "unsupported"
    with pytest.raises(openai.BadRequestError, match="input_reference animates a picture"):
        client.videos.create_character(name="me", video=clip)
    with pytest.raises(openai.BadRequestError, match="keeps no characters"):
        client.videos.get_character("me")


def test_a_full_queue(store):
    with serving(store, paused=True, max_queue=2) as server, client_of(server) as client:
        for _ in range(2):
            client.videos.create(prompt="jump")
        with pytest.raises(openai.RateLimitError) as caught:
            client.videos.create(prompt="jump")
        assert caught.value.code == "queue_full" and server.rows() == 2
        assert float(caught.value.response.headers["retry-after-ms"]) > 0


def test_a_failed_job_is_told_and_not_raised(paused):
    with client_of(paused) as client:
        video = client.videos.create(prompt="jump")
        paused.engines.claim()
        paused.store.fail(video.id, "fake", "out_of_memory", "try fewer frames", None)
        video = client.videos.poll(video.id)
        assert video.status == "failed"
        assert (video.error.code, video.error.message) == ("out_of_memory", "try fewer frames")
        with pytest.raises(openai.NotFoundError, match="failed: try fewer frames"):
            client.videos.download_content(video.id)


def test_keys_of_the_client(store):
    with serving(store, paused=True, gate=GateOptions(keys=("right", "other"))) as server:
        with client_of(server, api_key="wrong") as client:
            for call in (client.videos.list, client.models.list):
                with pytest.raises(openai.AuthenticationError) as caught:
                    call()
                assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):  # whatever it would send
                client.videos.create(prompt="jump", input_reference=("a.png", bytes(10**6)))
        assert server.rows() == 0
        with client_of(server, api_key="right") as client:
            headers = {"extra_headers": {"Idempotency-Key": "a"}}
            mine = client.videos.create(prompt="jump", **headers)
        with client_of(server, api_key="other") as client:
            assert client.videos.create(prompt="jump", **headers).id != mine.id


def test_a_foreign_name_is_forbidden(client):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.videos.list(extra_headers={"Host": "evil.example"})
    assert caught.value.code == "unknown_host"


def test_a_picture_that_is_too_large(store):
    with serving(store, gate=GateOptions(max_body=100_000)) as server, client_of(server) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.videos.create(prompt="jump", input_reference=("a.png", bytes(3_000_000)))
        assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


# -- other clients ---------------------------------------------------------------------------------


def post_json(url: str, value) -> dict:
    request = urllib.request.Request(
        url, json.dumps(value).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_json_as_older_clients_send_it(server, store):
    """openai 2.x sends JSON where there is no file."""
    body = {"prompt": "jump", "model": "tiny", "seconds": "0.5", "size": "16x16"}
    video = post_json(f"{server.api}/videos", body)
    assert store.get(video["id"]).settings.label == "jump" and video["seconds"] == "0.5"
    extra = {"prompt": "jump", "seed": 5, "num_frames": 3, "guidance_scale": 2, "negative": None}
    video = post_json(f"{server.api}/videos", {**extra, "seconds": 0.375})
    assert (video["seed"], video["num_frames"], video["seconds"]) == (5, 3, "0.375")
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    video = post_json(
        f"{server.api}/videos", {"prompt": "jump", "input_reference": {"image_url": url}}
    )
    assert video["animates_picture"]
    longer = {"prompt": "jump", "seconds": "0.5", "video": {"id": video["id"]}}
    client_of(server).videos.poll(video["id"])
    assert post_json(f"{server.api}/videos/extensions", longer)["extends"] == video["id"]
    assert post_json(f"{server.api}/videos/{video['id']}/remix", {"prompt": "walk"})["look"]


def test_free_text(store):
    with serving(store, PROMPTED, paused=True) as server, client_of(server) as client:
        video = client.videos.create(
            prompt="a red  dog", extra_body={"negative_prompt": "a cat, blurred"}
        )
        settings = store.get(video.id).settings
        assert (settings.prompt, settings.label) == ("a red  dog", None)
        assert settings.negative_prompt == "a cat, blurred" and video.prompt == "a red  dog"
        remix = client.videos.remix(video.id, prompt="a blue dog")
        settings = store.get(remix.id).settings
        assert (settings.prompt, settings.negative_prompt) == ("a blue dog", "a cat, blurred")
        assert settings.look["prompt"] == "a red  dog"
