"""A prompt's pictures and videos before any is opened: how many, from where, and those over http(s) fetched.

Knows sources, not what is in them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from executor.errors import UserError
from executor.prompt.messages import MediaPart

_NAMES = {"image": ("pictures", "max_pictures"), "video": ("videos", "max_videos")}


def admitted(parts: Sequence[MediaPart], limits: Any) -> list[MediaPart]:
    """The parts, their http(s) addresses fetched. `limits`: executor.media.media's; None: its defaults.

    Whether all may be read is known before anything of the first is. Raises UserError whose `where` is the part's.
    """
    if not parts:
        return []
    from executor.media.media import MediaLimits, admit

    limits = limits or MediaLimits()
    for kind, most in (("image", limits.pictures), ("video", limits.videos)):
        found = [part for part in parts if part.kind == kind]
        if most is not None and len(found) > most:
            name, key = _NAMES[kind]
            raise UserError(
                f"{len(found)} {name} in one request, at most {most} are allowed (server_config.{key}); send fewer",
                where=found[most].where,
            )
    for part in parts:
        with located(part.where):
            admit(part.source, limits)
    return _fetched(parts, limits)


def _fetched(parts: Sequence[MediaPart], limits: Any) -> list[MediaPart]:
    from executor.media.hosts import shown
    from executor.media.media import from_bytes, web_addresses

    wanted: dict[str, int] = {}
    for part in parts:
        for url in web_addresses(part.source):
            kind = "image" if isinstance(part.source, list | tuple) else part.kind
            wanted[url] = max(wanted.get(url, 0), limits.most_bytes(kind))
    if not wanted:
        return list(parts)
    files: Mapping[str, bytes | UserError] = limits.fetcher.fetch_all(wanted, limits.fetched_bytes)

    def loaded(source: Any, kind: str) -> Any:
        if isinstance(source, list | tuple):
            return [loaded(frame, "image") for frame in source]
        if not isinstance(source, str) or source not in files:
            return source
        data = files[source]
        if isinstance(data, UserError):
            raise data
        return from_bytes(data, kind, shown(source), limits)

    found = []
    for part in parts:
        with located(part.where):
            found.append(replace(part, source=loaded(part.source, part.kind)))
    return found


@contextmanager
def located(where: str) -> Iterator[None]:
    """Names the part in a UserError that does not."""
    try:
        yield
    except UserError as error:
        error.where = error.where or where
        raise
