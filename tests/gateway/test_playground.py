"""The playground in a browser: ask, watch, stop, reload in the middle, ask again, on a phone and with the keyboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import redis
from playwright.sync_api import Browser, Page, expect

from api_stub.contract.event import Stage
from api_stub.contract.job import parse_job
from api_stub.contract.names import job_key
from api_stub.gateway.keys import digest_of, new_key
from tests.gateway.browser import Watched, chromium
from tests.gateway.service import Service, serving
from tests.servers import S3Server, eventually
from tests.unit.api_stub.workers import ScriptedWorker

ANSWERED = ".answer[aria-busy=false]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def watched(browser: Browser, service: Service) -> Iterator[Watched]:
    opened = Watched(browser)
    opened.page.goto(f"{service.url}/")
    yield opened
    opened.context.close()
    assert opened.errors == []


def newest_job(service: Service, num_known: int = 0) -> str:
    """Wait for one job more than `num_known` and return its id."""

    def jobs() -> list[dict[str, str]]:
        found: list[dict[str, str]] = service.http.get("/v1/jobs").json()["jobs"]
        return found

    eventually(lambda: len(jobs()) > num_known, what="the page hands a job in")
    return jobs()[0]["job_id"]


def ask(page: Page, question: str) -> None:
    """Write a question and send it with the keyboard."""
    page.get_by_role("textbox", name="Question").fill(question)
    page.keyboard.press("Enter")


def test_stages_and_tokens_arrive_as_they_come(watched: Watched, service: Service, worker: ScriptedWorker) -> None:
    page = watched.page
    page.get_by_role("button", name="Draw an image").click()
    expect(page.get_by_role("list", name="Media of the next question").get_by_role("img")).to_have_count(1)
    ask(page, "What is it?")
    job_id = newest_job(service)
    expect(page.locator("#status")).to_have_text("queued")
    expect(page.locator(".facts")).to_contain_text("no worker serves the model 'default' now")
    worker.take(job_id)
    worker.progress(Stage.PREPARING)
    expect(page.locator(".facts")).to_have_text("")
    expect(page.locator("#status")).to_have_text("preparing")
    worker.say("It is ", "a <b>st")
    expect(page.locator(".answer")).to_have_text("It is a <b>st")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    worker.say("ar</b> 🟥")
    worker.finish()
    expect(page.locator(ANSWERED)).to_have_text("It is a <b>star</b> 🟥")
    expect(page.get_by_role("status")).to_have_text("Answer: It is a <b>star</b> 🟥")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator("#jobs tr")).to_contain_text("completed")
    expect(page.locator(".facts")).to_contain_text("1.00 s")


def test_a_reload_in_the_middle_goes_on_with_the_stream(
    watched: Watched, service: Service, worker: ScriptedWorker
) -> None:
    page = watched.page
    ask(page, "Why?")
    worker.take(newest_job(service))
    worker.say("Because ")
    expect(page.locator(".answer")).to_have_text("Because", use_inner_text=True)
    page.reload()
    expect(page.locator(".asked")).to_have_text("Why?")
    expect(page.locator(".answer")).to_have_text("Because", use_inner_text=True)
    worker.say("it is so.")
    expect(page.locator(".answer")).to_have_text("Because it is so.")
    worker.finish()
    expect(page.locator(ANSWERED)).to_have_text("Because it is so.")


def test_a_new_attempt_begins_its_text_anew(watched: Watched, service: Service, worker: ScriptedWorker) -> None:
    page = watched.page
    ask(page, "Why?")
    job_id = newest_job(service)
    worker.take(job_id)
    worker.say("Half of")
    expect(page.locator(".answer")).to_have_text("Half of")
    worker.give_back()
    expect(page.locator("#status")).to_contain_text("starting again")
    worker.answer(job_id, "A whole answer")
    expect(page.locator(ANSWERED)).to_have_text("A whole answer")


def test_stop_cancels_the_job(watched: Watched, service: Service, worker: ScriptedWorker) -> None:
    page = watched.page
    ask(page, "Why?")
    job_id = newest_job(service)
    expect(page.locator("#status")).to_have_text("queued")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".facts")).to_contain_text("cancelled")
    assert service.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_a_follow_up_carries_the_conversation(
    watched: Watched, service: Service, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    page = watched.page
    page.get_by_role("button", name="Draw a clip").click()
    expect(page.get_by_label("Video QA")).to_be_checked()
    ask(page, "Which way?")
    first = newest_job(service)
    worker.answer(first, "left")
    expect(page.locator(ANSWERED)).to_have_count(1)
    page.get_by_role("button", name="Draw an image").click()
    expect(page.get_by_role("list", name="Media of the next question").get_by_role("img")).to_have_count(1)
    ask(page, "And now?")
    second = newest_job(service, num_known=1)
    worker.answer(second, "right")
    expect(page.locator(ANSWERED)).to_have_count(2)

    job = parse_job(redis_client.hget(job_key(second), "body") or "")
    assert job.messages is not None
    parts = [(message.role, [part.type for part in message.content]) for message in job.messages]
    assert parts == [("user", ["video", "text"]), ("assistant", ["text"]), ("user", ["image", "text"])]
    for part in (job.messages[0].content[0], job.messages[2].content[0]):
        assert service.gateway.storage.head(part.uri) is not None


def test_the_same_call_stands_there_in_three_languages(
    watched: Watched, service: Service, worker: ScriptedWorker
) -> None:
    page = watched.page
    ask(page, 'it\'s "so"?')
    worker.answer(newest_job(service), "yes")
    expect(page.locator(ANSWERED)).to_have_count(1)
    call = page.locator("#call")
    job = json.loads(call.inner_text())
    assert (job["task"], job["question"]) == ("visionq.vqa", 'it\'s "so"?')
    page.get_by_role("tab", name="JSON").press("ArrowRight")
    expect(page.get_by_role("tab", name="curl")).to_be_focused()
    expect(call).to_contain_text(f"curl -s {service.url}/v1/jobs")
    page.get_by_role("tab", name="curl").press("ArrowRight")
    code = call.inner_text()
    fields = eval(re.search(r"submit\((\{.*?\})\)\n", code, re.DOTALL)[1])  # type: ignore[index]
    assert fields == job
    compile(code, "call", "exec")


def test_mistakes_are_told_beside_the_field(watched: Watched) -> None:
    page = watched.page
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_have_text("Write a question first.")
    page.get_by_label("Caption").check(force=True)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_have_text("Add an image or a clip first.")
    page.locator("#files").set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"})
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("Content-Type of image/… or video/…")
    page.get_by_role("button", name="Remove notes.txt").click()
    expect(page.locator("#media li")).to_have_count(0)
    watched.errors.clear()  # a browser logs each refused request


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, service: Service, scheme: str) -> None:
    phone = Watched(browser, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    phone.page.goto(f"{service.url}/")
    expect(phone.page.get_by_role("button", name="Ask")).to_be_visible()
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert contrast(phone.page, "body") >= 4.5
    assert contrast(phone.page, "#send") >= 4.5
    phone.context.close()


def contrast(page: Page, selector: str) -> float:
    """Contrast of text and ground of an element. Formula: WCAG 2.2, relative luminance."""
    colours = page.locator(selector).evaluate("e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")
    bright, dark = sorted((_luminance(colour) for colour in colours), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(watched: Watched) -> None:
    page = watched.page
    page.locator("summary").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
            .filter(e => e.offsetParent && !e.labels?.length && !e.textContent.trim() && !e.getAttribute("aria-label"))
            .map(e => e.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.name || ''"))
    assert {"model", "key", "new", "task", "files", "sample-image", "sample-clip", "text", "send", "copy"} <= reached


def test_a_gateway_with_keys_asks_for_one(browser: Browser, redis_url: str, s3_server: S3Server) -> None:
    key = new_key()
    with serving(redis_url, s3_server.url, api_keys=f"team:{digest_of(key)}") as service:
        visitor = Watched(browser)
        visitor.page.goto(f"{service.url}/")
        visitor.page.get_by_label("Key", exact=True).fill(key)
        visitor.page.get_by_role("button", name="Use it").click()
        ask(visitor.page, "Why?")
        expect(visitor.page.locator("#status")).to_have_text("queued")
        jobs = service.http.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}).json()["jobs"]
        assert [job["tenant"] for job in jobs] == ["team"]
        visitor.context.close()


def test_nothing_is_loaded_from_elsewhere(watched: Watched, service: Service) -> None:
    requests: list[str] = []
    watched.page.on("request", lambda request: requests.append(request.url))
    watched.page.reload()
    expect(watched.page.locator('[data-live="workers"]')).to_have_text("0")
    assert requests
    assert all(url.startswith((service.url, "data:", "blob:")) for url in requests)
