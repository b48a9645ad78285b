"""What tests do on the page."""

from playwright.sync_api import Page, expect
from scripted_api import ScriptedApi


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
