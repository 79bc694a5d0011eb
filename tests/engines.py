"""Engines for tests: over random checkpoints, with the small blocks that tiny prompts fill."""

from pathlib import Path
from typing import Any

from executor.commands.build import build_engine
from executor.engine.engine import Engine
from executor.recipe.schema import build_recipe


def engine_over(
    folder: Path, *, model: dict[str, Any] | None = None, speculative: dict[str, Any] | None = None, **scheduler: Any
) -> Engine:
    """An fp32 CPU engine; `model`, `speculative` and `scheduler` change fields of the sections of their names."""
    settings = {"max_model_len": 2048, "block_size": 16, "max_num_seqs": 8, "num_blocks": 256} | scheduler
    model = {"model_path": str(folder), "device": "cpu", "dtype": "float32"} | (model or {})
    tree = {"model_config": model, "scheduler_config": settings, "speculative_config": speculative or {}}
    return build_engine(build_recipe(tree))
