"""Rows for people: printed in the order of the data set, each as soon as all before it are there."""

from collections.abc import Collection, Iterable
from typing import TextIO

from executor.commands.generate.rows import Row

SHOWN_CHARACTERS = 300  # of a question
TPOT_TOKENS = 8  # of an answer at least, for a time per token that says something


class Printer:
    """Prints rows in the order of the data set, each as soon as all before it are there."""

    def __init__(self, total: int, out: TextIO, already: Iterable[int]) -> None:
        self._total, self._out, self._next = total, out, 0
        self._already = set(already)
        self._skip()

    def _skip(self) -> None:
        while self._next in self._already:
            self._next += 1

    def has_next(self, index: int) -> bool:
        return index == self._next

    def print_ready(self, rows: dict[int, Row]) -> None:
        while self._next in rows:
            print(self._block(rows[self._next]), file=self._out, flush=True)
            self._next += 1
            self._skip()

    def _block(self, row: Row) -> str:
        lines = [f"[{row['index'] + 1}/{self._total}] {', '.join(row['media']) or 'no media'}"]
        if row["prompt"]:
            lines.append(_field("question", _shorten(row["prompt"])))
        if row["error"] is not None:
            return "\n".join([*lines, _field("error", row["error"]), ""])
        for text in row.get("texts", [row["text"]]):
            lines.append(_field("answer", text))
        tokens = f"{row['vision_tokens']} vision, {row['prompt_tokens']} prompt, {row['completion_tokens']} completion"
        lines.append(_field("tokens", tokens))
        # A short answer's few steps are mostly those of other requests' prompts; the JSON has the figure all the same.
        is_told = row["tpot_ms"] is not None and row["completion_tokens"] >= TPOT_TOKENS
        tpot = f"{row['tpot_ms']:.1f} ms" if is_told else "-"
        lines.append(_field("time", f"TTFT {row['ttft_ms']:.1f} ms, TPOT {tpot}, e2e {row['e2e_ms']:.1f} ms"))
        lines += [_field("warning", warning) for warning in row.get("warnings", ())]
        if row.get("drawn"):
            lines.append(_field("drawn", row["drawn"]))
        return "\n".join([*lines, ""])


def _field(name: str, value: str) -> str:
    return f"  {name:<10}" + value.replace("\n", "\n" + " " * 12)


def _shorten(text: str) -> str:
    """For the eye; the JSON has it whole."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}... ({len(text)} characters)"


def print_summary(outputs: list[Row], before: Collection[int], seconds: float, drafts: str, out: TextIO) -> None:
    """How many of the rows were answered now, and how many `before` (their indices); tokens and time are of now.
    `drafts`: a few words of them, or none."""
    new = [row for row in outputs if row["index"] not in before]
    num_failed = sum(row["error"] is not None for row in new)
    answered = f"{len(new) - num_failed} answered"
    answered += f" now, {len(outputs) - len(new)} before" if before else ""
    failed = f", {num_failed} failed" if num_failed else ""
    tokens = sum(row["completion_tokens"] or 0 for row in new)
    drafts = f"; {drafts}" if drafts else ""
    print(f"{answered}{failed}, {tokens} tokens, {seconds:.1f} s{drafts}", file=out, flush=True)
