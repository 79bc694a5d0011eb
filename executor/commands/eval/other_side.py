"""`python -m executor.commands.eval.other_side RECIPE.json FOLDER`: the hidden states of a recipe's first prompts.

What `eval --dump-layers` starts for its other side; see layers.py. Each prompt's go into FOLDER/NUMBER.safetensors.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.commands.eval.layers import opened, prompts
from executor.commands.tool import run_tool
from executor.host.env import calm_threads
from executor.recipe.schema import build_recipe


def work(argv: Sequence[str]) -> dict[str, Any]:
    """Returns what the side computes in."""
    file, folder = map(Path, argv)
    recipe = build_recipe(json.loads(file.read_text(encoding="utf-8")))
    from safetensors.torch import save_file

    from executor.evaluate.capture import capture

    with opened(recipe) as (engine, side):
        for number, _, prompt in prompts(recipe, engine.processor):
            stages = {name: x.contiguous() for name, x in capture(engine, prompt).items()}
            save_file(stages, folder / f"{number}.safetensors")
        return side


if __name__ == "__main__":
    calm_threads()
    sys.exit(run_tool("eval", work))
