"""JSON as it is sent: compact, real characters, nothing that JSON has not."""

import json
from typing import Any


def dumps(tree: Any) -> str:
    """Raises ValueError for a number that is not finite."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
