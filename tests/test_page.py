"""The page in a real browser (Debian's Chromium, headless) against a real server: two models, one of which only continues texts."""
from __future__ import annotations

import json

import pytest
from browser import findings
from serving import TOKEN, running, wait_until
from tiny import tiny_model

QUESTION = "turn on the lights"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server of `tuned`, which chats, and `texts`, which has no chat template."""
    scratch = tmp_path_factory.mktemp("page")
    folders = {name: tiny_model(scratch / name, [QUESTION, "stop the timer"], seed=seed) for seed, name in enumerate(("tuned", "texts"))}
    (folders["texts"] / "chat_template.jinja").unlink()
    with running(folders, scratch) as server:
        yield server


class Visit:
    """A look at the page: what the browser complained about, where it asked, and the page's parts."""

    def __init__(self, browser, url: str, headers: dict):
        self.context = browser.new_context(extra_http_headers=headers, viewport={"width": 1100, "height": 800})
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def ask(self, question: str = QUESTION, tokens: int = 16, wait: bool = True) -> None:
        """Ask by the keyboard, and wait until every answer has ended."""
        self.page.fill("#max-tokens", str(tokens))
        self.page.fill("#prompt", question)
        with self.page.expect_request("**/v1/chat/completions"):
            self.page.press("#prompt", "Control+Enter")
        if wait:
            self.page.wait_for_selector("#ask:enabled")

    def parts(self, query: str) -> list[str]:
        """Return the texts of all elements that `query` selects, as they are."""
        return self.page.eval_on_selector_all(query, "found => found.map(one => one.textContent)")


@pytest.fixture
def visit(served, chromium):
    """A visit of someone whose browser sends the token with everything."""
    opened = Visit(chromium, served.url, served.headers)
    opened.page.wait_for_selector("article")
    yield opened
    opened.context.close()


def test_both_models_are_asked_and_nobody_else(visit, served):
    assert visit.page.eval_on_selector_all("select", "found => found.map(one => one.value)") == ["tuned", "texts"]
    visit.ask()
    body = {"max_tokens": 16, "temperature": 0}
    with served.client() as http:
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}], "model": "tuned", **body}).json()
        text = http.post("/v1/completions", json={"prompt": QUESTION, "model": "texts", **body}).json()
    assert visit.parts("pre") == [chat["choices"][0]["message"]["content"], text["choices"][0]["text"]]
    for said, answer in zip(visit.parts(".tokens"), (chat, text)):
        ended = {"length": "cut at the limit", "stop": "finished"}[answer["choices"][0]["finish_reason"]]
        assert said.startswith(f"{answer['usage']['completion_tokens']} tokens · ") and f"a second · {ended}" in said
    assert "without system prompt" in said and all("first word" in timing and "whole" in timing for timing in visit.parts(".timing"))
    # What it says about the refused chat of `texts` is the browser's own line, the only one.
    assert [line for line in visit.complaints if "400 (Bad Request)" not in line] == []
    assert {url.removeprefix(served.url) for url in visit.requests} == {"/", "/v1/models", "/v1/chat/completions", "/v1/completions"}


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_the_page_is_readable_before_and_after_an_answer(visit, scheme, width):
    visit.page.emulate_media(color_scheme=scheme)
    visit.page.set_viewport_size({"width": width, "height": 900})
    assert findings(visit.page) == []
    visit.page.click("summary")
    visit.ask()
    assert findings(visit.page) == []
    assert visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_a_system_prompt_and_another_model_are_sent(visit, served):
    visit.page.click("summary")
    visit.page.fill("#system", "stop the timer")
    visit.page.select_option("article:nth-child(2) select", "tuned")
    visit.ask()
    messages = [{"role": "system", "content": "stop the timer"}, {"role": "user", "content": QUESTION}]
    with served.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 16}).json()["choices"][0]["message"]["content"]
    assert visit.parts("pre") == [answer, answer]


def test_an_answer_grows_until_it_is_stopped(visit, served):
    visit.ask(tokens=900, wait=False)
    wait_until(lambda: visit.parts("pre")[0], 20)
    early = visit.parts("pre")[0]
    wait_until(lambda: len(visit.parts("pre")[0]) > len(early), 20)
    assert served.writing() == 2
    visit.page.keyboard.press("Escape")
    visit.page.wait_for_selector("#stop:disabled")
    assert all(timing.startswith("stopped after") for timing in visit.parts(".timing")) and visit.parts("pre")[0].startswith(early)
    wait_until(lambda: served.writing() == 0, 5)
    visit.ask(tokens=900, wait=False)
    visit.page.click("#stop")
    visit.page.wait_for_selector("#ask:enabled")
    assert all(timing.startswith("stopped after") for timing in visit.parts(".timing"))
    visit.ask()
    assert visit.parts(".tokens")[0].startswith("16 tokens"), "it can be asked again"


@pytest.mark.parametrize("written, wanted", [
    ("<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script>", None), ({"intent": "<b>On</b>"}, 2)])
def test_what_a_model_writes_is_shown_and_never_run(visit, written, wanted):
    def force(route):  # the server lets the model write nothing but `written`
        form = {"type": "json_schema", "json_schema": {"name": "forced", "schema": {"const": written}}}
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "response_format": form}))

    visit.page.route("**/v1/*completions", force)
    visit.page.route("**/v1/chat/completions", force)
    visit.ask(tokens=200)
    shown = visit.parts("pre")[0]
    assert json.loads(shown) == written and shown == json.dumps(written, indent=wanted)
    assert visit.page.title() == "Ask the models" and visit.page.query_selector("article img, article script, article b") is None
    if wanted:
        visit.page.click(".shape >> nth=0")
        assert visit.parts("pre")[0] != shown and json.loads(visit.parts("pre")[0]) == written, "as it was written"


def test_refusals_are_shown_in_words(visit, served):
    visit.ask(tokens=100_000)
    assert all("tokens" in text and "Fix:" in text for text in visit.parts("pre.error")) and len(visit.parts("pre.error")) == 2
    visit.page.route("**/v1/chat/completions", lambda route: route.abort())
    visit.ask()
    assert visit.parts("pre.error")[0] == "the server cannot be reached" and len(visit.parts("pre.error")) == 2


def test_a_token_is_asked_for_and_kept_nowhere(served, chromium):
    visit = Visit(chromium, served.url, {})
    visit.page.wait_for_selector("#token-row:not([hidden])")
    for token, columns in (("wrong", 0), (TOKEN, 2)):
        visit.page.fill("#token", token)
        visit.page.press("#token", "Enter")
        visit.page.wait_for_selector("#ask:enabled")
        assert len(visit.parts("article")) == columns and visit.parts("#notice") == ["" if columns else "a valid bearer token is required"]
    visit.ask()
    assert visit.parts(".tokens")[0].startswith("16 tokens")
    stored = visit.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert TOKEN not in stored and not any(TOKEN in url for url in visit.requests) and visit.context.cookies() == []
    visit.page.reload()
    visit.page.wait_for_selector("#token-row:not([hidden])")
    assert visit.page.input_value("#token") == ""
    visit.context.close()


def test_one_model_has_one_column(chromium, served, tmp_path):
    visit = Visit(chromium, "about:blank", served.headers)
    visit.page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "only"}]}))
    visit.page.goto(served.url)
    visit.page.wait_for_selector("article")
    assert visit.page.eval_on_selector_all("select", "found => found.map(one => one.value)") == ["only"]
    visit.context.close()
