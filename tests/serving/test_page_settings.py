"""What the page asks the server for, and what it makes of a clip's settings."""

import io
import re
import shlex
from dataclasses import replace

import pytest
from page_steps import finished, generate
from PIL import Image
from playwright.sync_api import expect
from scripted_api import SHIPPED, TEXT, ScriptedApi, png

from vfengine.cli.settings import read_settings

pytest_plugins = ["page_fixtures"]


def test_another_motion_is_a_remix_with_a_new_seed(page, api):
    id = finished(api, page, guidance_scale=3.5)
    page.get_by_role("button", name="Another motion of this look").click()
    expect(page.locator(".job")).to_have_count(2)
    made, source = api.newest(2), api.store.get(id)
    assert made.remixed_from == id and made.settings.residual_seed != 12
    assert replace(made.settings, residual_seed=12) == source.settings
    api.finish(made.id)
    expect(page.locator("#facts")).to_contain_text(str(made.settings.residual_seed))


def test_another_look_changes_the_look_alone(page, api):
    values = {"guidance_scale": 3.5, "num_frames": 5, "negative_prompt": "cats", "eta": 0.5}
    values |= {"base_path": "stepwise", "scale": 2, "fps": 10.0, "format": "gif"}
    id = finished(api, page, **values)
    page.get_by_role("button", name="Another look").click()
    expect(page.locator(".job")).to_have_count(2)
    made = api.newest(2).settings
    assert made.base_seed != 11 and replace(made, base_seed=11) == api.store.get(id).settings


def test_a_clip_is_extended(page, api):
    id = finished(api, page)
    page.get_by_role("button", name="Extend", exact=True).click()
    expect(page.get_by_label("Seconds to add")).to_be_focused()
    page.get_by_role("button", name="Extend the clip").click()
    expect(page.locator(".job")).to_have_count(2)
    made = api.newest(2)
    assert made.settings.extends == id and made.settings.prompt == "a dog"
    assert made.settings.num_frames == 4 and made.seconds == "1.5"  # half a clip more
    api.finish(made.id)
    expect(page.get_by_role("button", name="Extend", exact=True)).to_be_visible()
    for name in ("Another look", "Copy as command line"):
        expect(page.get_by_role("button", name=name)).to_be_hidden()


@pytest.mark.parametrize("kept", [False, True])
def test_a_seed_stays_while_its_look_is_kept(page, api, kept):
    finished(api, page)
    look = page.get_by_label("Look", exact=True)
    page.get_by_role("button", name="New seed of the look").click()
    expect(look).to_have_value(re.compile(r"^\d+$"))
    page.get_by_label("keep look").uncheck()
    expect(look).to_have_value("")
    if kept:
        page.get_by_label("keep look").check()
        expect(look).to_have_value("11")  # of the clip that is shown
    generate(page, "a bird")
    assert (api.newest(2).settings.base_seed == 11) is kept


def test_a_label_takes_the_place_of_a_prompt(page, api):
    page.get_by_label("Take a label as the prompt").select_option("dance_a")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".job")).to_contain_text("dance_a")
    assert api.newest(1).settings.label == "dance_a" and api.newest(1).settings.prompt is None


@pytest.mark.parametrize("api", [{"info": replace(SHIPPED, takes_prompts=False)}], indirect=True)
def test_a_model_without_prompts_has_a_list_of_labels(page, api):
    page.get_by_label("Label", exact=True).select_option("jump")
    expect(page.get_by_label("Prompt", exact=True)).to_be_hidden()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".job")).to_contain_text("jump")
    assert api.newest(1).settings.label == "jump"


@pytest.mark.parametrize("api", [{"info": TEXT}], indirect=True)
def test_a_model_without_a_base_has_one_seed(page, api):
    finished(api, page, base_seed=7, residual_seed=7)
    for name in ("Another motion of this look", "Extend"):
        expect(page.get_by_role("button", name=name, exact=True)).to_be_hidden()
    for hidden in ("#base_seed", "#picture"):
        expect(page.locator(hidden)).to_be_hidden()
    page.get_by_label("Seed", exact=True).fill("5")
    generate(page, "a bird")
    assert api.newest(2).settings.base_seed == 5
    page.locator(".pick").last.click()
    page.get_by_role("button", name="Another clip").click()
    expect(page.locator(".job")).to_have_count(3)
    made = api.newest(3).settings
    assert made.prompt == "a dog" and made.base_seed not in (5, 7)


def test_a_picture_is_chosen_shown_and_removed(page, api):
    picture = {"name": "dog.png", "mimeType": "image/png", "buffer": png()}
    page.get_by_label("Picture to animate").set_input_files(picture)
    expect(page.get_by_alt_text("The picture to animate")).to_be_visible()
    expect(page.get_by_label("Look", exact=True)).to_be_disabled()  # the picture is the look
    page.get_by_role("button", name="Remove the picture").click()
    expect(page.get_by_alt_text("The picture to animate")).to_be_hidden()
    page.get_by_label("Picture to animate").set_input_files(picture)
    generate(page)
    assert sent_pixels(api) == pixels(png())


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(page, api, event):
    page.evaluate(
        """([type, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
            const init = { bubbles: true, cancelable: true };
            const event = type === "paste"
                ? new ClipboardEvent(type, { ...init, clipboardData: data })
                : new DragEvent(type, { ...init, dataTransfer: data });
            document.body.dispatchEvent(event);
        }""",
        [event, list(png())],
    )
    expect(page.get_by_alt_text("The picture to animate")).to_be_visible()
    generate(page)
    assert sent_pixels(api) == pixels(png())


def sent_pixels(api: ScriptedApi) -> bytes:
    """Of the picture from which the only job starts."""
    job = api.newest(1)
    assert job.settings.picture
    return pixels(api.store.file(job.id, "upload").read_bytes())


def pixels(picture: bytes) -> bytes:
    return Image.open(io.BytesIO(picture)).convert("RGB").tobytes()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"prompt": 'it\'s "quoted" $HOME `ls`\n& more', "negative_prompt": "--not 'this'"},
        {"prompt": None, "label": "jump", "scale": 3, "base_seed": 2**63 + 1, "format": "gif"},
        {"solver": "dpmsolver++", "guidance_scale": 3.5, "num_frames": 12, "base_path": "stepwise"},
        {"picture": True, "format": "webp", "base_path": None, "eta": 0.25},
    ],
)
def test_copied_command_line_says_the_same_settings(opened, api, values):
    id = api.add(**{"prompt": "-a dog", **values})
    api.finish(id)
    allowed = ["clipboard-read", "clipboard-write"]
    with opened(permissions=allowed) as page:
        page.get_by_role("button", name="Copy as command line").click()
        expect(page.locator("#live")).to_have_text("Copied.")
        line = page.evaluate("navigator.clipboard.readText()")
    assert line.startswith("vfengine generate ")
    settings, made = read_settings(shlex.split(line)[2:]), api.store.get(id).settings
    same = ["prompt", "label", "negative_prompt", "residual_seed", "num_frames", "solver", "fps"]
    same += ["num_inference_steps", "guidance_scale", "eta", "scale"]
    same += [] if made.picture else ["base_seed", "base_path"]
    for name in same:
        assert getattr(settings, name) == getattr(made, name), name
    assert settings.output.endswith(f".{made.format}") and settings.model is None
    assert (settings.image is not None) == made.picture


def test_settings_of_a_clip_are_used_again(page, api):
    values = {"guidance_scale": 3.5, "num_frames": 12, "solver": "ddpm", "scale": 2}
    values |= {"base_seed": 2**64 - 1, "residual_seed": 9, "negative_prompt": "cats"}
    id = finished(api, page, **values, num_inference_steps=7, format="webp")
    page.get_by_role("button", name="Use these settings").click()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".job")).to_have_count(2)
    assert api.newest(2).settings == api.store.get(id).settings


def test_the_base_frame_of_an_animated_picture_is_used_again(page, api):
    id = finished(api, page, picture=True, base_path=None)
    page.get_by_role("button", name="Use these settings").click()
    expect(page.get_by_alt_text("The picture to animate")).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".job")).to_have_count(2)
    assert replace(api.newest(2).settings, base_seed=11) == api.store.get(id).settings


def test_a_clip_is_downloaded_under_a_name_that_tells(page, api):
    id = finished(api, page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-dog-11-12.mp4"
    with open(download.value.path(), "rb") as file:
        assert file.read() == api.store.file(id, "video.mp4").read_bytes()
