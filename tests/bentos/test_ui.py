"""The playground in a real browser, over a real server that asks for a key: what is shown is what the API answers."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect

from bentos.doors import DOORS
from bentos.manifest import Calibration, Manifest, read_manifest, write_manifest
from bentos.playground import FOLDER, HEADERS
from tests.bentos.conftest import ROOT
from tests.browser import open_browser
from tests.factories import TINY_MAX_TOKENS
from tests.serving import Server, bento_home, serve

KEY = "a-key-of-the-tests-0123456789"
MAX_TEXTS = 100
THRESHOLD = 0.6  # splits the pairs of TEXTS
TEXTS = [
    "bread and milk",
    "milk and bread",
    "a long train journey",
    "the train",
    "jazz guitar",
    "zebra",
    "play the flute",
]
AWKWARD = [
    'it\'s "quoted" \\ and \\n `date` $HOME $(id) !!',
    "Größe 東京 🍱 – ﷽",
    "-d @/etc/passwd; # %s {x} \t tab",
    "'''",
    '"""',
]
PAYLOADS = [
    "<img src=x onerror=\"document.title='hit'\">",
    "<script>document.title='hit'</script>",
    "</textarea></code><svg onload=\"document.title='hit'\">",
    '"><iframe srcdoc="<script>top.document.title=\'hit\'</script>">',
    "javascript:document.title='hit'",
]


# --- a server with all that the page can show, and a browser


@pytest.fixture(scope="module")
def box(tiny_lunchbox_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lunchbox with a prompt, a calibration and a decision threshold."""
    path = tmp_path_factory.mktemp("ui") / "lunchbox"
    shutil.copytree(tiny_lunchbox_path, path)
    calibration = Calibration(cosines=[0.0, 0.5, 1.0], scores=[0.0, 0.2, 0.9])
    more = {"prompts": {"query": "search the story: "}, "calibration": calibration, "decision_threshold": THRESHOLD}
    write_manifest(path, read_manifest(path).model_copy(update=more))
    return path


@pytest.fixture(scope="module")
def served(box: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service, from its source, asking for a key."""
    from flows.core.packing import store_model

    folder = tmp_path_factory.mktemp("ui-server")
    settings = {
        "EKIBEN_API_KEYS": KEY,
        "EKIBEN_MAX_TEXTS": str(MAX_TEXTS),
        "EKIBEN_ALLOW_TRUNCATED_DIMENSIONS": "true",
        "PYTHONPATH": str(ROOT),
    }
    with bento_home(folder / "home") as home:
        store_model(box, read_manifest(box))
    with serve("bentos.service:EmbeddingService", home, folder, settings) as server:
        yield server


@pytest.fixture
def api(served: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=30, headers={"Authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@dataclass
class Seen:
    """What a page did."""

    requests: list[Request] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # errors of scripts and of the console, blocked content included

    def posted(self, path: str) -> Request:
        return [request for request in self.requests if request.method == "POST" and request.url.endswith(path)][-1]


@pytest.fixture
def seen() -> Seen:
    return Seen()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, served: Server, seen: Seen) -> Iterator[Open]:
    """Open the playground; at the end nothing may have gone wrong in it, and nothing have left for another host."""
    contexts: list[BrowserContext] = []

    def open_page(key: str | None = KEY, width: int = 1280, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda request: seen.requests.append(request))
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and seen.problems.append(message.text))
        page.goto(f"{served.url}/ui")
        expect(page.locator("#served")).to_have_attribute("data-state", "ok")
        if key is not None:
            page.click("#access summary")
            page.fill("#key", key)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # The browser itself reports every answer >= 400 as a failed resource: the tests of errors cause them.
    assert [problem for problem in seen.problems if not problem.startswith("Failed to load resource")] == []
    assert {request.url.split("/ui")[0] for request in seen.requests if "/ui" in request.url} == {served.url}
    assert all(request.url.startswith(f"{served.url}/") for request in seen.requests)


def compare(page: Page, a: list[str], b: list[str] | None = None) -> None:
    """Write the texts, press the button, and wait for this answer."""
    page.check(f"input[name=mode][value={'one' if b is None else 'two'}]", force=True)
    page.fill("#texts-a", "\n".join(a))
    if b is not None:
        page.fill("#texts-b", "\n".join(b))
    page.click("#compare")
    expect(page.locator("#status")).to_contain_text("round trip")
    expect(page.locator("#error")).to_be_hidden()


def read_matrix(page: Page) -> dict[tuple[int, int], str]:
    """(row, column), as the texts were given -> what the cell says to a screen reader."""
    cells = page.eval_on_selector_all(
        "#matrix td[data-row]",
        "cells => cells.map(c => [+c.dataset.row, +c.dataset.column, c.ariaLabel, c.textContent])",
    )
    assert all(text in ("", label.split(",")[0]) for _, _, label, text in cells)
    return {(row, column): label for row, column, label, _ in cells}


def close_enough(shown: str, value: float) -> bool:
    """Whether `shown` is `value` to two digits; JavaScript and Python round halves differently."""
    return abs(float(shown.replace("\u2212", "-")) - value) <= 0.005 + 1e-6


def read_pairs(page: Page) -> list[tuple[str, str, float]]:
    rows = page.eval_on_selector_all(
        "#pairs button",
        "bs => bs.map(b => [...b.querySelectorAll('.quote .text'), b.querySelector('b')].map(e => e.textContent))",
    )
    return [(one, other, float(value.replace("\u2212", "-"))) for one, other, value in rows]


# --- serving


def test_the_built_bento_serves_the_page_and_all_its_files(server: Server) -> None:
    with server.client() as client:
        page = client.get("/ui")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert page.headers["cache-control"] == "no-cache"
        assert "default-src 'self'" in page.headers["content-security-policy"]
        for path in sorted(FOLDER.iterdir()):
            if path.name != "index.html":
                file = client.get(f"/ui/{path.name}")
                assert (file.status_code, file.content) == (200, path.read_bytes())
                assert {name: file.headers.get(name) for name in HEADERS} == HEADERS
        assert client.get("/ui/", follow_redirects=True).content == page.content
        assert client.get("/ui/../service.py").status_code == 404


def test_the_page_opens_without_a_key_and_talks_to_its_own_server_only(
    open_page: Open, seen: Seen, manifest: Manifest
) -> None:
    page = open_page(key=None)
    expect(page.locator("#served-model")).to_have_text(manifest.tag)
    assert len(page.input_value("#texts-a").splitlines()) >= 4, "one click must show something"
    assert page.context.cookies() == []
    assert seen.problems == []


def test_the_page_of_the_api_shows_every_operation_and_reaches_nobody_else(
    browser: Browser, served: Server, seen: Seen
) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.on("request", lambda request: seen.requests.append(request))
    page.on("pageerror", lambda error: seen.problems.append(str(error)))
    answer = page.goto(f"{served.url}/")
    assert answer is not None
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    operations = page.locator(".opblock-summary-path")
    expect(operations.first).to_be_visible(timeout=15_000)
    document = httpx.get(f"{served.url}/docs.json").json()
    shown = {name.replace("\u200b", "").strip() for name in operations.all_text_contents()}
    assert shown == set(document["paths"])
    assert {door.path for door in DOORS} <= shown
    page.locator(".opblock-summary-path", has_text=re.compile("^.?/.?encode$")).click()
    expect(page.locator(".opblock.is-open")).to_contain_text("texts")
    page.wait_for_load_state("networkidle")
    assert seen.problems == []
    elsewhere = [request for request in seen.requests if not request.url.startswith((f"{served.url}/", "data:"))]
    assert {request.failure for request in elsewhere} <= {"csp"}, "what BentoML's page asks of others must be stopped"
    context.close()


# --- what is shown is what the API answers


def test_the_map_shows_the_matrix_of_the_api(open_page: Open, api: httpx.Client) -> None:
    page = open_page()
    compare(page, TEXTS)
    answer = api.post("/similarity", json={"a": TEXTS, "b": TEXTS}).json()
    shown = read_matrix(page)
    assert len(shown) == len(TEXTS) ** 2
    similar = 0
    for (row, column), said in shown.items():
        cosine = answer["similarity"][row][column]
        value, *rest = said.split(", ")
        assert close_enough(value, cosine)
        expected = ["the same text"] if row == column else ["similar"] if cosine >= THRESHOLD else []
        assert rest == expected
        similar += expected == ["similar"]
    assert 0 < similar < len(shown) - len(TEXTS), "the threshold must split these texts, or nothing was tested"
    expect(page.locator("#legend")).to_contain_text(f"cosine ≥ {THRESHOLD:.3f}")
    page.check("input[name=value][value=score]", force=True)
    scored = read_matrix(page)
    assert all(
        close_enough(said.split(",")[0], answer["scores"][row][column]) for (row, column), said in scored.items()
    )
    page.check("#group")
    grouped = read_matrix(page)
    assert grouped == scored
    assert list(grouped) != list(scored), "the order must change"


def test_two_lists_make_rows_and_columns(open_page: Open, api: httpx.Client) -> None:
    page = open_page()
    compare(page, TEXTS[:2], TEXTS[2:5])
    expected = api.post("/similarity", json={"a": TEXTS[:2], "b": TEXTS[2:5]}).json()["similarity"]
    shown = read_matrix(page)
    assert len(shown) == 6
    assert all(close_enough(said.split(",")[0], expected[row][column]) for (row, column), said in shown.items())
    expect(page.locator("#matrix th[scope=col] .name")).to_have_text(["b1", "b2", "b3"])
    expect(page.locator("#usage tbody tr")).to_have_count(5)


def test_the_nearest_pairs_come_first_and_the_threshold_stands_between_them(open_page: Open, api: httpx.Client) -> None:
    page = open_page()
    compare(page, TEXTS)
    cosines = np.array(api.post("/similarity", json={"a": TEXTS, "b": TEXTS}).json()["similarity"])
    rows, columns = np.triu_indices(len(TEXTS), k=1)
    order = np.argsort(-cosines[rows, columns], kind="stable")
    page.click("#more-pairs")
    shown = read_pairs(page)
    assert len(shown) == len(rows)
    for (one, other, value), at in zip(shown, order, strict=True):
        assert (one, other) == (TEXTS[rows[at]], TEXTS[columns[at]])
        assert value == pytest.approx(cosines[rows[at], columns[at]], abs=0.0006)
    above = page.eval_on_selector_all("#pairs li", "items => items.findIndex(item => item.className === 'divider')")
    assert above == sum(cosines[rows, columns] >= THRESHOLD)


def test_the_prompt_that_is_chosen_is_put_before_the_texts(open_page: Open, api: httpx.Client, seen: Seen) -> None:
    page = open_page()
    page.select_option("#prompt", "name:query")
    compare(page, TEXTS[:3])
    assert seen.posted("/similarity").post_data_json["prompt"] == "query"
    expected = api.post("/encode", json={"texts": TEXTS[:3], "prompt": "query"}).json()["usage"]["tokens"]
    expect(page.locator("#usage .number")).to_have_text([str(count) for count in expected])
    page.select_option("#prompt", "literal")
    page.fill("#prompt-text", "bread: ")
    compare(page, TEXTS[:3])
    assert seen.posted("/similarity").post_data_json["prompt_text"] == "bread: "


def test_fewer_dimensions_are_those_of_the_api(open_page: Open, api: httpx.Client) -> None:
    page = open_page()
    page.select_option("#dimensions", "8")
    compare(page, TEXTS[:4])
    vectors = np.array(api.post("/encode", json={"texts": TEXTS[:4], "dimensions": 8}).json()["embeddings"])
    assert vectors.shape == (4, 8)
    assert all(
        close_enough(said.split(",")[0], vectors[row] @ vectors[column])
        for (row, column), said in read_matrix(page).items()
    )
    expect(page.locator("#value-control")).to_be_hidden()  # scores were fitted on whole vectors


def test_a_text_that_was_cut_is_told(open_page: Open) -> None:
    page = open_page()
    compare(page, ["bread", "long " * 300])
    row = page.locator("#usage tr.truncated")
    expect(row).to_have_count(1)
    expect(row).to_contain_text(f"{302 - TINY_MAX_TOKENS} tokens cut off")
    expect(page.locator("#status")).to_contain_text("1 text cut")
    expect(page.locator("#usage-total")).to_contain_text(str(TINY_MAX_TOKENS))


def test_what_made_the_values_is_named(open_page: Open, manifest: Manifest) -> None:
    page = open_page()
    compare(page, TEXTS[:2])
    for fact in (manifest.tag, manifest.version, manifest.run_id, manifest.space_id):
        expect(page.locator("#wayback dd").filter(has_text=re.compile(f"^{re.escape(fact)}$"))).to_have_count(1)


def test_an_answer_is_named_by_what_it_says_of_itself_whatever_was_served_before(
    open_page: Open, manifest: Manifest
) -> None:
    page = open_page()

    def answer(route: Route) -> None:
        answered = route.fetch()
        headers = {**answered.headers, "x-ekiben-space": "f" * 16}
        route.fulfill(response=answered, headers=headers, json=answered.json() | {"model": "ekiben:7-feedbeef"})

    page.route("**/similarity", answer)
    compare(page, TEXTS[:2])
    facts = page.locator("#wayback dd")
    for fact, count in (("ekiben:7-feedbeef", 1), ("f" * 16, 1), (manifest.run_id, 0), (manifest.space_id, 0)):
        expect(facts.filter(has_text=re.compile(f"^{re.escape(fact)}$"))).to_have_count(count)


def test_the_dimensions_that_the_model_was_trained_for_are_offered(open_page: Open) -> None:
    def health(route: Route) -> None:
        answered = route.fetch()
        told = {"nested_dims": [8, 24], "allow_truncated_dimensions": False}
        route.fulfill(response=answered, json=answered.json() | told)

    page = open_page()
    page.route("**/health", health)
    page.reload()
    expect(page.locator("#dimensions option")).to_have_text(["all 32", "24", "8"])


# --- the code that is shown


def show_code(page: Page, name: str) -> str:
    page.get_by_role("tab", name=name).click()
    code = page.text_content("#snippet") or ""
    assert KEY not in code
    assert "EKIBEN_API_KEY" in code
    return code


@pytest.mark.parametrize("name", ["curl", "Python", "OpenAI client"])
@pytest.mark.parametrize(
    ("lists", "options"),
    [
        ((AWKWARD, None), {}),
        ((AWKWARD[:2], AWKWARD[2:]), {"prompt": "name:query"}),
        ((AWKWARD, None), {"dimensions": "8"}),
        ((AWKWARD[:2], AWKWARD[2:]), {"dimensions": "8", "prompt": "name:query"}),
    ],
    ids=["one list", "two lists", "dimensions", "two lists, dimensions"],
)
def test_the_code_that_is_shown_gives_what_is_shown(
    open_page: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lists: tuple[list[str], list[str] | None],
    options: dict[str, str],
    name: str,
) -> None:
    page = open_page()
    for option, value in options.items():
        page.select_option(f"#{option}", value)
    compare(page, *lists)
    shown = read_matrix(page)
    monkeypatch.setenv("EKIBEN_API_KEY", KEY)
    code = show_code(page, name)
    if name == "curl":
        ran = subprocess.run(["bash", "-c", code], capture_output=True, check=True)
        answer = json.loads(ran.stdout)
        if "dimensions" in options:
            assert np.shape(answer["embeddings"]) == (len(AWKWARD), 8)
            return
        similarity = answer["similarity"]
    else:
        script = tmp_path / "snippet.py"
        script.write_text(code, encoding="utf-8")
        similarity = runpy.run_path(str(script))["similarity"]
    assert np.shape(similarity) == tuple(np.add(max(shown), 1))
    assert all(close_enough(said.split(",")[0], similarity[row][column]) for (row, column), said in shown.items())


def test_the_code_can_be_copied(open_page: Open) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    compare(page, TEXTS[:2])
    code = show_code(page, "Python")
    page.click("#copy")
    expect(page.locator("#status")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code


# --- the key


def test_the_key_is_sent_as_a_header_and_kept_nowhere_else(open_page: Open, seen: Seen) -> None:
    page = open_page()
    compare(page, TEXTS[:2])
    assert seen.posted("/similarity").headers["authorization"] == f"Bearer {KEY}"
    assert all(KEY not in request.url and KEY not in (request.post_data or "") for request in seen.requests)
    assert KEY not in page.url
    assert page.evaluate("Object.values(sessionStorage)") == [KEY]
    assert page.evaluate("Object.values(localStorage)") == []
    assert page.context.cookies() == []
    page.reload()
    assert page.input_value("#key") == KEY
    page.fill("#key", "")
    page.press("#key", "Tab")
    assert page.evaluate("Object.values(sessionStorage)") == []


# --- errors, in the server's words


def test_a_missing_key_is_told_and_asked_for(open_page: Open, served: Server) -> None:
    page = open_page(key=None)
    refused = httpx.post(f"{served.url}/similarity", json={"a": ["a"], "b": ["b"]})
    page.click("#compare")
    expect(page.locator("#error")).to_contain_text("401")
    expect(page.locator("#error")).to_contain_text(refused.json()["error"]["message"])
    expect(page.locator("#key")).to_be_focused()


def test_too_many_texts_are_told_and_the_results_before_stay(open_page: Open, api: httpx.Client) -> None:
    page = open_page()
    compare(page, TEXTS)
    many = [f"bread {number}" for number in range(MAX_TEXTS)]
    refused = api.post("/similarity", json={"a": many, "b": many})
    page.fill("#texts-a", "\n".join(many))
    page.click("#compare")
    expect(page.locator("#error")).to_contain_text("413 too_large")
    expect(page.locator("#error")).to_contain_text(refused.json()["error"]["message"])
    expect(page.locator("#status")).to_contain_text("request before")
    assert len(read_matrix(page)) == len(TEXTS) ** 2


@pytest.mark.parametrize(
    ("status", "headers", "body", "shown"),
    [
        (429, {"Retry-After": "7"}, '{"error": {"code": "overloaded", "message": "it waits"}}', ["it waits", "in 7 s"]),
        (502, {}, "<html>Bad gateway</html>", ["the answer holds no message"]),
    ],
    ids=["overloaded", "a proxy"],
)
def test_other_refusals_are_told(
    open_page: Open, status: int, headers: dict[str, str], body: str, shown: list[str]
) -> None:
    page = open_page()
    page.route("**/similarity", lambda route: route.fulfill(status=status, headers=headers, body=body))
    page.click("#compare")
    for text in [str(status), *shown]:
        expect(page.locator("#error")).to_contain_text(text)


def test_a_server_that_is_gone_is_told(open_page: Open, served: Server) -> None:
    page = open_page()
    page.context.set_offline(True)
    page.click("#compare")
    expect(page.locator("#error")).to_contain_text(f"no answer from {served.url}/similarity")


def test_only_the_last_question_is_answered(open_page: Open) -> None:
    page = open_page()
    held: list[Route] = []
    page.route("**/similarity", lambda route: held.append(route), times=1)
    page.click("#compare")
    expect(page.locator("#status")).to_contain_text("Comparing")
    compare(page, TEXTS[:2])
    assert len(read_matrix(page)) == 4
    assert held[0].request.failure is not None


# --- anybody's texts, any screen, any hands


def test_markup_in_texts_stays_text(open_page: Open) -> None:
    page = open_page()
    compare(page, PAYLOADS)
    page.click("#more-pairs")
    for row in range(len(PAYLOADS)):
        page.hover(f'#matrix td[data-row="{row}"][data-column="0"]')
    for name in ("curl", "Python", "OpenAI client"):
        show_code(page, name)
    expect(page.locator("#matrix th[scope=row] .text")).to_have_text(PAYLOADS)
    assert page.locator("main img, main iframe, main script, main svg:not(#ghost)").count() == 0
    expect(page).to_have_title("Ekiben playground")


def test_the_keyboard_is_enough(open_page: Open) -> None:
    page = open_page()
    page.fill("#texts-a", "\n".join(TEXTS))
    page.press("#texts-a", "Control+Enter")
    expect(page.locator("#status")).to_contain_text("round trip")
    assert page.locator('#matrix td[tabindex="0"]').count() == 1, "the map is one stop of the Tab key"
    page.focus('#matrix td[tabindex="0"]')
    for key in ("Home", "PageUp", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    cell = page.locator("#matrix td:focus")
    assert (cell.get_attribute("data-row"), cell.get_attribute("data-column")) == ("1", "2")
    expect(page.locator("#readout .quote .text")).to_have_text([TEXTS[1], TEXTS[2]])
    page.focus("#tabs [aria-selected=true]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tabs [aria-selected=true]")).to_have_text("Python")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_audit_finds_no_barrier(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    compare(page, [*TEXTS, "long " * 300])
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize(("width", "count"), [(360, 4), (360, 50), (1600, 50)])
def test_the_page_never_scrolls_sideways(open_page: Open, width: int, count: int) -> None:
    page = open_page(width=width)
    compare(
        page, ["w" * 300, *(f"{TEXTS[number % 7]} {number} " * (number % 9) or "bread" for number in range(count - 1))]
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(read_matrix(page)) == count**2
