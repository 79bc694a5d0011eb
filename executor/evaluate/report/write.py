"""Two runs side by side as one HTML file that needs nothing else: scores, filters, every sample with its pictures.

What the runs hold goes into the page as JSON and is shown as text only; scripts and style are the page's own, allowed
by their hashes, so that nothing an answer holds can run or load anything. The page draws few samples at a time.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from executor.errors import UserError
from executor.evaluate.compare import Comparison, Contrast, Pair
from executor.evaluate.report.pictures import FindSample, Thumbnail, thumbnails
from executor.evaluate.runs import Run

FOLDER = Path(__file__).parent


def write_report(path: Path, comparison: Comparison, find: FindSample) -> None:
    """Write the page, whole or not at all. UserError where it cannot be written.

    find: a sample of the data set, for pictures that lie in it.
    """
    shown = thumbnails(comparison.pairs, find)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page_of(comparison, shown), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"eval_config.report_path: {path} cannot be written ({error.strerror}); give another path"
        ) from error


def page_of(comparison: Comparison, shown: Sequence[Sequence[Thumbnail]]) -> str:
    """The page's HTML. `shown`: the pictures of each pair."""
    pictures: dict[str, int] = {}
    rows = [_row(pair, some, pictures) for pair, some in zip(comparison.pairs, shown, strict=True)]
    report = {
        "dataset": comparison.first.dataset,
        "metric": comparison.first.metric,
        "runs": [_run(comparison.first, "A"), _run(comparison.second, "B")],
        "warnings": comparison.warnings,
        "whole": contrast_tree(comparison.whole),
        "breakdown": breakdown_tree(comparison),
        "rows": rows,
    }
    style, script = (_text(name) for name in ("page.css", "page.js"))
    parts = {
        "POLICY": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        "STYLE": style,
        "SCRIPT": script,
        "PICTURES": _json(list(pictures)),
        "REPORT": _json(report),
    }
    page = _text("page.html")
    pieces = page.split("@@")  # text, a name, text, a name, ..., text: what is put in is not looked at again
    assert len(pieces) == 2 * len(parts) + 1
    return "".join(parts[piece] if at % 2 else piece for at, piece in enumerate(pieces))


def contrast_tree(contrast: Contrast) -> dict[str, Any]:
    """The figures of both runs as plain values, to five places."""
    first, second, difference = contrast.first, contrast.second, contrast.difference
    return {
        "samples": first.num_samples,
        "first": {"score": _rounded(first.mean), "ci95": [_rounded(first.low), _rounded(first.high)]},
        "second": {"score": _rounded(second.mean), "ci95": [_rounded(second.low), _rounded(second.high)]},
        "difference": {
            "mean": _rounded(difference.mean),
            "ci95": [_rounded(difference.low), _rounded(difference.high)],
            "better": difference.better,
            "worse": difference.worse,
            "p_value": _rounded(difference.p_value),
            "is_real": difference.is_real,
        },
    }


def _rounded(value: float) -> float:
    return round(value, 5)


def breakdown_tree(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The same by label and value."""
    return {
        label: {value: contrast_tree(contrast) for value, contrast in values.items()}
        for label, values in comparison.breakdown.items()
    }


def _run(run: Run, letter: str) -> dict[str, str]:
    return {"letter": letter, "name": run.name, "model": run.model, "path": str(run.path)}


def _row(pair: Pair, shown: Sequence[Thumbnail], pictures: dict[str, int]) -> dict[str, Any]:
    """One sample. `pictures` gets the URLs that are new."""
    both = (pair.first, pair.second)
    return {
        "id": pair.first.id,
        "verdict": pair.verdict,
        "labels": dict(pair.labels),
        "question": pair.first.question,
        "other_question": pair.second.question if pair.second.question != pair.first.question else None,
        "references": pair.first.references,
        "pictures": [
            {
                "name": each.name,
                "at": pictures.setdefault(each.url, len(pictures)) if each.url else None,
                "size": each.size,
                "reason": each.reason,
            }
            for each in shown
        ],
        "more_pictures": len(pair.first.media) - len(shown),
        "boxes": [
            {"of": name, "box": box}
            for name, some in (
                ("wanted", pair.first.boxes),
                ("A", pair.first.said_boxes),
                ("B", pair.second.said_boxes),
            )
            for box in some
        ],
        "answers": [
            {"text": row.text, "extracted": row.extracted, "score": row.score, "error": row.error} for row in both
        ],
    }


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Sequence[Any] | Mapping[str, Any]) -> str:
    """JSON that a script element can hold: no text in it ends the element."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c")
