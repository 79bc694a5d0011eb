"""What a metric says of one answer. Metrics are functions of an answer's text and its sample: no state, no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dataset.sample import Sample


@dataclass(frozen=True)
class BoxSpace:
    """The units in which a model writes boxes: a picture is `width` x `height` of them.

    Qwen3-VL writes thousandths of either side (BoxSpace(1000, 1000)), Qwen2.5-VL pixels of the picture as it saw it,
    after the resize.
    """

    width: float
    height: float


@dataclass(frozen=True)
class Score:
    """`value` is 0 to 1. `extracted` is what of the answer was compared, "" where nothing in it could be."""

    value: float
    extracted: str
    details: Mapping[str, float] = field(default_factory=dict)  # further figures, as {"iou": 0.71}

    @property
    def parsed(self) -> bool:
        """Whether the answer held anything that could be compared."""
        return self.extracted != ""


@dataclass(frozen=True)
class Metric:
    """One way to score answers. `score(text, sample, space)`; space is None for answers that hold no boxes.

    needs: the fields of a sample of which it must have one; `fits` says whether it has.
    """

    name: str
    needs: tuple[str, ...]
    score: Callable[[str, Sample, BoxSpace | None], Score]
    source: str  # the public implementation that it equals

    def fits(self, sample: Sample) -> bool:
        """Whether the sample holds what it can be scored by: accepted answers, or boxes."""
        return any(getattr(sample, field) for field in self.needs)
