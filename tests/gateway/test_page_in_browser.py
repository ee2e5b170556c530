"""The web page as a person uses it: in a browser without a window, against real servers."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from cli_process import server
from live_server import serving
from sagellm_control_plane import ControlPlaneManager
from sagellm_gateway.app import Gateway
from sagellm_gateway.settings import GatewaySettings
from scripted_engine import ScriptedEngine
from waiting import until

playwright_api = pytest.importorskip("playwright.async_api", reason="needs the package playwright")
expect, Page, Browser = playwright_api.expect, playwright_api.Page, playwright_api.Browser
PATIENCE_MS = 60_000  # only what hangs takes as long, however busy the machine is

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs an installed Chromium"),
]

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
LAST_ANSWER = ".turn.assistant:last-child"

EVIL = """Some **bold** text, `code` and a [link](https://example.com/a?b=c&d=1).

<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">

[bad](javascript:window.hacked=1) ![image](https://example.com/pixel.png) &lt;kept&gt;

| Name | Value |
|:-----|------:|
| one  |     1 |

- [x] done
- [ ] to do

```python
def area(r):  # of a circle
    return 3.14 * r ** 2
```
"""
WIDE = f"""{"x" * 400}

```
{"y " * 300}
```

| {" | ".join(f"column {i}" for i in range(40))} |
|{"---|" * 40}
| {" | ".join("cell" for _ in range(40))} |
"""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser() -> AsyncIterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    async with playwright_api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        await browser.close()


class Visit:
    """A person at the page: `complaints` is what the browser's console said against it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.hosts.add(httpx.URL(request.url).netloc.decode()))

    async def open(self, url: str) -> None:
        await self.page.goto(url)
        await expect(self.page.locator("#model option")).not_to_have_count(0)

    async def ask(self, text: str) -> None:
        """Ask, and wait for the end of the answer."""
        await self.page.fill("#input", text)
        await self.page.keyboard.press("Enter")
        await self.answered()

    async def answered(self) -> None:
        await expect(self.page.locator("#send")).to_have_attribute("aria-label", "Send")

    async def answer(self) -> str:
        return str(await self.page.locator(f"{LAST_ANSWER} > .prose").inner_text())


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser) -> AsyncIterator[Visit]:
    context = await browser.new_context(viewport=DESKTOP, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE_MS)
    visit = Visit(await context.new_page())
    yield visit
    await context.close()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine({"evil": EVIL, "wide": WIDE}, max_model_len=4096)


def gateway(engine: ScriptedEngine, **sections: Any) -> Gateway:
    manager = ControlPlaneManager()
    manager.register_engine(engine, engine_id="engine-0", model="scripted")
    return Gateway(manager, default_model="scripted", settings=GatewaySettings.model_validate(sections))


@asynccontextmanager
async def hosted(visit: Visit, app: Gateway) -> AsyncIterator[str]:
    """The URL of `app`, until the visitor has left: a server waits for its last stream."""
    async with serving(app) as url:
        try:
            yield url
        finally:
            await visit.page.goto("about:blank")


@pytest_asyncio.fixture(loop_scope="module")
async def url(visit: Visit, engine: ScriptedEngine) -> AsyncIterator[str]:
    async with hosted(visit, gateway(engine)) as url:
        yield url


# ---- answers ------------------------------------------------------------------------------------------


async def test_an_answer_streams_and_tells_its_figures(visit: Visit, url: str, engine: ScriptedEngine) -> None:
    await visit.open(url)
    await expect(visit.page.locator("#welcome")).to_contain_text("scripted answers, with 4,096 tokens")
    engine.holds_after, pause_s = 2, 0.3
    await visit.page.fill("#input", "one two three four five six seven eight")
    began = time.monotonic()
    await visit.page.click("#send")
    await visit.page.wait_for_selector(f"{LAST_ANSWER}.running .prose:has-text('one')")
    assert not (await visit.answer()).endswith("eight"), "it came all at once"
    await asyncio.sleep(pause_s)
    engine.gate.set()
    await visit.answered()
    whole_s = time.monotonic() - began
    assert await visit.answer() == "one two three four five six seven eight"
    stats = await visit.page.inner_text(f"{LAST_ANSWER} .stats")
    assert re.fullmatch(r"10 tokens · [\d.]+ tokens/s · first after [\d.]+ m?s", stats)
    # The nine after the first came no sooner than the pause was over, and no later than here.
    assert 0.99 * 9 / whole_s < float(stats.split()[3]) < 1.01 * 9 / pause_s
    await visit.ask("and again")
    assert [message.content for message in engine.requests[-1].messages or ()] == [
        "one two three four five six seven eight",
        "one two three four five six seven eight",
        "and again",
    ]
    assert visit.complaints == []


@pytest.mark.parametrize("how", ["button", "key"])
async def test_stop_ends_the_work_of_the_engine(visit: Visit, url: str, engine: ScriptedEngine, how: str) -> None:
    await visit.open(url)
    await visit.page.fill("#input", "endless")
    await visit.page.keyboard.press("Enter")
    await visit.page.wait_for_selector(f"{LAST_ANSWER} .prose:has-text('on and on')")
    if how == "key":
        await visit.page.keyboard.press("Escape")
    else:
        await visit.page.click("#send[aria-label=Stop]")
    await visit.answered()
    await expect(visit.page.locator(f"{LAST_ANSWER} .note")).to_have_text("Stopped.")
    await until(lambda: engine.cancelled)
    assert len(engine.cancelled) == 1
    await visit.ask("go on")
    assert await visit.answer() == "go on"


async def test_markdown_is_shown_and_nothing_in_it_runs(visit: Visit, url: str) -> None:
    await visit.open(url)
    await visit.ask("evil")
    prose = visit.page.locator(f"{LAST_ANSWER} > .prose")
    await expect(prose.locator("strong")).to_have_text("bold")
    await expect(prose.locator("p > code")).to_have_text("code")
    await expect(prose.locator("td").last).to_have_class("align-right")
    assert await prose.locator("li input").evaluate_all("boxes => boxes.map(box => box.checked)") == [True, False]
    links = await prose.locator("a").evaluate_all("links => links.map(link => [link.href, link.rel])")
    safe = "noopener noreferrer nofollow"
    assert links == [["https://example.com/a?b=c&d=1", safe], ["https://example.com/pixel.png", safe]]
    assert await prose.locator("script, img").count() == 0
    await expect(prose).to_contain_text("<script>window.hacked = 1</script>")
    await expect(prose).to_contain_text("<kept>")
    assert await visit.page.evaluate("window.hacked") is None
    assert await prose.locator(".code-keyword").all_inner_texts() == ["def", "return"]
    assert visit.complaints == []

    await prose.locator("[aria-label='Copy code']").click()
    copied = await visit.page.evaluate("navigator.clipboard.readText()")
    assert copied == "def area(r):  # of a circle\n    return 3.14 * r ** 2"


async def test_text_that_grows_looks_as_if_it_had_come_at_once(visit: Visit, url: str) -> None:
    await visit.open(url)
    texts = [
        EVIL,
        "a [b][c]\n\n- d\n- e\n\n  f\n\n---\n\n> g\n> h\n\n1. i\n\n\n   j\n\n[c]: https://k.example",
        "```\nopen",
    ]
    script = """async ([root, texts]) => {
        const { Markdown, markdown } = await import(`${root}/js/markdown.js`);
        return texts.map((text) => {
            const grown = document.createElement("div"), whole = document.createElement("div");
            const shown = new Markdown(grown);
            for (let end = 1; end <= text.length; end++) shown.update(text.slice(0, end));
            shown.finish(text);
            whole.append(...markdown(text));
            return [grown.innerHTML, whole.innerHTML];
        });
    }"""
    root = await visit.page.get_attribute("script[type=module]", "src")
    assert root is not None
    folder = f"{url}/{root.removesuffix('/js/app.js')}"
    for grown, whole in await visit.page.evaluate(script, [folder, texts]):
        assert grown == whole


async def test_an_answer_can_be_had_again_and_the_first_is_not_lost(
    visit: Visit, url: str, engine: ScriptedEngine
) -> None:
    await visit.open(url)
    engine.script["hi"] = "first"
    await visit.ask("hi")
    engine.script["hi"] = "second"
    await visit.page.click("[aria-label='Answer again']")
    await visit.answered()
    assert await visit.answer() == "second"
    await expect(visit.page.locator(".versions")).to_have_text("2 / 2")
    await visit.page.click("[aria-label='Previous answer']")
    assert await visit.answer() == "first"
    await visit.page.reload()
    await expect(visit.page.locator(".versions")).to_have_text("1 / 2")
    await visit.ask("next")
    assert [message.content for message in engine.requests[-1].messages or ()] == ["hi", "first", "next"]


async def test_a_question_can_be_edited_and_what_that_removes_comes_back(
    visit: Visit, url: str, engine: ScriptedEngine
) -> None:
    await visit.open(url)
    for question in ("one", "two"):
        await visit.ask(question)
    await visit.page.locator(".turn.user").first.hover()
    await visit.page.locator("[aria-label='Edit and ask again']").first.click()
    await visit.page.fill(".edit-field", "uno")
    await visit.page.keyboard.press("Enter")
    await visit.answered()
    assert await visit.page.locator(".turn").all_inner_texts() == ["uno", await visit.page.inner_text(LAST_ANSWER)]
    assert [message.content for message in engine.requests[-1].messages or ()] == ["uno"]
    await visit.page.click(".toast button")
    await expect(visit.page.locator(".bubble")).to_have_text(["one", "two"])


async def test_reasoning_is_folded_and_tool_calls_are_answered(visit: Visit, url: str) -> None:
    await visit.open(url)
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "The weather is asked for. "},
        {"content": "Looking."},
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "get_weather", "arguments": '{"city"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ': "Wuhan"}'}}]},
    ]
    bodies = []

    async def answer(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        await route.fulfill(body=text, content_type="text/event-stream")

    await visit.page.route("**/v1/chat/completions", answer)
    await visit.ask("Weather in Wuhan?")
    thought = visit.page.locator(".thought")
    await expect(thought).to_be_hidden()
    await visit.page.click(".reasoning summary")
    await expect(thought).to_have_text("The weather is asked for.")
    await expect(visit.page.locator(".call-name")).to_have_text("get_weather")
    assert json.loads(await visit.page.inner_text(".call code")) == {"city": "Wuhan"}
    deltas[:] = [{"content": "It is warm."}]
    await visit.page.fill(".tool-form textarea", "31 °C")
    await visit.page.click(".tool-form button")
    await visit.answered()
    assert await visit.answer() == "It is warm."
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Wuhan"}'}}
    assert bodies[-1]["messages"] == [
        {"role": "user", "content": "Weather in Wuhan?"},
        {"role": "assistant", "content": "Looking.", "tool_calls": [call]},
        {"role": "tool", "content": "31 °C", "tool_call_id": "c1"},
    ]


# ---- what goes wrong ----------------------------------------------------------------------------------


async def test_errors_say_what_is_wrong_and_offer_a_way_on(visit: Visit, url: str, engine: ScriptedEngine) -> None:
    await visit.open(url)
    failure = visit.page.locator(f"{LAST_ANSWER} .failure")
    await visit.ask("refuse")
    await expect(failure).to_contain_text("refused; say something else.")
    await visit.ask("fail")
    await expect(failure).to_contain_text("The fake broke.")
    await visit.page.context.set_offline(True)
    await visit.ask("hello")
    await expect(failure).to_contain_text("cannot be reached. Is it still running?")
    await expect(visit.page.locator("[aria-label='Answer again']")).to_have_count(0)
    await visit.page.context.set_offline(False)
    await failure.get_by_role("button", name="Try again").click()
    await visit.answered()
    assert await visit.answer() == "hello"
    assert await visit.page.locator(".versions").count() == 0, "a failed answer is not worth keeping"


async def test_a_server_with_keys_asks_for_one(visit: Visit, engine: ScriptedEngine) -> None:
    from sagellm_gateway.keys import key_of

    secret = "sk-sage-of-this-test-alone-0123456789"
    keys = [key_of(secret, name="ada", admin=True, what="test").model_dump()]
    async with hosted(visit, gateway(engine, auth={"keys": keys})) as url:
        await visit.page.goto(url)
        await expect(visit.page.locator("#welcome h2")).to_have_text("This server asks for a key")
        await visit.page.get_by_role("button", name="Enter an API key").click()
        await visit.page.keyboard.type(secret)
        await visit.page.keyboard.press("Enter")
        await expect(visit.page.locator("#welcome")).to_contain_text("scripted answers")
        await visit.ask("hello")
        assert await visit.answer() == "hello"
        await visit.page.click("#to-dashboard")
        await expect(visit.page.locator(".status")).to_contain_text("Live")
        assert await visit.page.evaluate("localStorage.getItem('sagellm.key')") == json.dumps(secret)


# ---- settings and keyboard ----------------------------------------------------------------------------


async def test_settings_reach_the_model(visit: Visit, url: str, engine: ScriptedEngine) -> None:
    await visit.open(url)
    await visit.page.click("#open-settings")
    await visit.page.get_by_role("button", name="Balanced").click()
    await visit.page.get_by_label("Top k", exact=True).first.fill("40")
    await visit.page.get_by_label("Max tokens", exact=True).first.fill("99")
    await visit.page.get_by_label("Seed", exact=True).fill("7")
    await visit.page.get_by_label("What the model is told first").fill("Be brief.")
    await visit.page.get_by_label("JSON that is added").fill('{"stop": ["END"]')
    await visit.page.fill("#input", "hi")
    await visit.page.click("#send")
    await expect(visit.page.locator(".toast")).to_contain_text("“More fields” is not valid JSON")
    assert await visit.page.input_value("#input") == "hi", "the question is not lost"
    await visit.page.get_by_label("JSON that is added").fill('{"stop": ["END"]}')
    await visit.page.click("#send")
    await visit.answered()
    request = engine.requests[-1]
    sampling = request.resolved_sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.7, 0.9, 40, 7)
    assert (sampling.max_tokens, sampling.stop) == (99, ("END",))
    assert [message.role for message in request.messages or ()] == ["system", "user"]
    await visit.page.reload()
    await expect(visit.page.locator("#field-seed")).to_have_value("7")
    await expect(visit.page.locator("[name=system]")).to_have_value("Be brief.")


async def test_the_keyboard_is_enough(visit: Visit, url: str) -> None:
    await visit.open(url)
    keyboard, page = visit.page.keyboard, visit.page
    await expect(page.locator("#input")).to_be_focused()
    await keyboard.type("first")
    await keyboard.press("Shift+Enter")
    await keyboard.type("second")
    await keyboard.press("Enter")
    await visit.answered()
    assert await page.locator(".bubble").inner_text() == "first\nsecond"
    assert (await page.inner_text("#announcer")).startswith("Answer: first")
    await keyboard.press("ArrowUp")
    await expect(page.locator(".edit-field")).to_be_focused()
    await keyboard.press("Escape")
    await expect(page.locator(".edit-field")).to_have_count(0)
    await keyboard.press("/")
    await expect(page.locator("#input")).to_be_focused()
    await keyboard.press("Alt+n")
    await expect(page.locator("#welcome")).to_be_visible()
    await page.focus("#sessions a")
    await keyboard.press("Tab")
    await keyboard.press("Enter")
    await expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    await keyboard.press("ArrowUp")
    await expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    await keyboard.press("Escape")
    await expect(page.get_by_role("menu")).to_have_count(0)


# ---- chats --------------------------------------------------------------------------------------------


@pytest.fixture(params=["browser", "server"])
def sections(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings under which chats are kept in the browser, or on the server."""
    return {"sessions": {"store": "file", "path": tmp_path / "s.sqlite"}} if request.param == "server" else {}


async def choose(visit: Visit, title: str, what: str) -> None:
    """Choose from the menu of a chat in the list."""
    row = visit.page.locator(".session", has_text=title)
    await row.hover()
    await row.get_by_role("button").click()
    await visit.page.get_by_role("menuitem", name=what).click()


async def test_chats_stay_and_can_be_renamed_deleted_and_brought_back(
    visit: Visit, engine: ScriptedEngine, sections: dict[str, Any]
) -> None:
    async with hosted(visit, gateway(engine, **sections)) as url:
        await visit.open(url)
        titles = visit.page.locator(".session-title")
        for question in ("apples", "pears"):
            await visit.page.click("#new-chat")
            await visit.ask(question)
        await expect(titles).to_have_text(["pears", "apples"])
        await visit.page.reload()
        await expect(visit.page.locator(".bubble")).to_have_text("pears")
        await expect(visit.page.locator(".stats")).to_contain_text("tokens")
        await titles.filter(has_text="apples").click()
        await visit.ask("more")
        assert [message.content for message in engine.requests[-1].messages or ()] == ["apples", "apples", "more"]

        await choose(visit, "apples", "Rename")
        await visit.page.fill(".rename", "Fruit <b>")
        await visit.page.keyboard.press("Enter")
        await expect(titles.filter(has_text="Fruit <b>")).to_have_count(1)
        await choose(visit, "pears", "Delete")
        await expect(titles).to_have_text(["Fruit <b>"])
        await visit.page.click(".toast button")
        await expect(titles).to_have_count(2)
        await visit.page.reload()
        await expect(titles).to_have_count(2)
        on_server = await visit.page.request.get(f"{url}/sessions")
        assert len((await on_server.json())["data"]) == (2 if sections else 0)
        assert visit.complaints == []


async def test_chats_go_to_files_and_come_back(
    visit: Visit, engine: ScriptedEngine, sections: dict[str, Any], tmp_path: Path
) -> None:
    async with hosted(visit, gateway(engine, **sections)) as url:
        await visit.open(url)
        await visit.ask("apples")
        await visit.page.click("#open-settings")
        async with visit.page.expect_download() as download:
            await visit.page.get_by_role("button", name="Export all").click()
        path = tmp_path / "chats.json"
        await (await download.value).save_as(path)
        text = path.read_text(encoding="utf-8")
        assert [session["title"] for session in json.loads(text)["sessions"]] == ["apples"]
        assert "onServer" not in text
        await visit.page.get_by_role("button", name="Delete all").click()
        await expect(visit.page.locator(".session")).to_have_count(0)
        await visit.page.set_input_files("input[type=file]", path)
        await visit.page.locator(".session-title", has_text="apples").click()
        await expect(visit.page.locator(".turn")).to_have_count(2)
        await visit.ask("more")
        assert [message.content for message in engine.requests[-1].messages or ()] == ["apples", "apples", "more"]
        path.write_text('{"messages": 3}', encoding="utf-8")
        await visit.page.set_input_files("input[type=file]", path)
        await expect(visit.page.locator(".toast")).to_contain_text("The file holds no chats")


async def test_the_server_holds_what_the_page_shows(visit: Visit, engine: ScriptedEngine, tmp_path: Path) -> None:
    """After edits, stops, errors, other answers and other prompts, too."""
    settings = {"sessions": {"store": "file", "path": tmp_path / "s.sqlite"}}
    async with hosted(visit, gateway(engine, **settings)) as url, httpx.AsyncClient(base_url=url) as client:

        async def held() -> list[tuple[str, str]]:
            [session] = (await client.get("/sessions")).json()["data"]
            messages = (await client.get(f"/sessions/{session['id']}")).json()["messages"]
            return [(message["role"], message["content"]) for message in messages]

        def turns(*texts: str) -> list[tuple[str, str]]:
            return [turn for text in texts for turn in (("user", text), ("assistant", text))]

        await visit.open(url)
        for question in ("one", "two"):
            await visit.ask(question)
        assert await held() == turns("one", "two")

        await visit.ask("fail")
        await visit.ask("three")
        assert await held() == [*turns("one", "two"), ("user", "fail"), *turns("three")]

        await visit.page.keyboard.press("ArrowUp")
        await visit.page.fill(".edit-field", "drei")
        await visit.page.keyboard.press("Enter")
        await visit.answered()
        assert await held() == [*turns("one", "two"), ("user", "fail"), *turns("drei")]

        engine.script["drei"] = "vier"
        await visit.page.click("[aria-label='Answer again']")
        await visit.answered()
        assert await held() == [*turns("one", "two"), ("user", "fail"), ("user", "drei"), ("assistant", "vier")]
        await visit.page.click("[aria-label='Previous answer']")
        await visit.ask("more")
        assert await held() == [*turns("one", "two"), ("user", "fail"), *turns("drei", "more")]

        await visit.page.fill("#input", "endless")
        await visit.page.keyboard.press("Enter")
        await visit.page.wait_for_selector(f"{LAST_ANSWER} .prose:has-text('on and on')")
        await visit.page.keyboard.press("Escape")
        await visit.answered()
        await visit.page.click("#open-settings")
        await visit.page.fill("[name=system]", "Be brief.")
        await visit.ask("end")
        shown = ("assistant", (await visit.page.locator(".turn.assistant .prose").all_inner_texts())[-2] + " ")
        expected = [*turns("one", "two"), ("user", "fail"), *turns("drei", "more"), ("user", "endless"), shown]
        assert await held() == [("system", "Be brief."), *expected, *turns("end")]

        await visit.page.fill("[name=system]", "")
        await visit.ask("last")
        assert await held() == [*expected, *turns("end", "last")]
        await visit.page.reload()
        await expect(visit.page.locator(".bubble").last).to_have_text("last")
        assert visit.complaints == []

        [session] = (await client.get("/sessions")).json()["data"]
        await client.delete(f"/sessions/{session['id']}")
        await visit.ask("gone")
        await visit.page.get_by_role("button", name="Try again").click()
        await visit.answered()
        assert await held() == [*expected, *turns("end", "last", "gone")]


async def test_an_answer_goes_on_while_another_chat_is_looked_at(
    visit: Visit, url: str, engine: ScriptedEngine
) -> None:
    await visit.open(url)
    engine.holds_after = 1
    await visit.page.fill("#input", "a long answer that takes a while")
    await visit.page.keyboard.press("Enter")
    await visit.page.wait_for_selector(f"{LAST_ANSWER} .prose:has-text('a lo')")
    await visit.page.click("#new-chat")
    await expect(visit.page.locator(".pulse")).to_have_count(1)
    await expect(visit.page.locator("#transcript")).to_be_empty()
    engine.gate.set()
    await expect(visit.page.locator(".pulse")).to_have_count(0)
    await visit.page.click(".session-title")
    assert await visit.answer() == "a long answer that takes a while"


# ---- looks --------------------------------------------------------------------------------------------


async def test_light_and_dark_follow_the_system_until_one_is_chosen(visit: Visit, url: str) -> None:
    async def paper() -> list[int]:
        colour = await visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return [int(part) for part in re.findall(r"\d+", colour)][:3]

    await visit.page.emulate_media(color_scheme="light")
    await visit.open(url)
    assert min(await paper()) > 230
    await visit.page.emulate_media(color_scheme="dark")
    assert max(await paper()) < 40
    await visit.page.click("#theme")
    await visit.page.get_by_role("menuitem", name="Light").click()
    assert min(await paper()) > 230
    await visit.page.reload()
    assert min(await paper()) > 230
    await visit.page.click("#theme")
    await visit.page.get_by_role("menuitem", name="As the system").click()
    assert max(await paper()) < 40


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_nothing_is_wider_than_the_window(visit: Visit, url: str, size: Any) -> None:
    async def overflow() -> Any:
        return await visit.page.evaluate(
            "[...document.querySelectorAll('html, body, .scroller, .dashboard, .settings-body, .sessions')]"
            ".filter((element) => element.scrollWidth > element.clientWidth).map((element) => element.className)"
        )

    await visit.page.set_viewport_size(size)
    await visit.open(url)
    assert await overflow() == []
    await visit.ask("wide")
    assert await overflow() == []
    assert await visit.page.locator(".code pre").evaluate("pre => pre.scrollWidth > pre.clientWidth")
    await visit.page.click("#open-settings")
    assert await overflow() == []
    await visit.page.keyboard.press("Escape")
    if size is PHONE:
        await expect(visit.page.locator("#sidebar")).to_be_hidden()
        await visit.page.click("#open-sidebar")
    await expect(visit.page.locator("#sidebar")).to_be_visible()
    await visit.page.click("#to-dashboard")
    await expect(visit.page.locator(".engine")).to_be_visible()
    assert await overflow() == []


async def test_everything_that_can_be_used_has_a_name(visit: Visit, url: str) -> None:
    await visit.open(url)
    await visit.ask("evil")
    await visit.page.click("#open-settings")
    nameless = """[...document.querySelectorAll("button, input, select, textarea, a, meter, svg[role=img]")]
        .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length || e.alt))
        .map((e) => e.outerHTML)"""
    assert await visit.page.evaluate(nameless) == []
    await visit.page.click("#to-dashboard")
    await expect(visit.page.locator(".engine")).to_be_visible()
    assert await visit.page.evaluate(nameless) == []


async def test_colours_have_enough_contrast(visit: Visit, url: str) -> None:
    """4.5 to 1 for text, WCAG 2.2 level AA."""
    pairs = [
        ("ink", "paper"),
        ("ink", "tint"),
        ("ink", "hover"),
        ("ink-soft", "paper"),
        ("ink-soft", "raised"),
        ("ink-soft", "sunken"),
        ("accent", "paper"),
        ("on-accent", "accent"),
        ("bad", "bad-tint"),
        ("string", "sunken"),
        ("number", "sunken"),
        ("keyword", "sunken"),
    ]
    script = """(pairs) => pairs.map(([above, below]) => {
        const light = (name) => {
            const probe = document.createElement("i");
            probe.style.color = `var(--${name})`;
            document.body.append(probe);
            const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
            probe.remove();
            const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const [a, b] = [light(above), light(below)].sort((x, y) => y - x);
        return [above, below, (a + 0.05) / (b + 0.05)];
    })"""
    await visit.open(url)
    for scheme in ("light", "dark"):
        await visit.page.emulate_media(color_scheme=scheme)
        weak = [entry for entry in await visit.page.evaluate(script, pairs) if entry[2] < 4.5]
        assert weak == [], scheme


# ---- the dashboard ------------------------------------------------------------------------------------


async def test_the_dashboard_shows_live_figures(visit: Visit, url: str) -> None:
    await visit.open(url)
    await visit.ask("hello")
    await visit.page.click("#to-dashboard")
    cards = visit.page.locator(".card")
    await expect(cards).to_have_count(7)
    assert await cards.locator("h3").all_inner_texts() == [
        "Output",
        "Requests",
        "Running",
        "Time to first token",
        "Time per output token",
        "KV cache in use",
        "Prefix cache hits",
    ]
    await expect(cards.nth(3).locator(".value")).to_have_text(re.compile(r"^1\d\.\ds$"))
    await expect(cards.nth(3)).to_contain_text(re.compile(r"p90 1\d\.\d s · p99 1\d\.\d s"))
    await expect(cards.nth(1)).to_contain_text("1 in all")
    await expect(cards.nth(3).locator("svg")).to_have_attribute("aria-label", re.compile("^Time to first token: now 1"))
    engine = visit.page.locator(".engine")
    await expect(engine).to_contain_text("scripted")
    await expect(engine.locator(".state")).to_have_text("ready")
    await expect(engine).to_contain_text("Places taken")
    await expect(visit.page.locator(".events li").first).to_contain_text("engine-0")
    first = await cards.nth(0).locator(".line-0").get_attribute("d")
    await expect(cards.nth(0).locator(".line-0")).not_to_have_attribute("d", first)  # it does not stand still
    await visit.page.click("#new-chat")
    await expect(visit.page.locator("#dashboard")).to_be_hidden()
    assert visit.complaints == []


async def test_a_server_without_figures_is_no_error(visit: Visit, url: str) -> None:
    await visit.page.route("**/admin/**", lambda route: route.fulfill(status=404, body="{}"))
    await visit.open(f"{url}/#/dashboard")
    await expect(visit.page.locator(".problem-box h2")).to_have_text("No live figures here")


# ---- real servers -------------------------------------------------------------------------------------


async def test_the_built_in_model_answers_and_nothing_leaves_the_host(visit: Visit, tmp_path: Path) -> None:
    async def refuse(route: Any) -> None:
        await (route.continue_() if "127.0.0.1" in route.request.url else route.abort())

    await visit.page.context.route("**/*", refuse)
    with server(["serve"], tmp_path) as process:
        await visit.open(process.url)
        await visit.ask("What is LLM inference?")
        assert len(await visit.answer()) > 20
        # No rate: where the browser was busy, the words of so quick an answer reach the page together.
        await expect(visit.page.locator(".stats")).to_have_text(re.compile(r"\d+ tokens · .*first after [\d.]+ m?s"))
        await visit.page.click("#to-dashboard")
        await expect(visit.page.locator(".card").nth(3).locator(".unit")).to_have_text(re.compile("m?s"))
        assert visit.hosts == {httpx.URL(process.url).netloc.decode()}
        assert visit.complaints == []


async def test_the_apis_document_is_shown_and_tried_without_the_internet(visit: Visit, url: str) -> None:
    await visit.page.goto(f"{url}/docs")
    operation = visit.page.locator("#operations-OpenAI-chat_completions_v1_chat_completions_post")
    await expect(operation).to_contain_text("/v1/chat/completions")
    version = visit.page.locator("#operations-sageLLM-version_version_get")
    await version.click()
    await version.get_by_role("button", name="Try it out").click()
    await version.get_by_role("button", name="Execute").click()
    await expect(version.locator(".live-responses-table")).to_contain_text("200")
    assert visit.complaints == []
    assert visit.hosts == {httpx.URL(url).netloc.decode()}
