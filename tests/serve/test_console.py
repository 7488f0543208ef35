"""The operator's console in a real browser, against the server that has keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from guilomo_serve.adapter import CONFIG_FILE, WEIGHTS_FILE
from guilomo_serve.catalogue import digest_of
from tests.serve.helpers import Server, eventually, paused, random_adapter

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and CHROMEDRIVER.exists()),
        reason=f"needs a browser: {CHROMIUM} and {CHROMEDRIVER} (Debian: chromium-driver)",
    ),
]

TIMES = "\N{MULTIPLICATION SIGN}"
QUESTION = "A customer writes: my card has not arrived!"
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1280,900",
)


class Console:
    """The page, as a person at a screen has it."""

    def __init__(self, driver: Any, server: Server) -> None:
        self.driver, self.server = driver, server

    def open(self) -> None:
        self.driver.get(f"{self.server.url}/console")
        self.wait(lambda: self.one("#connection").text != "connecting")

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60, 0.05).until(lambda _: condition())

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text as it is in the page, seen or not."""
        return self.one(selector).get_property("textContent")

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def row(self, name: str) -> dict[str, str]:
        """The cells of an adapter's row, by the heads of their columns; {} if there is none."""
        script = """
            const row = document.querySelector(`tr[data-name="${arguments[0]}"]`);
            const cells = [...(row?.cells ?? [])];
            return Object.fromEntries(cells.map((c) => [c.dataset.label ?? "Name", c.textContent]));
        """
        return self.driver.execute_script(script, name)

    def choose(self, name: str) -> None:
        self.wait(lambda: self.row(name))
        self.one(f'tr[data-name="{name}"] button').click()
        self.wait(lambda: self.one("#details-heading").text == name)

    def check(self, source: Path | str) -> None:
        """Opens the dialog that swaps the chosen adapter, and checks a source."""
        self.one("#swap").click()
        self.one("#change-source").send_keys(str(source), Keys.ENTER)  # over the old one
        self.wait(
            lambda: self.one("#change .confirm").is_enabled() or self.one("#change .error").text
        )

    def confirm(self) -> None:
        self.one("#change .confirm").click()
        self.wait(lambda: not self.one("#change").is_displayed())

    def ask(self, *models: str, tokens: int = 48, stop: bool = False) -> None:
        for box in self.all("#models input"):
            if box.is_selected() != (box.get_property("value") in models):
                box.click()
        for field, value in (("#question", QUESTION), ("#max-tokens", str(tokens))):
            self.one(field).clear()
            self.one(field).send_keys(value)
        if stop:  # at the first text; in the page, as a driver's next command may come too late
            script = """
                new MutationObserver((changes, observer) => {
                    if (!document.querySelector("article .answer")?.textContent) return;
                    observer.disconnect();
                    document.querySelector("#stop").click();
                }).observe(document.querySelector("#answers"),
                           {subtree: true, childList: true, characterData: true});
            """
            self.driver.execute_script(script)
        self.one("#ask .primary").click()

    def answers(self) -> dict[str, tuple[str, str]]:
        """Model -> state and text of its answer."""
        script = """
            return [...document.querySelectorAll("article")].map((a) =>
                [a.dataset.model, [a.dataset.state, a.querySelector(".answer").textContent]]);
        """
        return {model: tuple(found) for model, found in self.driver.execute_script(script)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(CHROMEDRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folders(tiny_model, root) -> dict[str, Path]:
    return {
        "old": random_adapter(tiny_model, root / "of-console-old", 40),
        "new": random_adapter(tiny_model, root / "of-console-new", 41),
    }


@pytest.fixture
def served(restarted, folders) -> Iterator[Server]:
    """The server with an adapter of these tests, `shown`."""
    assert restarted.put("shown", folders["old"]).status_code == 200
    yield restarted
    restarted.admin("DELETE", "/shown")


@pytest.fixture
def console(browser, served) -> Iterator[Console]:
    """The page with the keys; afterwards: it was quiet, and asked this server alone."""
    console = Console(browser, served)
    console.open()
    if console.one("#keys").is_displayed():
        console.one("#admin-key").send_keys(served.admin_key)
        console.one("#inference-key").send_keys(served.key, Keys.ENTER)
    console.wait(lambda: console.row("shown") and console.all("#models label.base"))
    yield console
    be_quiet(console)


def be_quiet(console: Console) -> None:
    """Nothing was asked of others, and nothing is in the browser's log.

    But for answers of the API that are no 200: those it always logs.
    """
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    asked = console.driver.execute_script(script)
    assert asked
    assert [url for url in asked if not url.startswith(f"{console.server.url}/")] == []
    messages = [entry["message"] for entry in console.driver.get_log("browser")]
    assert [m for m in messages if not ("/v1/" in m and "Failed to load resource" in m)] == []


def entry_of(server: Server, name: str) -> dict[str, Any]:
    return server.admin("GET", f"/{name}").json()


def answer_of(server: Server, model: str, tokens: int) -> str:
    completion = server.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=tokens,
        temperature=0,
    )
    return completion.choices[0].message.content or ""


def test_the_page_is_open_and_serves_its_own_files_alone(restarted):
    page = requests.get(f"{restarted.url}/console", timeout=30)
    assert page.status_code == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    for name in ("__init__.py", "..%2f__init__.py", "%2e%2e/__init__.py", "index.html%00", ".."):
        answer = requests.get(f"{restarted.url}/console/{name}", timeout=30)
        assert answer.status_code == 404, name


def test_it_asks_for_the_keys_and_keeps_them_in_its_tab(browser, served):
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    console = Console(browser, served)
    console.open()
    console.wait(lambda: "the admin key" in console.one("#keys .error").text)
    console.one("#admin-key").send_keys("a wrong key", Keys.ENTER)
    assert console.one("#keys").is_displayed()  # no key has spaces
    console.one("#admin-key").clear()
    console.one("#admin-key").send_keys("wrong", Keys.ENTER)
    console.wait(lambda: console.one("#keys").is_displayed())  # and asks again
    assert console.row("shown") == {}
    console.one("#keys .cancel").click()
    assert "the admin key" in console.one("#refused").text
    console.one("#refused button").click()
    console.one("#admin-key").clear()
    console.one("#admin-key").send_keys(served.admin_key)
    console.one("#inference-key").send_keys(served.key, Keys.ENTER)
    console.wait(lambda: console.row("shown"))
    console.wait(lambda: not console.one("#refused").is_displayed())
    kept = browser.execute_script("return Object.values(sessionStorage)")
    assert sorted(kept) == sorted([served.admin_key, served.key])
    assert browser.execute_script("return localStorage.length") == 0
    assert browser.execute_script("return document.cookie") == ""
    assert browser.current_url == f"{served.url}/console"
    browser.close()
    browser.switch_to.window(first)


def test_list_and_heat_map_show_what_the_server_says(console, served, folders):
    entry = entry_of(served, "shown")
    row = console.row("shown")
    for label, key in (("Version", "version"), ("Experts", "experts"), ("Total rank", "rank")):
        assert row[label] == f"{entry[key]:,}"
    assert row["Kind"] == "LoRA-MoE"
    assert row["Weights"] in ("in memory", "on disk")
    console.choose("shown")
    assert console.text("[data-fact=Digest]") == digest_of(folders["old"])
    assert console.text("[data-fact=Source]") == str(folders["old"])
    cells = {
        cell.get_attribute("data-module"): (cell.text, cell.get_attribute("aria-label"))
        for cell in console.all("#allocation [data-module]")
    }
    assert cells.keys() == entry["allocation"].keys()
    for module, ranks in entry["allocation"].items():
        text, words = cells[module]
        assert text.replace(" ", "") == f"{sum(ranks)}{TIMES}{len(ranks)}", module
        assert ", ".join(map(str, ranks)) in words
    # Hot is hotter: colours follow the ranks.
    heats = {
        cell.get_attribute("data-module"): float(
            cell.get_attribute("style").split("--heat:")[1].strip(" ;")
        )
        for cell in console.all("#allocation [data-module]")
    }
    ranked = sorted(heats, key=lambda module: sum(entry["allocation"][module]))
    assert [heats[m] for m in ranked] == sorted(heats.values())
    assert (heats[ranked[0]], heats[ranked[-1]]) == (0, 1)
    load = served.admin("GET", "/shown/load")
    if load.status_code == 404 or not load.json()["tokens"]:
        assert console.text("#load") == "no load measured yet"


def test_a_swap_is_checked_confirmed_and_rolled_back(console, served, folders):
    before = entry_of(served, "shown")
    console.choose("shown")
    console.check(folders["new"])
    assert entry_of(served, "shown")["version"] == before["version"]  # a dry run
    new = served.put("shown", folders["new"], dry_run=True).json()
    compared = console.text("#change .comparison")
    for version in (before, new):
        for key in ("experts", "rank"):
            assert f"{version[key]:,}" in compared
        assert version["digest"][:16] in compared
    assert f"finishes with version {before['version']}" in console.text("#change .steps")
    console.confirm()
    after = entry_of(served, "shown")
    assert after["digest"] == digest_of(folders["new"])
    console.wait(lambda: console.row("shown")["Version"] == str(after["version"]))
    cell = next(iter(after["allocation"]))
    expected = f"{sum(after['allocation'][cell])}{TIMES}{len(after['allocation'][cell])}"
    console.wait(lambda: console.text(f'#allocation [data-module="{cell}"]') == expected)

    console.one("#rollback").click()
    assert digest_of(folders["old"])[:16] in console.text("#change .comparison")
    console.confirm()
    rolled = entry_of(served, "shown")
    assert (rolled["digest"], rolled["version"] > after["version"]) == (before["digest"], True)
    console.wait(lambda: console.row("shown")["Version"] == str(rolled["version"]))


def test_pin_and_delete_add_and_cancel(console, served, folders):
    console.choose("shown")
    console.one("#pin").click()
    console.wait(lambda: console.one("#pin").text == "Unpin")
    assert entry_of(served, "shown")["pinned"]
    console.one("#pin").click()
    console.wait(lambda: console.one("#pin").text == "Pin")
    assert not entry_of(served, "shown")["pinned"]

    console.one("#delete").click()
    console.press(Keys.ESCAPE)
    console.wait(lambda: not console.one("#change").is_displayed())
    assert entry_of(served, "shown")["name"] == "shown"
    console.one("#delete").click()
    console.confirm()
    console.wait(lambda: not console.row("shown"))
    assert served.admin("GET", "/shown").status_code == 404

    console.one("#add").click()
    console.one("#change-name").send_keys("shown", Keys.TAB, str(folders["new"]), Keys.ENTER)
    console.wait(lambda: console.one("#change .confirm").is_enabled())
    assert served.admin("GET", "/shown").status_code == 404
    console.confirm()
    console.wait(lambda: console.row("shown"))
    assert entry_of(served, "shown")["digest"] == digest_of(folders["new"])


def test_a_failed_swap_says_why_and_leaves_the_old_version(console, served, folders, root):
    """One that the check finds, and one whose folder changes after it."""
    before = entry_of(served, "shown")
    bad = root / "of-console-bad"
    shutil.copytree(folders["new"], bad, dirs_exist_ok=True)
    (bad / CONFIG_FILE).write_text("{}")
    console.choose("shown")
    console.check(bad)
    refusal = served.put("shown", bad, dry_run=True).json()["error"]["message"]
    assert console.text("#change .error") == refusal
    assert not console.one("#change .confirm").is_enabled()

    shutil.copytree(folders["new"], bad, dirs_exist_ok=True)
    console.one("#change .check").click()
    console.wait(lambda: console.one("#change .confirm").is_enabled())
    assert not console.one("#change .error").is_displayed()
    shutil.copytree(folders["old"], bad, dirs_exist_ok=True)
    console.one("#change .confirm").click()
    console.wait(lambda: console.one("#change .error").is_displayed())
    assert digest_of(folders["new"]) in console.text("#change .error")  # what was expected
    console.press(Keys.ESCAPE)
    after = entry_of(served, "shown")
    assert (after["version"], after["digest"]) == (before["version"], before["digest"])
    assert console.row("shown")["Version"] == str(before["version"])


def test_a_swap_by_keyboard_alone(console, served, folders):
    """From the top of the page; focus is always seen, and stays where it was."""
    before = entry_of(served, "shown")["version"]

    def tab_to(found: Callable[[Any], bool]) -> Any:
        for _ in range(80):
            console.press(Keys.TAB)
            focused = console.driver.switch_to.active_element
            style = "return getComputedStyle(arguments[0]).outlineStyle"
            if focused.tag_name != "body":  # where the browser's own parts would have the focus
                assert console.driver.execute_script(style, focused) != "none", focused.text
            if found(focused):
                return focused
        pytest.fail("the focus never came there")

    tab_to(lambda e: e.tag_name == "button" and e.text == "shown")
    console.press(Keys.ENTER)
    console.wait(lambda: console.one("#details-heading").text == "shown")
    tab_to(lambda e: e.get_attribute("id") == "swap")
    console.press(Keys.ENTER)
    console.press(str(folders["new"]), Keys.ENTER)
    console.wait(lambda: console.one("#change .confirm").is_enabled())
    tab_to(lambda e: "confirm" in (e.get_attribute("class") or ""))
    console.press(Keys.ENTER)
    console.wait(lambda: not console.one("#change").is_displayed())
    version = entry_of(served, "shown")["version"]
    assert version > before
    assert console.driver.switch_to.active_element.get_attribute("id") == "swap"
    console.wait(lambda: f"now version {version}" in console.text("#announcer"))

    cell = tab_to(lambda e: e.get_attribute("data-module") is not None)
    console.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    other = console.driver.switch_to.active_element
    assert other.get_attribute("data-module") != cell.get_attribute("data-module")
    assert other.get_attribute("data-module") in console.text("#allocation .readout")
    # What comes from the server meanwhile takes neither focus nor place.
    place = console.driver.execute_script("return scrollY")
    served.put("another", folders["old"])
    console.wait(lambda: console.row("another"))
    assert console.driver.switch_to.active_element == other
    assert console.driver.execute_script("return scrollY") == place
    served.admin("DELETE", "/another")
    console.wait(lambda: not console.row("another"))


def test_answers_stream_side_by_side_through_a_swap(console, served, folders):
    """The text of the API; and what streams while its adapter is swapped is the old version's."""
    tokens = 200
    expected = {model: answer_of(served, model, tokens) for model in ("base", "shown")}
    assert expected["base"] != expected["shown"]
    with ThreadPoolExecutor(1) as pool:
        with paused(served):
            console.ask("base", "shown", tokens=tokens)
            eventually(lambda: served.in_flight("shown") == 1, "it runs")
            swap = pool.submit(served.put, "shown", folders["new"])
        assert swap.result().status_code == 200
    console.wait(lambda: all(state == "done" for state, _ in console.answers().values()))
    assert console.answers() == {m: ("done", text) for m, text in expected.items()}
    for figures in console.all("article .figures"):
        assert "first token after" in figures.text
    assert answer_of(served, "shown", tokens) != expected["shown"]

    # What the server refuses is said in its column.
    console.ask("shown", tokens=100_000)
    console.wait(lambda: console.answers()["shown"][0] == "failed")
    assert "100000" in console.text("article .error")


def test_stop_ends_an_answer(console, served):
    tokens = 400
    text, model = max((answer_of(served, m, tokens), m) for m in ("base", "shown"))
    assert len(text) > 100, "the test needs a long answer"
    console.ask(model, tokens=tokens, stop=True)
    console.wait(lambda: console.answers()[model][0] == "stopped")
    shown = console.answers()[model][1]
    assert text.startswith(shown)
    assert 0 < len(shown) < len(text)
    assert not console.one("#stop").is_enabled()
    console.wait(lambda: served.in_flight("shown") == 0)


def test_hostile_text_is_text(console, served, folders, root):
    """In a source that is served, in one that is refused, and in an answer."""
    good, bad = root / f"{HOSTILE} good", root / f"{HOSTILE} bad"
    for folder in (good, bad):
        shutil.copytree(folders["new"], folder, dirs_exist_ok=True)
    (bad / WEIGHTS_FILE).unlink()
    console.choose("shown")
    console.check(bad)
    assert HOSTILE in console.text("#change .error")
    console.press(Keys.ESCAPE)
    console.check(good)
    assert HOSTILE in console.text("#change .comparison")
    console.confirm()
    console.wait(lambda: HOSTILE in console.text("[data-fact=Source]"))
    assert HOSTILE in console.text("#versions")
    console.one("#delete").click()
    assert HOSTILE in console.text("#change .steps")
    console.press(Keys.ESCAPE)

    # No model here says that, so the browser answers for it, in chunks that cut lines and letters.
    events = [{"choices": [{"delta": {"content": text}}]} for text in (HOSTILE[:9], HOSTILE[9:])]
    events.append({"error": {"message": f"{HOSTILE} é", "code": 500}})
    stream = "".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events)
    with stubbed(console, "v1/chat/completions", stream):
        console.wait(lambda: console.all("#models label.base"))
        console.ask("base")
        console.wait(lambda: console.answers()["base"] == ("failed", HOSTILE))
        assert console.text("article .error") == f"{HOSTILE} é"
    assert console.all("img:not(h1 img)") == []
    assert console.driver.title == "guilomo console"


def test_the_load_of_experts_is_drawn_and_the_unused_are_marked(console, served):
    """What a server that measures it says: drawn to the busiest, in words for each module."""
    entry = entry_of(served, "shown")
    unused, modules = 0, {}
    for module, ranks in entry["allocation"].items():
        share = [1 / len(ranks)] * len(ranks)
        if len(ranks) > 2:
            share[0], share[1] = share[0] + share[1], 0.0
            unused += 1
        modules[module] = {"tokens": 70, "share": share, "entropy": 0.5}
    assert unused > 0
    load = {"name": "shown", "version": entry["version"], "tokens": 70, "modules": modules}
    with stubbed(console, "v1/adapters/shown/load", json.dumps(load)):
        console.choose("shown")
        console.wait(lambda: "70 tokens" in console.text("#load"))
        assert f"{unused} of {entry['experts']} experts unused" in console.text("#load")
        assert len(console.all("#load .unused")) == unused
        for module, measured in modules.items():
            cell = console.one(f'#load [data-module="{module}"]')
            bars = cell.find_elements(By.CSS_SELECTOR, ".bars i")
            assert len(bars) == len(measured["share"])
            words = cell.get_attribute("aria-label")
            assert ("expert 1 0.0 % (unused)" in words) == (len(bars) > 2)
    empty = json.dumps({**load, "tokens": 0, "modules": {}})
    with stubbed(console, "v1/adapters/shown/load", empty):
        console.choose("shown")
        console.wait(lambda: console.text("#load") == "no load measured yet")


@contextmanager
def stubbed(console: Console, path: str, body: str) -> Iterator[None]:
    """The page, with an answer of the browser's instead of the server's at one path.

    It comes some bytes at a time.
    """
    script = """
        const real = window.fetch;
        window.fetch = (asked, options) => {
            if (asked !== PATH) return real(asked, options);
            const bytes = new TextEncoder().encode(BODY);
            const stream = new ReadableStream({start(controller) {
                for (let i = 0; i < bytes.length; i += 7) controller.enqueue(bytes.slice(i, i + 7));
                controller.close();
            }});
            return Promise.resolve(new Response(stream));
        };
    """
    script = script.replace("PATH", json.dumps(path)).replace("BODY", json.dumps(body))
    added = console.driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": script}
    )
    try:
        console.open()
        yield
    finally:
        console.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_phone_needs_no_sideways_scrolling(console, folders):
    driver = console.driver
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)

    def widest() -> int:
        return driver.execute_script("return document.documentElement.scrollWidth")

    try:
        console.choose("shown")
        console.ask("base", "shown")
        console.wait(lambda: all(state == "done" for state, _ in console.answers().values()))
        assert widest() <= 360
        console.check(folders["new"])
        assert widest() <= 360
        dialog = console.one("#change").rect
        assert dialog["x"] >= 0
        assert dialog["x"] + dialog["width"] <= 360
        assert console.one("#change .confirm").is_displayed()
        console.press(Keys.ESCAPE)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
