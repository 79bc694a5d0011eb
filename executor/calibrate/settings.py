"""What a quantization is asked to be: everything that decides the bytes it writes."""

from dataclasses import dataclass

from executor.errors import UserError

FLOAT = "FLOAT"
STATIC = ("W8A8", "W8A8S", "W8A8_MIX")
"""Types whose activations have a scale that is measured beforehand."""
QUANTIZED_ACTIVATIONS = (*STATIC, "W8A8_DYNAMIC", "W4A8_DYNAMIC")


@dataclass(frozen=True)
class Kinds:
    """Types of a scheme's tensors, by the words of descriptions. Experts read few tokens each: theirs are dynamic."""

    linears: str
    experts: str


SCHEMES: dict[str, Kinds] = {
    "w8a8": Kinds("W8A8", "W8A8_DYNAMIC"),
    "w8a8_dynamic": Kinds("W8A8_DYNAMIC", "W8A8_DYNAMIC"),
    "w8a8_mix": Kinds("W8A8_MIX", "W8A8_DYNAMIC"),
    "w8a16": Kinds("W8A16", "W8A16"),
    "w4a8_dynamic": Kinds("W8A8_DYNAMIC", "W4A8_DYNAMIC"),
    "w8a8s": Kinds("W8A8S", "W8A8_DYNAMIC"),
}
"""By the word of the command line."""


@dataclass(frozen=True)
class Settings:
    """One quantization.

    smooth: SmoothQuant's alpha, 0 for none. percentile: of the values of an activation that its scale covers, 100 for
    all of them. rounding: nearest or gptq. keep_float, quantize: shell patterns of linears over the scheme's own
    choice. samples: of the calibration set, at most. dtype: what the calibration's forward is computed in.
    """

    scheme: str
    smooth: float
    percentile: float = 100.0
    rounding: str = "nearest"
    keep_float: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    quantize_vision: bool = True
    samples: int = 32
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UserError(f"--scheme: got {self.scheme}; one of {', '.join(SCHEMES)}")
        if not 0 <= self.smooth < 1:
            raise UserError(f"--smooth: got {self.smooth:g}; a number from 0 (none) to below 1")
        if not 90 <= self.percentile <= 100:
            raise UserError(f"--percentile: got {self.percentile:g}; from 90 to 100 (all values)")
        if self.percentile < 100 and self.kinds.linears not in STATIC:
            raise UserError(
                f"--percentile: {self.scheme} has no scale that is measured beforehand; it is for w8a8, w8a8s, w8a8_mix"
            )
        if self.smooth and self.kinds.linears not in QUANTIZED_ACTIVATIONS:
            raise UserError(f"--smooth: activations stay float with {self.scheme}, there is nothing to smooth")
        if self.samples < 1:
            raise UserError(f"--samples: got {self.samples}; at least 1")

    @property
    def kinds(self) -> Kinds:
        return SCHEMES[self.scheme]

    @property
    def needs_activations(self) -> bool:
        """Whether anything must be computed by the model before its weights can be rounded."""
        return self.kinds.linears in STATIC or self.smooth > 0 or self.rounding == "gptq"

    @property
    def looks_twice(self) -> bool:
        """Whether a layer's inputs are looked at again once its smoothing is known."""
        return self.percentile < 100 or self.rounding == "gptq"
