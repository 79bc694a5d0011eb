"""The `generate` command: answer a recipe's questions and print them.

A request that cannot be answered has its error in its row; the others are answered, and the exit status is 2.
"""

import sys
from collections.abc import Callable
from typing import Any, TextIO

from dataset.load import load_dataset
from dataset.sample import Dataset
from executor.commands.generate.answering import Answers, run_work
from executor.commands.generate.printer import Printer, print_summary
from executor.commands.generate.rows import Row
from executor.recipe.schema import Recipe


def run(recipe: Recipe, build: Callable[..., Any] | None = None, out: TextIO | None = None) -> tuple[Row, int]:
    """Answer everything `recipe` asks; returns the JSON document and the exit status.

    `build` makes the engine (executor.commands.build.engine_of). Raises UserError for what keeps all from starting.
    """
    return run_work(Printed(), recipe, build, out or sys.stdout)


class Printed:
    """Answers are printed in the order of the data set (executor.commands.generate.answering.Work)."""

    command = "generate"

    def dataset(self, recipe: Recipe) -> Dataset:
        return load_dataset(recipe.data, recipe)

    def finish(self, row: Row, dataset: Dataset) -> Row:
        return row

    def printer(self, total: int, out: TextIO, already: frozenset[int]) -> Printer:
        return Printer(total, out, already)

    def progress(self) -> str:
        return ""

    def report(self, recipe: Recipe, answers: Answers, out: TextIO) -> Row:
        print_summary(answers.outputs, answers.before, answers.seconds, answers.speculation.words, out)
        drafts = answers.speculation.figures()
        return {
            "command": self.command,
            "model": recipe.model.model_path,
            "device": recipe.model.device,
            "exe_mode": recipe.model.exe_mode,
            **({"drafts": drafts} if drafts else {}),
            "outputs": answers.outputs,
        }
