"""The page, in a real browser: a conversation, what the parties see of it, in the dark and on a phone."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mpcinfer.errors import UnavailableError
from tests.client.proxy.conftest import serving
from tests.client.proxy.writer import FakeWriter

pytestmark = pytest.mark.timeout(90)

QUESTION = "Who can read what I write here?"
ANSWER = (
    "Nobody but you. Your words were split into shares before they left this machine, and each party works on one, "
    "which looks like noise because it is. <b>The answer</b> comes back in shares too, and only here are they added up."
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    assert chromium and driver, "install the packages chromium and chromium-driver; scripts/test does where it can"
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})  # type: ignore[no-untyped-call]
    started = Chrome(options, Service(driver))
    try:
        yield started
    finally:
        started.quit()


@pytest.fixture
def writer() -> FakeWriter:
    return FakeWriter(parties=3, delay=0.04, answer=ANSWER)


@pytest.fixture
def page(browser: Chrome, writer: FakeWriter) -> Iterator[Chrome]:
    with serving(writer) as url:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        scheme(browser, "light")
        browser.set_window_size(1280, 860)
        browser.get(url)
        until(browser, lambda: one(browser, "#state").text == "3 parties ready")
        yield browser
        browser.get("about:blank")
        refused = [entry for entry in browser.get_log("browser") if "Content Security" in entry["message"]]
        assert not refused


def one(browser: Chrome, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def texts(browser: Chrome, selector: str) -> list[str]:
    return [element.get_property("textContent") for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def until(browser: Chrome, condition: Any, seconds: float = 15) -> None:
    WebDriverWait(browser, seconds, 0.02).until(lambda _: condition())


def say(browser: Chrome, text: str) -> None:
    one(browser, "#text").send_keys(text, Keys.ENTER)


def ended(browser: Chrome) -> bool:
    return one(browser, "#send").is_displayed()


def scheme(browser: Chrome, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def background(browser: Chrome) -> int:
    """How bright, 0 to 765."""
    colour = one(browser, "body").value_of_css_property("background-color")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_a_conversation(page: Chrome, writer: FakeWriter, tmp_path: Path) -> None:
    page.save_screenshot(str(tmp_path / "empty.png"))
    looked = threading.Event()
    writer.before = lambda number: None if number != 20 else (looked.wait(20), None)[1]
    say(page, QUESTION)
    until(page, lambda: "Nobody but" in one(page, ".assistant .words").text)
    early = len(one(page, ".assistant .words").text)
    counts = texts(page, "#tokens") + texts(page, ".party .count")
    assert one(page, "#stop").is_displayed() and early < len(ANSWER), "the answer is shown while it is written"
    looked.set()
    until(page, lambda: ended(page))
    # markup in an answer is text like any other
    assert one(page, ".assistant .words").text == ANSWER and not page.find_elements(By.CSS_SELECTOR, ".assistant b")
    assert one(page, ".user").text == QUESTION and "per token" in one(page, ".assistant .cost").text

    generation = writer.begun[0]
    assert len(page.find_elements(By.CSS_SELECTOR, ".party")) == 3
    shown = ["".join(text.split()) for text in texts(page, ".party .hex")]
    assert [shown[i] for i in (0, 2, 4)] == [share.hex() for share in generation.sent]
    assert len(set(shown)) == 6 and all(re.fullmatch("[0-9a-f]+", text) for text in shown)
    assert all(len(text) == 16 * len(generation.tokens) for text in (shown[i] for i in (1, 3, 5)))
    assert one(page, "#tokens").text == str(len(generation.tokens)) != counts[0]
    assert texts(page, ".party .count")[1] != counts[2]
    assert (one(page, "#rounds").text, one(page, "#traffic").text) == ("40", "120 kB")
    assert "10.20.0.10:7100" in one(page, ".party .who").text
    assert "sha256:" in one(page, ".party .who").get_attribute("title")

    say(page, "And the model?")
    until(page, lambda: len(writer.begun) == 2 and ended(page))
    assert [message["role"] for message in writer.asked[1][0]] == ["user", "assistant", "user"]  # type: ignore[index]
    light = background(page)
    page.save_screenshot(str(tmp_path / "light.png"))
    scheme(page, "dark")
    assert light > 600 and background(page) < 150
    page.save_screenshot(str(tmp_path / "dark.png"))
    one(page, "#new").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".said") and one(page, "#tokens").text == "0"
    assert set(texts(page, ".party .hex")) == {""}


def test_on_a_phone(page: Chrome, writer: FakeWriter, tmp_path: Path) -> None:
    writer.delay = 0.0
    phone = {"width": 390, "height": 780, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    page.refresh()
    until(page, lambda: one(page, "#state").text == "3 parties ready")
    say(page, QUESTION)
    until(page, lambda: writer.begun and ended(page))
    assert page.execute_script("return document.documentElement.scrollWidth <= 390"), "nothing sticks out"
    assert page.execute_script("const s = document.getElementById('state'); return s.scrollWidth <= s.clientWidth")
    assert not one(page, ".party").is_displayed()
    page.save_screenshot(str(tmp_path / "phone.png"))
    one(page, ".panel > summary").click()
    until(page, lambda: one(page, ".party").is_displayed())
    assert one(page, ".panel").rect["y"] > one(page, "#send").rect["y"], "the parties are below"
    page.save_screenshot(str(tmp_path / "phone-parties.png"))


def test_stopping_and_trouble(page: Chrome, writer: FakeWriter, tmp_path: Path) -> None:
    say(page, QUESTION)
    until(page, lambda: "Nobody" in one(page, ".assistant").text)
    one(page, "#text").send_keys(Keys.ESCAPE)
    until(page, lambda: ended(page))
    assert writer.begun[0].cancelled.wait(1) and "Stopped." in one(page, ".assistant").text

    def fail(number: int) -> None:
        if number == 4:
            raise UnavailableError("party/1 at 10.20.0.11:7100 has gone away; start it (again)")

    writer.before = fail
    say(page, QUESTION)
    until(page, lambda: ended(page) and page.find_elements(By.CSS_SELECTOR, "[role=alert]"))
    assert one(page, "[role=alert]").text == "Party/1 at 10.20.0.11:7100 has gone away; start it (again)."
    page.save_screenshot(str(tmp_path / "trouble.png"))


def test_a_token_is_asked_for(browser: Chrome, writer: FakeWriter) -> None:
    with serving(writer, token="correct-horse-battery") as url:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.get(url)
        until(browser, lambda: one(browser, "#ask-token").is_displayed())
        one(browser, "#token").send_keys("correct-horse-battery")
        one(browser, "#use-token").click()
        until(browser, lambda: one(browser, "#state").text == "3 parties ready")
        assert not one(browser, "#ask-token").is_displayed()
        browser.get("about:blank")
