"""Rows as they come, from whoever answers: saved, counted, and printed in the order of the data set."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

from executor.commands.generate.printer import Printer
from executor.commands.generate.results import ResultsFile
from executor.commands.generate.rows import Row

BAR_AFTER_S = 5.0


class Taking:
    """Fills `rows` (by their index), of which those of an earlier run are there. Use it as a context manager."""

    def __init__(self, total: int, rows: dict[int, Row], results: ResultsFile | None, out: TextIO) -> None:
        self._total, self._rows, self._results = total, rows, results
        self._printer = Printer(total, out, already=rows)
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
        if self._results:
            self._results.append(row, asked)
        self._rows[row["index"]] = row
        self._bar.update()
        if self._printer.has_next(row["index"]):
            shown = self._on_screen and self._bar.format_dict["elapsed"] > BAR_AFTER_S
            if shown:
                self._bar.clear()
            self._printer.print_ready(self._rows)
            if shown:
                self._bar.refresh()
