"""What this CPU computes fast, asked once by tried calls: a name of a chip or a flag promises nothing about a library.

Invariants: what stands in a `Capability` has been computed here and was right. Knows no recipe but its key cpu_isa.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from executor.device.cpu.int8_products import DIGITS, EXPANDED, ONE_CALL, PRODUCTS
from executor.errors import UserError

REORDERED, PACKED_FP16, PLAIN = "reordered", "packed fp16", "plain"
"""How a linear's weight is kept: oneDNN's own layout in its own type; FBGEMM's fp16 panels, multiplied with fp32
activations; as the checkpoint has it."""

_INT8_WORDS = {
    ONE_CALL: "by oneDNN in one product (32-bit sums)",
    DIGITS: "by FBGEMM in two products of digits (no VNNI)",
    EXPANDED: "made float32 block by block (no int8 product here is exact)",
}
_TRIED = (33, 48)  # outputs and inputs of the tried products


@dataclass(frozen=True)
class Capability:
    """What was found, or was forced by the recipe.

    isa: "avx512" has products of bfloat16 (AVX-512 bf16 or AMX), "avx2" an x86-64 CPU without them, "other" any other.
    """

    isa: str
    vectors: str  # what torch says of itself, such as AVX2
    reorders: frozenset[torch.dtype]  # types that oneDNN reorders and multiplies here
    packs_fp16: bool
    int8: str = EXPANDED  # how whole numbers of int8 are multiplied: ONE_CALL, DIGITS or EXPANDED
    has_tiles: bool = False  # AMX

    def form(self, dtype: torch.dtype) -> str:
        """How weights of `dtype` are kept: one of REORDERED, PACKED_FP16, PLAIN."""
        if dtype in self.reorders and (dtype.itemsize > 2 or self.isa != "avx2"):
            return REORDERED
        return PACKED_FP16 if dtype.itemsize == 2 and self.packs_fp16 else PLAIN

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of activations and of the KV cache beside weights of `dtype`."""
        return torch.float32 if self.form(dtype) == PACKED_FP16 else dtype

    def copies_tied_head(self, dtype: torch.dtype) -> bool:
        """Whether an output head is worth a copy of the embedding in this form: plain weights are far slower.

        Source: 151936 x 2048 in bfloat16, plain and reordered. With AMX the same; without (an AMD Zen 5, two threads)
        34 and 9 ms for one row, 31 and 13 ms for eight. int8 weights are always a copy.
        """
        form = self.form(dtype)
        is_slow = form == PACKED_FP16 or (form == REORDERED and dtype.itemsize == 2 and not self.has_tiles)
        return dtype is torch.int8 or is_slow

    @property
    def tiles_attention(self) -> bool:
        """Whether attention of many bfloat16 queries is made of large products (tiled_attention.py). With AMX torch's
        own kernel packs keys and has not been compared.
        """
        return self.isa == "avx512" and not self.has_tiles

    @property
    def rounds_head(self) -> bool:
        """Whether a large head of int8 weights is worth making: values made float32 at every call are slower than 16
        bits, 3 times at one row and more at several (151936 x 2048).
        """
        return self.int8 != EXPANDED

    def describe(self, dtype: torch.dtype) -> str:
        """For the log: what is used, and what that means for `dtype`."""
        kept, computed = (str(x).removeprefix("torch.") for x in (dtype, self.compute_dtype(dtype)))
        line = f"{self.isa} path (torch: {self.vectors}), {torch.get_num_threads()} threads, {kept} weights "
        line += {REORDERED: "in oneDNN's layout", PACKED_FP16: "in 16 bits (packed)", PLAIN: "as they are"}[
            self.form(dtype)
        ]
        return f"{line}, activations and KV cache in {computed}; int8 weights {_INT8_WORDS[self.int8]}"


def capability(cpu_isa: str = "auto") -> Capability:
    """What this machine has, or the part of it that `cpu_isa` (auto, avx2, avx512) names.

    Raises UserError where it has not what is forced.
    """
    found = _found()
    if cpu_isa in ("auto", found.isa):
        return found
    if cpu_isa == "avx2" and found.isa == "avx512":
        return replace(found, isa="avx2", int8=_exact_int8((DIGITS, EXPANDED)))
    raise UserError(
        f"model_config.cpu_isa: {cpu_isa} is forced, and this machine has not what it takes: torch reports "
        f"{found.vectors}, and oneDNN multiplies {_names(found.reorders)} here (python -m executor.commands.doctor "
        "says what the CPU has). Set cpu_isa: auto"
    )


@cache
def _found() -> Capability:
    reorders = frozenset(d for d in (torch.float32, torch.bfloat16, torch.float16) if _works(_reordered_product, d))
    packs_fp16 = _works(_packed_product, torch.float16)
    isa = "avx2" if packs_fp16 else "other"  # FBGEMM is for x86-64 with AVX2 only
    if packs_fp16 and torch.bfloat16 in reorders and _multiplies_bfloat16():
        isa = "avx512"
    int8 = _exact_int8((ONE_CALL, DIGITS, EXPANDED))
    has_tiles = isa == "avx512" and _has("_is_amx_tile_supported")
    return Capability(isa, torch.backends.cpu.get_cpu_capability(), reorders, packs_fp16, int8, has_tiles)


def _multiplies_bfloat16() -> bool:
    """Whether bfloat16 products are the CPU's own: without them oneDNN takes the type as well, by slow emulation."""
    return _has("_is_avx512_bf16_supported") or _has("_is_amx_tile_supported")


def _has(name: str) -> bool:
    """What torch says. The functions are private to it: one that is gone is no reason to stop, its answer is no."""
    return hasattr(torch.cpu, name) and getattr(torch.cpu, name)()


@cache
def _exact_int8(forms: tuple[str, ...]) -> str:
    """The first of `forms` whose sums are right here, for every sign and for the largest numbers that int8 has. The
    last of them is made of float32 products, which every CPU has.
    """
    return next(form for form in forms if _sums_are_exact(form))


def _sums_are_exact(form: str) -> bool:
    """Without VNNI libraries add pairs of products in 16 bits, with saturation and without a word: largest numbers in
    neighbouring places show it. One row and many are multiplied by different code.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-128, 128, (_TRIED[0], 4 * _TRIED[1]), generator=generator, dtype=torch.int8)
    values[0], values[1] = -128, 127
    try:
        with torch.inference_mode():
            product = PRODUCTS[form](values)
            for rows in (1, 2, 40):
                x = torch.randint(-128, 128, (rows, values.shape[1]), generator=generator, dtype=torch.int8)
                for tried in (x, torch.full_like(x, -128), torch.full_like(x, 127)):
                    if not torch.equal(product.sums(tried).double(), tried.double() @ values.double().t()):
                        return False
    except (RuntimeError, AttributeError):  # refused; or this build of torch has no such op
        return False
    return True


def _works(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether the product can be had in `dtype` here, and is right: each library refuses in its own words."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_TRIED, generator=generator).to(dtype)
    x = torch.randn(3, _TRIED[1], generator=generator).to(dtype)
    wanted = F.linear(x.double(), weight.double())
    try:
        with torch.inference_mode():
            got = product(x, weight)
    except (RuntimeError, AttributeError):  # refused; or this build of torch has no such op
        return False
    return bool((got.double() - wanted).abs().max() <= 0.02 * wanted.abs().max())


def _reordered_product(x: Tensor, weight: Tensor) -> Tensor:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _packed_product(x: Tensor, weight: Tensor) -> Tensor:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
    return torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)


def _names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no type"
