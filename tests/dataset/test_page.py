"""docs/datasets.md names every key that rows may have, and its example is one."""

import json
import re

from dataset.entries import MEDIA_KEYS, METADATA_KEYS, REFERENCE_KEYS, TEXT_KEYS, UNSUPPORTED_KEYS, read_entry
from dataset.options import OPTION_KEYS
from executor.prompt.messages import HARMLESS_PART_KEYS, OPTION_RULES
from executor.recipe.schema import GenerationSection
from tests.reference import REPO

PAGE = (REPO / "docs" / "datasets.md").read_text()


def test_every_key_is_on_the_page():
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    of_recipes = set(GenerationSection.model_fields)  # "every key of generation_config"
    keys = {*TEXT_KEYS, *MEDIA_KEYS, *REFERENCE_KEYS, *OPTION_KEYS, *OPTION_RULES, *HARMLESS_PART_KEYS, *METADATA_KEYS}
    keys |= UNSUPPORTED_KEYS.keys()
    assert keys - of_recipes - named == set()


def test_harmless_keys_are_those_of_the_page():
    listed = PAGE.split("These may stand in any row:")[1].split(". Other keys")[0]
    assert set(re.findall(r"`([a-z_0-9]+)`", listed)) == METADATA_KEYS


def test_the_example_is_read(tmp_path):
    (block,) = re.findall(r"```\n(\{.*?)```", PAGE, flags=re.DOTALL)
    for name in ("cat.png", "cats.png", "walk.mp4"):
        (tmp_path / name).write_bytes(b"")
    rows = [json.loads(line) for line in block.splitlines()]
    samples = [sample for row in rows for sample in read_entry(row, "page", tmp_path)]
    assert [sample.error for sample in samples] == [None] * len(rows)
    assert samples[1].generation == {"max_new_tokens": 40} and samples[1].media_parts[0]["fps"] == 1
    assert samples[2].references == ("3", "three") and len(samples[2].media_parts) == 2
