"""What became of drafts, since the engine was made. Counts of several engines add up."""

from dataclasses import dataclass

from executor.engine.totals import Totals

LEAST_DRAFTS = 16  # of which a gain is told


@dataclass(slots=True)
class SpeculationCounts(Totals):
    """Under the names that vLLM has for them.

    `num_drafts`: times that a request had drafts in a step; `num_draft_tokens` of these, of which
    `num_accepted_tokens` were right; `num_accepted_per_pos`: as the first draft, the second, ...
    `verify_s`: seconds of the steps with drafts, and `plain_s`: what steps without would have taken for the same
    tokens, where that has been measured; steps of which it is not known are in neither.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_pos: tuple[int, ...] = ()
    verify_s: float = 0.0
    plain_s: float = 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """Of the draft tokens; None where there were none."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens that a request got of a step with drafts, the one that it would have got without included."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def gain(self) -> float | None:
        """How many times as fast the steps with drafts were; None of few, where one slow step decides."""
        return self.plain_s / self.verify_s if self.verify_s and self.num_drafts >= LEAST_DRAFTS else None

    def figures(self) -> dict[str, int | float]:
        """Those that are known, by name; none where there were no drafts."""
        if not self.num_drafts:
            return {}
        found = {
            "drafts": self.num_drafts,
            "draft_tokens": self.num_draft_tokens,
            "accepted_draft_tokens": self.num_accepted_tokens,
            "acceptance_rate": self.acceptance_rate,
            "acceptance_length": self.acceptance_length,
            "drafting_gain": self.gain,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def words(self) -> str:
        """For people; empty where there were no drafts."""
        if not self.num_drafts:
            return ""
        gain = "" if self.gain is None else f", such steps {self.gain:.2f} x as fast as without drafts"
        return (
            f"drafts: {self.num_accepted_tokens} of {self.num_draft_tokens} tokens right "
            f"({100 * self.acceptance_rate:.0f} %), {self.acceptance_length:.2f} tokens a step with drafts{gain}"
        )

    def add_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """Of one request in one step."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafts
        self.num_accepted_tokens += num_accepted
        missing = num_drafts - len(self.num_accepted_per_pos)
        if missing <= 0 and not num_accepted:
            return
        places = [*self.num_accepted_per_pos, *[0] * missing]
        self.num_accepted_per_pos = tuple(count + (place < num_accepted) for place, count in enumerate(places))

    def add_time(self, verify_s: float, plain_s: float) -> None:
        """Of one step."""
        self.verify_s += verify_s
        self.plain_s += plain_s
