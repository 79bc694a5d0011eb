"""What the doctor has to say, and how it is printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass

OK, NOTE, WARNING, UNKNOWN, ERROR = "ok", "note", "warning", "unknown", "error"
"""As wanted | a fact, nothing is wanted | works, but | could not be found out | cannot run."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `id` is stable, scripts may look for it."""

    id: str
    status: str
    found: str
    wanted: str = ""
    advice: str = ""


def document(findings: Iterable[Finding]) -> dict:
    """The JSON document: ok means that nothing found is an error."""
    rows = [asdict(finding) for finding in findings]
    return {"command": "doctor", "ok": all(row["status"] != ERROR for row in rows), "findings": rows}


def lines(findings: Iterable[Finding], width: int = 118) -> list[str]:
    """The report for people: status, id and what was found in columns, advice below."""
    rows = list(findings)
    wide = max((len(row.id) for row in rows), default=0)
    indent = " " * (9 + wide + 2)
    report = []
    for row in rows:
        report += textwrap.wrap(
            row.found, width, initial_indent=f"{row.status:<9}{row.id:<{wide}}  ", subsequent_indent=indent
        )
        if row.wanted and row.status != OK:
            report += textwrap.wrap(f"wanted: {row.wanted}", width, initial_indent=indent, subsequent_indent=indent)
        if row.advice:
            report += textwrap.wrap(f"-> {row.advice}", width, initial_indent=indent, subsequent_indent=indent + "   ")
    return report
