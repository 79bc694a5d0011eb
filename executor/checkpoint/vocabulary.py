"""Which number each token has in a checkpoint's tokenizer, from its files alone. Imports no tokenizer library."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.checkpoint.folder import read_json
from executor.errors import UserError


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id, added tokens among them: of tokenizer.json, else of vocab.json. UserError where there is neither."""
    whole = read_json(folder, "tokenizer.json", required=False)
    if whole:
        model = whole.get("model")
        found = _ids(model.get("vocab") if isinstance(model, Mapping) else None, folder, "tokenizer.json")
        added = whole.get("added_tokens") or ()
        pairs = [(each.get("content"), each.get("id")) for each in added if isinstance(each, Mapping)]
        return found | _ids(dict(pairs), folder, "tokenizer.json")
    plain = read_json(folder, "vocab.json", required=False)
    if not plain:
        raise UserError(
            f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json; copy them from the original checkpoint"
        )
    added = read_json(folder, "tokenizer_config.json", required=False).get("added_tokens_decoder") or {}
    if not isinstance(added, Mapping):
        raise UserError(f"{folder}/tokenizer_config.json: added_tokens_decoder is no object; copy the file again")
    contents = {
        entry.get("content"): int(number)
        for number, entry in added.items()
        if isinstance(entry, Mapping) and number.isdigit()
    }
    more = read_json(folder, "added_tokens.json", required=False)
    return _ids(plain, folder, "vocab.json") | _ids(more | contents, folder, "tokenizer_config.json")


def difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """What tells two vocabularies apart, by example, for people; None where they are the same."""
    tokens = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
    if not tokens:
        return None
    first = min(tokens, key=lambda token: (ours.get(token, theirs.get(token, 0)), token))
    numbers = [str(ids[first]) if first in ids else "none" for ids in (ours, theirs)]
    return f"{len(tokens)} tokens have other numbers, {first!r} for one: {numbers[0]} and {numbers[1]}"


def _ids(found: Any, folder: Path, file: str) -> dict[str, int]:
    if not isinstance(found, Mapping) or not all(isinstance(number, int) for number in found.values()):
        raise UserError(
            f"{folder}/{file} has no table of tokens and their numbers; copy it from the original checkpoint"
        )
    return dict(found)
