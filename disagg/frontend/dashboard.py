"""The page /dashboard: one document without a single asset beside it, under a policy that allows no other.

The page holds no data. Where an API key is set it comes with status 401 to a browser that has shown none,
asks for the key, and fetches /dashboard/data with it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.responses import Response
from starlette.types import Scope

PATH = "/dashboard"


@cache
def _document() -> tuple[str, str]:
    """Return the page, style and script in place, and the policy that allows just these two."""
    folder = files("disagg.frontend") / "static"
    style = (folder / "dashboard.css").read_text(encoding="utf-8")
    script = (folder / "dashboard.js").read_text(encoding="utf-8")
    page = (folder / "dashboard.html").read_text(encoding="utf-8")
    page = page.replace("/*style*/", style).replace("/*script*/", script)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; "
        f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _hash(source: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def dashboard_page() -> Response:
    """Return the page."""
    page, policy = _document()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(page, headers=headers, media_type="text/html")


def sign_in(scope: Scope) -> Response | None:
    """Return the page to a browser that asks for it without the key, and nothing to anyone else."""
    if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != PATH:
        return None
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return dashboard_page() if b"text/html" in accepted else None
