"""The page /dashboard without a browser: what is sent, to whom, and under which policy."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import httpx
import pytest
from frontend_fakes import FakeBackend, serve_http

from disagg.config import FrontendConfig

BROWSER = {"accept": "text/html,application/xhtml+xml"}


def policy(answer: httpx.Response) -> dict[str, str]:
    parts = answer.headers["content-security-policy"].split("; ")
    return {name: rest for name, _, rest in (part.partition(" ") for part in parts)}


async def test_the_page_is_one_document_that_loads_nothing() -> None:
    async with serve_http(FakeBackend()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/dashboard", headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    # Names of namespaces are no addresses that a browser visits.
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", answer.text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(?:script|img|iframe)[^>]*\ssrc=|@import|url\(", answer.text)
    assert not re.search(r'<link[^>]*href="(?!data:)', answer.text)


async def test_the_policy_allows_exactly_the_style_and_script_in_the_page() -> None:
    async with serve_http(FakeBackend()) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.get("/dashboard", headers=BROWSER)
    rules = policy(answer)
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'" and rules["form-action"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        sources = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.S)
        assert len(sources) == 1 and len(sources[0]) > 1000
        digest = base64.b64encode(hashlib.sha256(sources[0].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    # Inline handlers and styles would be blocked, and be missed by whoever wrote them.
    assert not re.search(r"<[a-z][^>]*\s(?:on[a-z]+|style)=", answer.text)
    assert "innerHTML" not in answer.text and "eval(" not in answer.text


async def test_with_a_key_a_browser_gets_the_page_that_asks_and_nobody_gets_data() -> None:
    backend = FakeBackend(config=FrontendConfig(api_key="k"))
    async with serve_http(backend) as url, httpx.AsyncClient(base_url=url) as client:
        page = await client.get("/dashboard", headers=BROWSER)
        assert page.status_code == 401 and "key-form" in page.text
        assert page.headers["www-authenticate"] == "Bearer"
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        for path, headers in (
            ("/dashboard", {}),
            ("/dashboard/data", BROWSER),
            ("/dashboard/", BROWSER),
            ("/status", BROWSER),
        ):
            refused = await client.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert (await client.post("/dashboard", headers=BROWSER)).json()["error"]
        wrong = await client.get("/dashboard/data", headers={"authorization": "Bearer x"})
        assert wrong.status_code == 401
        data = await client.get("/dashboard/data", headers={"authorization": "Bearer k"})
        assert data.status_code == 200 and data.json()["workers"][0]["id"] == "w0"
        assert data.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [True, False])
async def test_who_served_a_request_is_told_only_to_who_asks(route: str, stream: bool) -> None:
    body = {"stream": stream, "max_tokens": 3, "n": 2}
    body |= {"prompt": "a"} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    async with serve_http(FakeBackend()) as url, httpx.AsyncClient(base_url=url) as client:
        usual = await client.post(f"/v1/{route}", json=body)
        asked = await client.post(f"/v1/{route}", json=body, headers={"x-disagg-explain": "1"})
    assert usual.status_code == asked.status_code == 200
    assert "disagg" not in usual.text
    if stream:
        events = asked.text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        told = json.loads(events[-2].removeprefix("data: "))
        assert told["choices"] == [] and told["id"]
    else:
        told = asked.json()
    choices = told["disagg"]["choices"]
    assert len(choices) == 2 and {"attempts", "outcome", "parts"} <= choices[0].keys()
