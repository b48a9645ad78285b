"""The page for every eye and hand: widths, colours, names, focus, motion."""

import json
import re
from dataclasses import replace

import pytest
from page_steps import finished
from playwright.sync_api import expect
from scripted_api import SHIPPED

pytest_plugins = ["page_fixtures"]


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
