"""The three chips of the NPU backend, and the table of which call serves which op on which of them.

The table is the one place where a chip's choice is made: the first call of an op that the installed torch_npu has
is taken, with one warning where it is not the first. Imports no torch_npu.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from executor.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Soc:
    """One chip. `names`: how the runtime calls it (prefixes).

    `cache`: "ND" [blocks, block_size, K, D], or "NZ" [blocks, K*D/16, block_size, 16]; NZ weights and caches of the
    300I DUO are in the storage format FRACTAL_NZ as well. `swiglu_columns` divides the width of a fused SwiGLU's
    input; `gate_rows` bounds the tokens that are gated at once; `routes_ranges`: routing takes a range of experts and
    summing leaves out the rows of others (npu_moe_init_routing_v2, npu_moe_finalize_routing), else neither does;
    `cache_elements` bounds what one cache of keys or values may have. `int8_by_rows`: an int8 weight in NZ is cast as
    [out, in] and read transposed; `weight_groups`: weight-only products take a scale for every group of inputs.
    """

    name: str
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    cache: str = "ND"
    always_nz: bool = False
    slot_dtype: torch.dtype = torch.int64
    swiglu_columns: int = 2
    gate_rows: int | None = None
    routes_ranges: bool = True
    cache_elements: int | None = 2**31 - 1
    int8_by_rows: bool = False
    weight_groups: bool = True


SOCS = {
    soc.name: soc
    for soc in (
        Soc("atlas_800i_a2", ("Ascend910B",), (torch.bfloat16, torch.float16)),
        Soc("atlas_800i_a3", ("Ascend910_93",), (torch.bfloat16, torch.float16)),
        Soc(
            "atlas_300i_duo",
            ("Ascend310P",),
            (torch.float16,),
            cache="NZ",
            always_nz=True,
            slot_dtype=torch.int32,
            swiglu_columns=32,
            gate_rows=1024,
            routes_ranges=False,
            cache_elements=None,
            int8_by_rows=True,
            weight_groups=False,
        ),
    )
}

_TRAINED = ("atlas_800i_a2", "atlas_800i_a3")
_DUO = ("atlas_300i_duo",)
_ALL = (*_TRAINED, *_DUO)
COMPOSED = "composed"
GROUPED, GROUPED_SWIGLU = "npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2"
GROUPED_DEQUANT = "npu_quant_grouped_matmul_dequant"

# op of the surface, chips, dtypes, layout of its operands, calls (best first; "composed" is plain torch)
TABLE = (
    ("rms_norm", _ALL, "bf16 fp16", "[..., n]", ("npu_rms_norm", COMPOSED)),
    ("add_rms_norm", _ALL, "bf16 fp16", "[..., n]", ("npu_add_rms_norm", COMPOSED)),
    ("rope", _ALL, "bf16 fp16", "TND, D 64 or 128", ("npu_apply_rotary_pos_emb", "npu_rotary_mul", COMPOSED)),
    # In a GE graph: torchair's converter of the in-place form copies queries and keys first.
    ("rope_in_graph", _TRAINED, "bf16 fp16", "TND, D 64 or 128", ("npu_rotary_mul", COMPOSED)),
    ("qkv_norm_rope_write", _TRAINED, "bf16 fp16", "NZ cache, D 128", ("npu_qkv_rms_norm_rope_cache", COMPOSED)),
    ("swiglu", _ALL, "bf16 fp16", "[T, 2I]; 300I DUO: 2I % 32 == 0", ("npu_swiglu", COMPOSED)),
    ("kv_write", _TRAINED, "bf16 fp16", "ND or NZ cache", ("npu_scatter_pa_kv_cache",)),
    ("kv_write", _DUO, "fp16", "NZ cache", ("_npu_reshape_and_cache",)),
    ("attention", _TRAINED, "bf16 fp16", "TND, paged", ("npu_fused_infer_attention_score_v2",)),
    ("attention", _DUO, "fp16", "TND, paged, 16-row tiles", ("_npu_paged_attention",)),
    ("int8_cache_write", _TRAINED, "bf16 fp16", "[T, K * D]", ("npu_quantize",)),
    ("int8_cache_decode", _TRAINED, "bf16 fp16", "BNSD, ND cache", ("npu_fused_infer_attention_score",)),
    ("summed_linear", ("atlas_800i_a2",), "bf16 fp16", "[in, out]", ("npu_mm_all_reduce_base", COMPOSED)),
    # Its page: for prefill, not for decode. The other way round a decode layer has two nodes less (docs/check.md).
    ("summed_linear_in_decode", ("atlas_800i_a2",), "bf16 fp16", "[in, out]", (COMPOSED, "npu_mm_all_reduce_base")),
    (
        "chunk_attention",
        _DUO,
        "fp16",
        "TND, paged; the first with a mask of 2048, the other with one row a token",
        ("_npu_paged_attention_splitfuse_v2", "_npu_paged_attention_splitfuse"),
    ),
    ("gate_topk", _ALL, "bf16 fp16", "[T, E]", ("npu_moe_gating_top_k_softmax", COMPOSED)),
    ("experts", _ALL, "bf16 fp16", "[E, n, 2I], [E, I, n]", ("npu_grouped_matmul",)),
    # The first in NZ and 2I <= 10240 only; else the second, with an activation and a quantization between the products.
    ("int8_experts", _TRAINED, "bf16 fp16", "[E, n, 2I], [E, I, n] int8", (GROUPED_SWIGLU, GROUPED)),
    ("int8_experts", _DUO, "fp16", "[E, 2I, n], [E, n, I] int8, multiples of 16", (GROUPED_DEQUANT,)),
    ("int4_experts", _TRAINED, "bf16 fp16", "[E, n, 2I], [E, I, n] int4, I % 256 == 0", (GROUPED_SWIGLU, GROUPED)),
    ("weight_int8_experts", _TRAINED, "bf16 fp16", "[E, n, 2I], [E, I, n] int8, plain", (GROUPED,)),
    ("static_linear", _ALL, "bf16 fp16", "int8 [in, out]; 300I DUO: [out, in] transposed", ("npu_quant_matmul",)),
    ("dynamic_linear", _TRAINED, "bf16 fp16", "int8 [in, out]", ("npu_quant_matmul",)),
    ("dynamic_linear", _DUO, "fp16", "int8 [out, in], both in tiles of 16", ("npu_quant_matmul_dequant",)),
    ("weight_linear", _ALL, "bf16 fp16", "int8 [in, out], not NZ", ("npu_weight_quant_batchmatmul",)),
    # A bias of the norm goes in with CANN 8.3 and later.
    ("add_rms_norm_static", _ALL, "bf16 fp16", "[T, n] to int8", ("npu_add_rms_norm_quant", COMPOSED)),
    ("add_rms_norm_dynamic", _TRAINED, "bf16 fp16", "[T, n] to int8", ("npu_add_rms_norm_dynamic_quant", COMPOSED)),
    ("swiglu_quantized", _TRAINED, "bf16 fp16", "[T, 2I] to int8", ("npu_dequant_swiglu_quant", COMPOSED)),
)


def soc_of(name: str) -> Soc:
    """The chip of a recipe's `soc`. Raises UserError for a name that is none."""
    if name not in SOCS:
        raise UserError(f"model_config.soc: got {name!r}, allowed {', '.join(SOCS)}")
    return SOCS[name]


def chip_named(device_name: str) -> Soc | None:
    """The chip whose runtime name this is; None for one that this backend does not know."""
    return next((soc for soc in SOCS.values() if device_name.startswith(soc.names)), None)


def choose(soc: Soc, has: Callable[[str], bool]) -> dict[str, str]:
    """The call of every op on `soc`, where `has` says what the installed torch_npu has.

    Raises UserError where an op that cannot be composed is missing.
    """
    chosen = {}
    for op, chips, _, _, calls in TABLE:
        if soc.name not in chips:
            continue
        found = next((call for call in calls if call == COMPOSED or has(call)), None)
        if found is None:
            raise UserError(
                f"the installed torch_npu has none of {', '.join(calls)}, which {op} needs on {soc.name}; "
                "2.7.1.post11 or later is supported (300I DUO: with NNAL's ATB)"
            )
        if found != calls[0]:
            logger.warning("the installed torch_npu lacks %s: %s uses %s instead", calls[0], op, found)
        chosen[op] = found
    return chosen
