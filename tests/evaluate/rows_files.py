"""Files of scored rows, as eval writes them."""

import json
from pathlib import Path
from typing import Any


def row(index: int, score: float = 1.0, **changed: Any) -> dict[str, Any]:
    """One row: right, about one picture, unless it is changed."""
    text = "right" if score else "wrong"
    return {
        "index": index,
        "id": f"sample {index}",
        "dataset": "textvqa",
        "metric": "vqa_accuracy",
        "prompt": f"question {index}?",
        "media": ["picture.png"],
        "sources": ["/nowhere/picture.png"],
        "references": ["right"],
        "labels": {},
        "text": text,
        "extracted": text,
        "score": score,
        "error": None,
    } | changed


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path
