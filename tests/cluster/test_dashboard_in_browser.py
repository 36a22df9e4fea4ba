"""/dashboard in headless Chromium, over a real cluster in this process."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from disagg.frontend.http import create_app
from tests.cluster.harness import Cluster, running_cluster
from tests.unit.frontend.frontend_fakes import serve_app

playwright = pytest.importorskip("playwright.async_api", reason="in the extra [browser]")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on PATH or in CHROMIUM (Debian package chromium)"
    ),
    # Its subprocess transports are closed by the event loop's end, after pytest has looked.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
KEY = "ключ-42"


@contextlib.asynccontextmanager
async def opened(
    scheme: str = "light", width: int = 1280, **frontend: Any
) -> AsyncIterator[tuple[Any, Cluster]]:
    """Yield the page, and the cluster behind it; fail on whatever the page complains of."""
    complaints: list[str] = []
    async with running_cluster({"frontend": frontend}) as cluster, playwright.async_playwright() as driver:
        assert cluster.gateway is not None
        async with serve_app(create_app(cluster.gateway)) as url:
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
            browser = await driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
            context = await browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": 900}, base_url=url
            )
            page = await context.new_page()
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
            await page.goto("/dashboard")
            yield page, cluster
            await browser.close()
    # A refused key is an error to the browser's console; the page is not to have any other.
    assert [each for each in complaints if "401" not in each] == []


async def keep(page: Any, name: str) -> None:
    """Save a screenshot where SCREENSHOTS says, for people to look at."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        await page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
async def test_it_shows_the_cluster_and_answers_a_prompt(scheme: str, width: int) -> None:
    async with opened(scheme, width) as (page, _):
        await page.wait_for_selector("#workers tr:nth-child(2)")
        assert await page.locator("#workers tr td:first-child").all_text_contents() == [
            "prefill-0",
            "decode-0",
        ]
        assert await page.locator("#status .text").text_content() == "all well"
        await page.fill("#prompt", "Count from 3 to 9.")
        await page.click("#try button")
        await page.wait_for_selector("#trace p")
        assert await page.locator("#answer").text_content()
        story = await page.locator("#trace p").text_content()
        assert "Prefilled on prefill-0, decoded on decode-0" in story and "over shm" in story
        assert await page.locator("#trace > svg rect").count() == 5
        overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert await page.evaluate(overflow) == 0
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ("rgb(245" in ground) == (scheme == "light")
        await keep(page, f"dashboard-{scheme}-{width}")


async def test_it_asks_for_the_key_and_keeps_it_in_the_tab() -> None:
    async with opened(api_key=KEY) as (page, _):
        await page.wait_for_selector("#key-form")
        assert not await page.locator("#page").is_visible()
        await page.fill("#key", "wrong")
        await page.click("#key-form button")
        await playwright.expect(page.locator("#key-error")).to_contain_text("refused")
        assert not await page.locator("#page").is_visible()
        await page.fill("#key", KEY)
        await page.click("#key-form button")
        await page.wait_for_selector("#workers tr")
        assert await page.evaluate("sessionStorage.getItem('disagg-api-key')") == KEY
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0
        await page.reload()
        await page.wait_for_selector("#workers tr")


async def test_it_says_what_is_wrong() -> None:
    async with opened() as (page, cluster):
        await page.wait_for_selector("#workers tr:nth-child(2)")
        await cluster.workers.pop("decode-0").stop()
        await playwright.expect(page.locator("#status")).to_contain_text("no decode worker", timeout=10_000)
        await page.fill("#prompt", "")
        await page.click("#try button")
        await playwright.expect(page.locator("#answer, #trace").filter(has_text="e").first).to_be_visible()


def row(t: int, shed: float = 0.0, **times: float) -> dict[str, Any]:
    """One period as the cluster tells it, with the usual times where none are given."""
    parts = {"frontend": 0.01, "queue": 0.02, "prefill": 0.1, "kv_transfer": 0.01, "first_decode": 0.01}
    parts |= times
    ttft, tpot = parts["frontend"] + parts["queue"] + parts["prefill"], parts["kv_transfer"] / 4
    return {
        **{"t": t, "outcomes": {"stop": 1.0, "shed": shed}, "ttft": [ttft] * 3, "tpot": [tpot] * 3},
        **{"resumes": 0, "placing": 0, "prompt_tokens": 1, "generation_tokens": 1, "pools": {}, **parts},
    }


SUFFERING: list[tuple[dict[str, float], str]] = [
    ({}, "all well"),
    ({"queue": 0.9}, "first tokens are late: queue"),
    ({"prefill": 0.8, "queue": 0.2}, "first tokens are late: prefill"),
    ({"frontend": 0.7}, "first tokens are late: front end"),
    ({"kv_transfer": 2.0, "first_decode": 0.1}, "tokens are slow: KV transfer"),
    ({"shed": 3.0}, "60 % of requests are shed"),
    ({"shed": 1.0, "prefill": 0.8}, "33 % of requests are shed; first tokens are late: prefill"),
]


async def test_the_status_names_what_clients_suffer_from() -> None:
    async with opened() as (page, _):
        await page.wait_for_selector("#workers tr")
        now = 10_000
        data = {
            **{"now": now, "period_s": 10, "objectives": {"ttft": 0.5, "tpot": 0.1}},
            **{"model": "m", "version": "1", "num_frontends": 1, "router": {"connected": True}},
            **{"wanted": {"prefill": 1}, "pools": {"prefill": {"ready": 1}}},
        }
        for newest, text in SUFFERING:
            rows = [row(now - 5 - 10 * back) for back in range(30, 0, -1)] + [row(now - 5, **newest)]
            script = "data => { drawStatus(data); return $('status').textContent }"
            shown = await page.evaluate(script, {**data, "history": rows})
            assert shown.strip() == text
        over = [row(now - 35, shed=3.0), row(now - 25), row(now - 15), row(now - 5)]
        assert (await page.evaluate(script, {**data, "history": over})).strip() == "all well"


async def test_no_line_runs_through_the_time_in_which_a_front_end_was_away() -> None:
    async with opened() as (page, _):
        await page.wait_for_selector("#workers tr")
        data = {"period_s": 10, "history": [row(100), row(110), row(150), row(160)]}
        times = await page.evaluate("data => filled(data).map((row) => [row.t, row.gap === true])", data)
        assert times == [[t, t in (120, 130, 140)] for t in range(100, 170, 10)]


async def test_text_from_the_cluster_stays_text() -> None:
    async with opened() as (page, _):
        await page.wait_for_selector("#workers tr")
        hostile = "<img src=x onerror='document.title=1'>"
        await page.evaluate(
            "worker => drawWorkers({workers: [worker], wanted: {}, pools: {}})",
            {
                "id": hostile,
                "role": "decode",
                "state": "ready",
                "host": hostile,
                "pid": 1,
                "kv_blocks_used": 1,
                "kv_blocks_total": 2,
                "num_running": 0,
                "num_waiting": 0,
                "num_held": 0,
            },
        )
        assert await page.locator("#workers img").count() == 0
        assert hostile in await page.locator("#workers tr").text_content()
