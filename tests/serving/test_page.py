"""The page of `vfengine serve` in Chromium, whose engine goes on as told: from a request to a clip,
and what may come between.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from page_steps import generate, write
from playwright.sync_api import Page, expect

from vfengine.cli.generate import main

pytest_plugins = ["page_fixtures"]


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


def test_the_address_names_a_clip_that_is_older_than_the_list(opened, api):
    ids = [api.add(prompt=f"dog number {number}") for number in range(45)]
    api.finish(ids[0])
    with opened(f"#{ids[0]}") as page:
        expect(page.locator("#about-prompt")).to_have_text("dog number 0")
        expect(page.locator("#clip-video")).to_be_visible()
        expect(page.locator(".job")).to_have_count(21)
        for count in (41, 45):
            page.get_by_role("button", name="Show older clips").click()
            expect(page.locator(".job")).to_have_count(count)
        prompts = page.locator(".job-prompt").all_inner_texts()
        assert prompts == [f"dog number {number}" for number in reversed(range(45))]
        api.begin(ids[1])  # which polls look at as well
        expect(page.locator(".job").nth(43)).to_contain_text("making the look")


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
