"""`/console`: a page for the operator, in the server itself.

It is plain HTML, CSS and JavaScript (static/), holds no secret and is served without a key; what it
shows comes from the routes that everyone has: /v1/adapters, /v1/models, /v1/chat/completions. The
keys that an operator types stay in the tab (sessionStorage). It loads nothing from elsewhere.

    static/console.js    start, and what is asked of the server every few seconds
    static/api.js        keys, requests, streams
    static/dom.js        elements from text alone, and how figures are written
    static/adapters.js   the list
    static/details.js    the chosen adapter
    static/grid.js       layers x kinds of module: the heat map and the load of the experts
    static/dialogs.js    what is confirmed first: swap, rollback, delete; the keys
    static/chat.js       one question to several models, side by side
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.responses import FileResponse

_STATIC = Path(__file__).parent / "static"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Known beforehand: no path of a request is ever one of the file system.
_FILES = {path.name: path for path in _STATIC.iterdir() if path.suffix in _MEDIA_TYPES}
_HEADERS = {
    # Trusted types without a policy: a browser that knows them refuses text as HTML anywhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class ConsoleRoutes:
    """The page's routes in the form of vLLM's endpoint plugins."""

    name = "guilomo_console"
    required_tasks = None  # those that pool, too

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Nothing to do: the page asks the other routes."""


router = APIRouter(prefix="/console", include_in_schema=False)


@router.get("")
async def get_page() -> FileResponse:
    """The page. Its links are relative, so that it works behind a proxy's prefix too."""
    return _served("index.html")


@router.get("/{name}")
async def get_part(name: str) -> FileResponse:
    """A script, the style sheet or the icon."""
    return _served(name)


def _served(name: str) -> FileResponse:
    if name not in _FILES:
        raise HTTPException(404, "the console has no such file")
    path = _FILES[name]
    return FileResponse(path, media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)
