"""`eval --dump-layers`: the hidden states of a few prompts beside those of another run, stage by stage.

The other side is transformers (executor.evaluate.reference), or this project on another device or checkpoint in a
process of its own (`python -m executor.commands.eval.other_side`): an emulated chip stays in a process for good.
Prompts are the first of the recipe's data set. One rank computes everything; decode graphs play no part in it.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.sample import Sample, media_source
from executor.checkpoint.description import read_description
from executor.checkpoint.folder import find_checkpoint, is_hub_id
from executor.commands.generate.ask import row_prompt
from executor.errors import UserError
from executor.host.env import REPO_ROOT, environment, find_path
from executor.recipe.disk_cache import without_disk_cache
from executor.recipe.schema import Recipe
from executor.recipe.settle import prepare, resolve_device
from executor.schedule.request import Prompt

logger = logging.getLogger(__name__)

FIRST = 2
"""Prompts that are compared where data_config.limit says nothing."""
EMULATED_SOC = "atlas_800i_a2"
"""The chip that is emulated where the recipe names none."""

Other = Callable[[int, Sample, Prompt], dict[str, Any]]
"""The other side's hidden states of a prompt, by its number."""


def run_layers(recipe: Recipe, out: TextIO | None = None) -> tuple[dict[str, Any], int]:
    """Prints the table; returns the JSON document and the exit status. UserError for what cannot be compared."""
    out = out or sys.stdout
    recipe = resolve_device(recipe)
    check(recipe)
    recipe = plain(recipe)
    with tempfile.TemporaryDirectory(prefix="layers_") as folder:
        aside = (
            None if recipe.eval.dump_layers == "transformers" else run_other_side(other_recipe(recipe), Path(folder))
        )
        return _compared(recipe, aside, Path(folder), out)


def check(recipe: Recipe) -> None:
    """UserError for a recipe whose hidden states are not all on one rank, and for one compared with itself."""
    target, reference = recipe.eval.dump_layers, recipe.eval.reference_model
    if recipe.parallel.world_size > 1:
        raise UserError(
            f"eval_config.dump_layers: parallel_config.world_size is {recipe.parallel.world_size}, and each rank holds "
            "a slice of the hidden states; set parallel_config.world_size=1"
        )
    if target == recipe.model.device and reference is None:
        raise UserError(
            f"eval_config.dump_layers: {target} is the recipe's own device; name another side, or another checkpoint "
            "by eval_config.reference_model"
        )
    if reference is not None and not find_path(reference).is_dir() and not is_hub_id(reference):
        raise UserError(
            f"eval_config.reference_model: there is no folder {reference}; give the folder of a checkpoint, or a hub id"
        )
    if target == "transformers":
        path = reference or recipe.model.model_path
        if read_description(find_checkpoint(path, recipe.model.hub)) is not None:
            raise UserError(
                f"eval_config.dump_layers: transformers does not read the quantized weights of {path}; set "
                "eval_config.reference_model to the float checkpoint they were made of"
            )


def plain(recipe: Recipe) -> Recipe:
    """Without what plays no part: graphs of decode steps, a profile."""
    return recipe.replace(model={"exe_mode": "eager", "profile": False}, data={"limit": recipe.data.limit or FIRST})


def other_recipe(recipe: Recipe) -> Recipe:
    """The same on the device, and of the checkpoint, that it is compared with."""
    model: dict[str, Any] = {"device": recipe.eval.dump_layers}
    if recipe.eval.dump_layers == "npu_emulated":
        model |= {"soc": recipe.model.soc or EMULATED_SOC}
        if recipe.model.dtype == "float32":  # which no chip computes in
            model |= {"dtype": "auto"}
    elif recipe.model.device != "cpu":
        model |= {"soc": None, "dtype": "float32"}  # as a reference should
    if recipe.eval.reference_model is not None:
        model |= {"model_path": recipe.eval.reference_model, "quantization": "auto", "kv_cache_dtype": "auto"}
    return recipe.replace(model=model)


def run_other_side(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Its hidden states into `folder`; returns what it says of itself. UserError and RuntimeError in its words."""
    file = folder / "recipe.json"
    file.write_text(recipe.model_dump_json(by_alias=True), encoding="utf-8")
    logger.info("the other side: %s on %s, in a process of its own", recipe.model.model_path, recipe.model.device)
    done = subprocess.run(
        [sys.executable, "-m", "executor.commands.eval.other_side", str(file), str(folder)],
        env=environment() | {"PYTHONPATH": str(REPO_ROOT)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    said = json.loads(lines[-1]) if lines else {"error": f"it ended with status {done.returncode} and no word"}
    if done.returncode:
        kind = UserError if done.returncode == 2 else RuntimeError
        raise kind(f"the other side of the comparison ({recipe.model.device}): {said['error']}")
    return {name: value for name, value in said.items() if name != "command"}


def prompts(recipe: Recipe, processor: Any) -> Iterator[tuple[int, Sample, Prompt]]:
    """Number, sample and prompt. UserError for a row that cannot be asked."""
    for number, sample in enumerate(load_dataset(recipe.data, recipe).first(recipe.data.limit)):
        if sample.error:
            raise UserError(sample.error)
        yield number, sample, row_prompt(processor, recipe, sample)


@contextmanager
def opened(recipe: Recipe) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An engine, and what its side computes in: the type of its weights, of its activations, and their schemes."""
    from executor.commands.build import engine_of, open_rank
    from executor.quant.choose import schemes_of

    prepared = prepare(without_disk_cache(recipe))  # all is to be computed
    with engine_of(prepared, *open_rank(prepared)) as engine:
        yield (
            engine,
            {
                "device": prepared.recipe.model.device,
                "dtype": prepared.recipe.model.dtype,
                "computes_in": str(engine.runner.dtype).removeprefix("torch."),
                "schemes": sorted(schemes_of(engine.runner.model)),
            },
        )


def _compared(recipe: Recipe, aside: dict[str, Any] | None, folder: Path, out: TextIO) -> tuple[dict[str, Any], int]:
    from executor.evaluate.capture import capture
    from executor.evaluate.layers import ROUNDING, Differences, first_above, largest_jump, table

    with opened(recipe) as (engine, own):
        other = _transformers(recipe, engine.processor) if aside is None else _saved(folder)
        aside = aside or {"device": "cpu", "dtype": "float32", "computes_in": "float32", "schemes": ["none"]}
        types = (side[name] for side in (own, aside) for name in ("dtype", "computes_in"))
        dtype = max(types, key=ROUNDING.__getitem__)
        is_float = own["schemes"] == aside["schemes"] == ["none"]
        found = Differences(dtype, is_quantized=not is_float)
        for number, sample, prompt in prompts(recipe, engine.processor):
            found.add(capture(engine, prompt), other(number, sample, prompt))
            logger.info("prompt %d, %s: %d tokens compared", number + 1, sample.id, len(prompt.token_ids))
    stages = found.stages
    first, jump = first_above(stages), largest_jump(stages)
    print(table(stages), file=out)
    print(_verdict(first, jump, found.left_out), file=out)
    model_path = recipe.model.model_path
    return {
        "command": "eval",
        "dump_layers": recipe.eval.dump_layers,
        "dataset": recipe.data.dataset,
        "samples": found.num_prompts,
        "model": {"model_path": model_path, **own},
        "reference": {"model_path": recipe.eval.reference_model or model_path, **aside},
        "lost_at": first.stage if first else None,
        "largest_jump": jump.stage if jump else None,
        "stages": [stage.tree() for stage in stages],
        "not_compared": found.left_out,
    }, 0


def _transformers(recipe: Recipe, processor: Any) -> Other:
    from executor.evaluate.reference import Reference

    path = recipe.eval.reference_model or recipe.model.model_path
    reference = Reference(find_checkpoint(path, recipe.model.hub), processor)
    return lambda number, sample, prompt: reference.capture(prompt, [media_source(part) for part in sample.media_parts])


def _saved(folder: Path) -> Other:
    from safetensors.torch import load_file

    return lambda number, sample, prompt: load_file(folder / f"{number}.safetensors")


def _verdict(first: Any, jump: Any, left_out: list[str]) -> str:
    lines = []
    if first is None:
        lines.append("all stages agree within the tolerance of the type")
    else:
        lines.append(f"accuracy is lost at: {first.stage}")
    if jump is not None:
        lines.append(f"the error grows most at: {jump.stage}")
    if left_out:
        lines.append(f"not compared for every prompt, because the other side does not have it: {', '.join(left_out)}")
    return "\n".join(lines)
