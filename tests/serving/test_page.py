"""The page of `vfengine serve` in headless Chromium, over an API whose clips go on as told."""

import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import av
import numpy as np
import pytest
from chromium import FLAGS, find_chromium
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from scripted_api import SHIPPED, TEXT, ScriptedApi, png, scripted

from vfengine.cli.generate import main
from vfengine.cli.settings import read_settings


@pytest.fixture(scope="module")
def browser():
    try:
        chromium = find_chromium()
    except FileNotFoundError as error:
        pytest.fail(str(error), pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def api(tmp_path, request):
    """A server with the options of `scripted` that a test's parameter holds."""
    with scripted(tmp_path, **getattr(request, "param", {})) as api:
        yield api


@pytest.fixture
def opened(browser, api):
    """Opens the page: (path="", expected errors of the console, other server, context)."""

    @contextmanager
    def opened(path="", errors=(), at=None, **context):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        context.set_default_timeout(10_000)
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda line: said.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((at or api.url) + path)
        host = urlparse(page.url).netloc
        yield page
        context.close()
        # Chromium prints refused requests as errors of its own
        assert [line for line in said if not any(error in line for error in errors)] == []
        hosts = {urlparse(url).netloc for url in asked if not url.startswith(("blob:", "data:"))}
        assert hosts == {host}

    return opened


@pytest.fixture
def page(opened):
    with opened() as page:
        expect(page.locator("#generate")).to_be_enabled()
        yield page


def write(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)


def generate(page: Page, prompt: str = "a dog") -> None:
    write(page, prompt)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".job").first).to_contain_text(prompt)


def finished(api: ScriptedApi, page: Page, **values) -> str:
    """A finished clip, which the page shows."""
    id = api.add(prompt="a dog", **values)
    api.finish(id)
    page.reload()
    expect(page.locator("#clip-video, #clip-image").locator("visible=true")).to_be_visible()
    return id


def test_page_is_used_by_keyboard_alone(page, api):
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt", exact=True)).not_to_be_focused()  # the labels come first
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.type("a cat's walk")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".job")).to_have_count(1)
    made = api.newest(1).settings
    assert made.prompt == "a cat's walk" and made.label is None and made.negative_prompt == ""
    assert made.num_frames == 8 and made.scale == 1 and made.format == "mp4"
    assert made.num_inference_steps == 20 and made.guidance_scale == 2 and made.solver == "ddim"
    api.finish(api.newest(1).id)
    expect(page.locator("#clip-video")).to_be_visible()
    page.keyboard.press("Tab")  # on from where the focus was
    seen = []
    for _ in range(40):
        seen.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    wanted = ["negative_prompt", "picture", "base_seed", "keep-look", "residual_seed", "seconds"]
    wanted += ["num_inference_steps", "guidance_scale", "size", "format", "solver", "generate"]
    wanted += ["play", "another-motion", "another-look", "extend", "download", "use-settings"]
    wanted += ["copy-command", "delete"]
    assert [name for name in seen if name in wanted][: len(wanted)] == wanted


def test_base_frame_is_shown_before_the_clip(page, api):
    generate(page)
    id = api.newest(1).id
    expect(page.locator("#screen-text")).to_have_text("Waiting, next")
    api.begin(id)
    expect(page.locator("#base-frame")).to_be_visible()
    expect(page.locator("#screen-badge")).to_have_text("base frame")
    expect(page.locator("#clip-video")).to_be_hidden()
    expect(page.locator(".job .job-status")).to_have_text("making the look · 40 %")
    api.go_on(id, "residual", 62)
    expect(page.locator(".job .job-status")).to_have_text("making the motion · 62 %")
    expect(page.locator("#screen-progress")).to_have_js_property("value", 62)
    api.finish(id)
    expect(page.locator("#clip-video")).to_be_visible()
    expect(page.locator("#base-frame")).to_be_hidden()
    assert page.evaluate("document.querySelector('#clip-video').loop")
    expect(page.locator("#clip-video")).to_have_js_property("paused", False)
    expect(page.locator("#live")).to_have_text("a dog: done")
    expect(page.locator("#facts")).to_contain_text("2.6 s")


def test_page_polls_only_while_something_runs(page, api):
    def polls_of_a_minute() -> int:
        before = api.polls()
        page.clock.run_for(60_000)
        return api.polls() - before

    page.clock.install()
    assert polls_of_a_minute() == 0
    generate(page)
    before = api.polls()
    while api.polls() < before + 3:
        page.wait_for_timeout(20)
    hide(page, True)
    assert polls_of_a_minute() == 0
    api.finish(api.newest(1).id)
    hide(page, False)
    expect(page.locator("#clip-video")).to_be_visible()
    assert polls_of_a_minute() == 0


def hide(page: Page, hidden: bool) -> None:
    """As a browser does to a tab that is not in front."""
    page.evaluate(
        """(value) => {
            Object.defineProperty(document, "hidden", { value, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )
    page.wait_for_load_state("networkidle")


def test_a_running_clip_is_stopped(page, api):
    generate(page)
    api.begin(api.newest(1).id)
    for picture in ("#base-frame", ".job img"):
        expect(page.locator(picture)).to_be_visible()
    page.get_by_role("button", name="Stop a dog").click()
    expect(page.locator(".job")).to_have_count(0)
    expect(page.locator("#live")).to_have_text("Stopped.")
    expect(page.locator("#screen-text")).to_have_text("Your clip will be here.")
    assert api.jobs() == []


def test_a_finished_clip_is_deleted_at_the_second_press(opened, api):
    api.finish(api.add(prompt="a dog"))
    with opened(errors=["ERR_FILE_NOT_FOUND"]) as page:
        expect(page.locator(".job img")).to_be_visible()
        url = page.locator(".job img").get_attribute("src")
        page.get_by_role("button", name="Delete").click()
        assert len(api.jobs()) == 1
        page.get_by_role("button", name="Press again to delete").click()
        expect(page.locator(".job")).to_have_count(0)
        assert api.jobs() == []
        load = "url => Object.assign(new Image(), { src: url }).decode().then(() => 1, () => 0)"
        assert page.evaluate(load, url) == 0  # the browser has let go of it


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


@pytest.mark.parametrize("api", [{"keys": ("secret",)}], indirect=True)
def test_a_key_is_asked_for_and_kept_in_the_tab(opened, api):
    api.finish(api.add(prompt="a dog"))
    with opened(errors=["401"]) as page:
        expect(page.get_by_role("dialog")).to_be_visible()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_contain_text("got a wrong key")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(page.locator("#clip-video")).to_be_visible()  # whose file needs the key as well
        page.reload()
        expect(page.locator("#clip-video")).to_be_visible()
        assert page.evaluate("JSON.stringify(Object.values(sessionStorage))") == '["secret"]'
        assert page.evaluate("localStorage.length") == 0


def test_what_the_api_says_against_a_request_is_shown(opened, api):
    with opened(errors=["400"]) as page:
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#form-error")).to_contain_text("it says what to show")
        expect(page.get_by_label("Prompt", exact=True)).to_have_attribute("aria-invalid", "true")
        expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
        page.get_by_label("Steps").fill("5000")
        write(page, "a dog")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#form-error")).to_contain_text("num_inference_steps")
        expect(page.get_by_label("Steps")).to_be_focused()
        page.get_by_label("Steps").fill("9")
        generate(page)
        expect(page.locator("#form-error")).to_be_hidden()
        assert api.newest(1).settings.num_inference_steps == 9


def test_what_failed_is_shown(page, api):
    generate(page)
    api.fail(api.newest(1).id, "there was too little memory")
    expect(page.locator("#about-error")).to_have_text("there was too little memory")
    expect(page.locator("#screen-text")).to_have_text("This clip failed.")
    expect(page.locator(".job-status")).to_contain_text("failed")


def test_a_full_queue_is_waited_for(opened, api):
    api.refusals = 2
    with opened(errors=["429"]) as page:
        write(page, "a dog")
        page.get_by_role("button", name="Generate").click()
        said = "The queue is full. Trying again in 1 s."
        expect(page.locator("#waiting-text")).to_have_text(said)
        expect(page.locator(".job")).to_have_count(1)
        expect(page.locator("#waiting")).to_be_hidden()
        assert len(api.names) == 3 and len(set(api.names)) == 1
        api.refusals = 1000
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#waiting")).to_be_hidden()
        assert len(api.jobs()) == 1


def test_a_server_that_is_gone_is_waited_for(opened, api):
    with opened(errors=["ERR_", "Failed to load"]) as page:
        generate(page)
        page.context.set_offline(True)
        expect(page.locator("#banner-text")).to_contain_text("The server cannot be reached.")
        page.get_by_role("button", name="Try now").click()
        expect(page.locator("#banner-text")).to_contain_text("Trying again in")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#waiting-text")).to_contain_text("The server cannot be reached.")
        page.context.set_offline(False)
        expect(page.locator("#banner")).to_be_hidden()
        expect(page.locator(".job")).to_have_count(2)
        api.finish(api.newest(2).id)
        expect(page.locator("#clip-video")).to_be_visible()


def test_clips_survive_a_reload_and_are_listed_in_pages(opened, api):
    for number in range(45):
        api.finish(api.add(prompt=f"dog number {number}"))
    with opened() as page:
        expect(page.locator(".job")).to_have_count(20)
        for count in (40, 45):
            page.get_by_role("button", name="Show older clips").click()
            expect(page.locator(".job")).to_have_count(count)
        expect(page.locator("#more")).to_be_hidden()
        prompts = page.locator(".job-prompt").all_inner_texts()
        assert prompts == [f"dog number {number}" for number in reversed(range(45))]
        page.get_by_role("button", name="dog number 3", exact=False).last.click()
        expect(page.locator("#about-prompt")).to_have_text("dog number 3")
        generate(page, "one more")  # what was listed stays
        api.finish(api.newest(46).id)
        expect(page.locator(".job-status").first).to_contain_text("2.6 s")
        expect(page.locator(".job")).to_have_count(46)
        page.reload()
        expect(page.locator(".job-prompt").first).to_have_text("one more")
        expect(page.locator("#about-prompt")).to_have_text("one more")


@pytest.mark.parametrize("api", [{"info": replace(SHIPPED, labels=("x" * 60,))}], indirect=True)
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_fits_its_width(opened, api, width):
    clip = api.add(prompt="a" * 200, base_seed=2**64 - 1)
    api.finish(clip)
    api.fail(api.add(prompt="a dog"), "b" * 200)
    with opened(f"#{clip}", viewport={"width": width, "height": 740}) as page:
        expect(page.locator("#clip-video")).to_be_visible()
        page.get_by_role("button", name="Extend", exact=True).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator(".pick").first.click()
        expect(page.locator("#about-error")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light_differ_and_can_be_read(opened, api):
    colours = {}
    for scheme in ("light", "dark"):
        with opened(color_scheme=scheme) as page:
            expect(page.locator("#generate")).to_be_enabled()
            colours[scheme] = page.evaluate(
                """() => ["body", "#form", ".faint", "#generate"].map((name) => {
                    const style = getComputedStyle(document.querySelector(name));
                    return [style.backgroundColor, style.color];
                })"""
            )
            shot = page.screenshot()
            colours[scheme].append(shot)
    assert colours["light"][4] != colours["dark"][4]
    for scheme in colours.values():
        panel = scheme[1][0]
        assert contrast(scheme[0][0], scheme[0][1]) > 7
        assert contrast(panel, scheme[2][1]) > 4.5  # the faint text
        assert contrast(scheme[3][0], scheme[3][1]) > 7


def contrast(ground: str, text: str) -> float:
    """The ratio of WCAG 2 between two colours "rgb(r, g, b)"."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(ground), luminance(text)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_everything_that_is_used_has_a_name(page, api):
    finished(api, page)
    page.get_by_role("button", name="Extend", exact=True).click()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, progress, img")]
            .filter((element) => element.checkVisibility())
            .filter((element) => {
                const text = element.labels?.[0]?.innerText || element.getAttribute("aria-label");
                return !(text || element.innerText || element.hasAttribute("alt"));
            }).map((element) => element.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(({ id }) => id)")
    assert len(ids) == len(set(ids))
    assert json.dumps(ids).count("live") == 1


def test_focus_can_be_seen(page):
    page.get_by_label("Prompt", exact=True).focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        style = page.evaluate(
            """() => {
                const element = document.activeElement;
                const drawn = element.type === "file" ? element.parentElement : element;
                const { outlineStyle, outlineWidth } = getComputedStyle(drawn);
                return `${outlineStyle} ${outlineWidth}`;
            }"""
        )
        assert style == "solid 2px"


@pytest.mark.parametrize("kind", ["mp4", "webp"])
def test_a_clip_holds_still_where_motion_is_unwanted(opened, api, kind):
    api.finish(api.add(prompt="a dog", format=kind))
    with opened(reduced_motion="reduce") as page:
        button = page.get_by_role("button", name="Play")
        expect(button).to_be_visible()
        still, moving = ("#clip-video",) * 2 if kind == "mp4" else ("#base-frame", "#clip-image")
        expect(page.locator(still)).to_be_visible()
        if kind == "mp4":
            assert page.evaluate("document.querySelector('#clip-video').paused")
        else:
            expect(page.locator(moving)).to_be_hidden()
        button.click()
        expect(page.get_by_role("button", name="Pause")).to_be_visible()
        expect(page.locator(moving)).to_be_visible()


def test_a_clip_is_downloaded_under_a_name_that_tells(page, api):
    id = finished(api, page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-dog-11-12.mp4"
    with open(download.value.path(), "rb") as file:
        assert file.read() == api.store.file(id, "video.mp4").read_bytes()


def test_the_page_makes_a_clip_with_a_real_engine(opened, tiny_checkpoint, tmp_path, monkeypatch):
    """The copied command line then makes the same frames."""
    on_cpu = ["--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", "vfengine.serve", "--model", str(tiny_checkpoint), *on_cpu]
    command += ["--port", "0", "--store", str(tmp_path / "store")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(line.split()[-1] for line in server.stderr if "http://" in line)
            with opened(at=f"{url}/", permissions=["clipboard-read", "clipboard-write"]) as page:
                page.get_by_label("Label", exact=True).select_option("jump")
                page.get_by_label("Steps").fill("4")
                page.get_by_label("Size").select_option("64x64")
                page.keyboard.press("Control+Enter")
                expect(page.locator("#clip-video")).to_be_visible(timeout=60_000)
                page.get_by_role("button", name="Copy as command line").click()
                expect(page.locator("#live")).to_have_text("Copied.")
                line = page.evaluate("navigator.clipboard.readText()")
                with page.expect_download() as download:
                    page.get_by_role("link", name="Download").click()
                clip = tmp_path / download.value.suggested_filename
                download.value.save_as(clip)
        finally:
            server.terminate()
    monkeypatch.chdir(tiny_checkpoint.parent)  # the page names the model as its folder is called
    again = tmp_path / "again.mp4"
    assert main([*shlex.split(line)[2:], *on_cpu, "--output", str(again), "--quiet"]) == 0
    assert read_frames(again).shape == (4, 64, 64, 3)
    assert (read_frames(again) == read_frames(clip)).all()


def read_frames(file: Path) -> np.ndarray:
    with av.open(str(file)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
