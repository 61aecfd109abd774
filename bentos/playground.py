"""The playground at /ui: static files of `ui/`, read once, with headers that let them reach this server only.

The page asks the API from the browser, with the caller's own key; the files themselves need none.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "ui"
PAGE = "index.html"
PATH = "/ui"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Own files only, no inline code, no frame around it, and no text that becomes markup.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Cache-Control": "no-cache",  # a new version of the server shows at once
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def make_routes() -> list[Route]:
    """List a route for the page and one for each file that it needs."""
    files = {f"{PATH}/{path.name}": path for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}
    files[PATH] = files.pop(f"{PATH}/{PAGE}")
    return [*(_route(path, file) for path, file in files.items()), Route(f"{PATH}/", _leave_slash)]


def _route(path: str, file: Path) -> Route:
    content = file.read_bytes()
    media_type = MEDIA_TYPES[file.suffix]

    async def get_file(_: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return Route(path, get_file)


async def _leave_slash(_: Request) -> Response:
    """The page's own addresses are relative to `/ui`, so that it works below any prefix of a proxy."""
    return RedirectResponse(f"..{PATH}", headers=HEADERS)
