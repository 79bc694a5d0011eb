"""Reading a Chrome trace."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    name: str
    thread: int
    start_us: float
    end_us: float


def read_spans(file: Path, names: frozenset[str] | set[str]) -> list[Span]:
    """The spans with these names, by thread and time, an outer one before those inside.

    Of torch's profiler, and of torch_npu's, whose numbers are texts.
    """
    tree = json.loads(file.read_text())
    events = tree["traceEvents"] if isinstance(tree, dict) else tree
    found = []
    for event in events:
        if event["ph"] == "X" and event["name"] in names:
            start_us = float(event["ts"])
            found.append(Span(event["name"], event["tid"], start_us, start_us + float(event["dur"])))
    return sorted(found, key=lambda span: (span.thread, span.start_us, -span.end_us))


def outer_of(spans: list[Span]) -> list[tuple[str, str | None]]:
    """Of every span its name and the innermost one around it; AssertionError where two of a thread overlap."""
    pairs, around = [], []
    for span in spans:
        while around and (around[-1].thread != span.thread or around[-1].end_us <= span.start_us):
            around.pop()
        assert not around or span.end_us <= around[-1].end_us + 0.01, f"{span} reaches out of {around[-1]}"
        pairs.append((span.name, around[-1].name if around else None))
        around.append(span)
    return pairs
