"""Rows as they come, from whoever answers: finished, saved, counted, and printed in the order of the data set."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

from dataset.sample import Dataset
from executor.commands.generate.results import ResultsFile
from executor.commands.generate.rows import Row

BAR_AFTER_S = 5.0


class Taking:
    """Fills `rows` (by their index), of which those of an earlier run are there. Use it as a context manager."""

    def __init__(
        self, work: Any, dataset: Dataset, rows: dict[int, Row], results: ResultsFile | None, out: TextIO
    ) -> None:
        """`work`: an executor.commands.generate.answering.Work."""
        self._work, self._dataset, self._rows, self._results = work, dataset, rows, results
        self._total = len(dataset)
        self._printer = work.printer(self._total, out, frozenset(rows))
        self._on_screen = sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> "Taking":
        interval_s = 0.2 if self._on_screen else 30.0  # a log file gets a line now and then
        self._bar = tqdm(
            total=self._total, initial=len(self._rows), unit="request", delay=BAR_AFTER_S, mininterval=interval_s
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    @property
    def is_complete(self) -> bool:
        return len(self._rows) >= self._total

    def __call__(self, row: Row) -> None:
        asked = row.pop("fingerprint")
        row = self._work.finish(row, self._dataset)
        if self._results:
            self._results.append(row, asked)
        self._rows[row["index"]] = row
        self._bar.set_postfix_str(self._work.progress(), refresh=False)
        self._bar.update()
        if self._printer is not None and self._printer.has_next(row["index"]):
            shown = self._on_screen and self._bar.format_dict["elapsed"] > BAR_AFTER_S
            if shown:
                self._bar.clear()
            self._printer.print_ready(self._rows)
            if shown:
                self._bar.refresh()
