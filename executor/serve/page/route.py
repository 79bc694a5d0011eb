"""GET /: the chat page, whole in one answer, and the two things it asks for beside the API.

The page itself holds nothing secret and is open; what it asks for needs the key, as the API does. Its scripts and
style are written into it and allowed by their hashes; the browser is told to run and fetch nothing else.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse

from executor.errors import UserError
from executor.media.draw import Mark, find_marks, to_pixels
from executor.serve.bodies import JsonRoute
from executor.serve.errors import ApiError
from executor.serve.service import Service

router = APIRouter(include_in_schema=False, route_class=JsonRoute)

FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'<(script|style)([^>]*?) data-from="([^"]+)"></\1>')
Pixels = Annotated[int, Field(ge=1, le=1_000_000)]


class MarksRequest(BaseModel):
    """An answer's text, and the size of the picture it speaks of, turned upright."""

    text: Annotated[str, Field(max_length=4_000_000)]
    width: Pixels
    height: Pixels


@router.get("/")
async def page() -> HTMLResponse:
    html, headers = whole_page()
    return HTMLResponse(html, headers=headers)


@router.get("/page/settings")
async def settings(request: Request) -> dict[str, Any]:
    """What the page must know of this server: the model, its defaults, and the limits of a request."""
    service: Service = request.app.state.service
    server, defaults = service.recipe.server, service.params({})
    return {
        "model": service.model_name,
        "max_model_len": service.max_model_len,
        "temperature": defaults.temperature,
        "max_tokens": service.recipe.generation.max_new_tokens,  # None: to the context's end
        "max_pictures": server.max_pictures,
        "max_videos": server.max_videos,
        "max_media_bytes": server.max_media_bytes,
        "max_body_bytes": server.max_body_bytes,
    }


@router.post("/page/marks")
def marks(body: MarksRequest, request: Request) -> dict[str, Any]:
    """The boxes and points that a text names, in pixels of the picture; read as `generate` reads them."""
    service: Service = request.app.state.service
    processor = service.processor
    size = (body.height, body.width)
    try:
        resized = processor.picture_size(*size, processor.options)
    except UserError as error:
        raise ApiError(400, str(error)) from error
    found = to_pixels(find_marks(body.text), processor.box_convention, resized, size)
    return {"marks": [_plain(mark) for mark in found]}


def _plain(mark: Mark) -> dict[str, Any]:
    return {"label": mark.label, "box" if mark.is_box else "point": list(mark.coordinates)}


@cache
def whole_page() -> tuple[str, dict[str, str]]:
    """The page with its scripts and style inside, and its headers."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}

    def include(match: re.Match[str]) -> str:
        tag, attributes, names = match.groups()
        text = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names.split())
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}{attributes}>{text}</{tag}>"

    html = _INCLUDE.sub(include, (FOLDER / "index.html").read_text(encoding="utf-8"))
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]),
        "style-src": " ".join(hashes["style"]),
        "img-src": "blob: data:",
        "media-src": "blob:",
        "connect-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html, headers
