"""Which scheme every layer of a model has: read from the checkpoint's description, and handed to the layers.

The model is built as if its weights were float and has no memory yet; a layer that is quantized takes another scheme.
"""

import re
from functools import cache

from torch import nn

from executor.checkpoint.description import FLOAT_TYPE, Description
from executor.checkpoint.pull import Catalog
from executor.errors import UserError, folded
from executor.layers.attention import Attention
from executor.layers.embedding import Head
from executor.layers.linear import Linear
from executor.layers.moe import Experts
from executor.layers.norm import RMSNorm
from executor.quant.assumed import assumed_type
from executor.quant.fields import EXPERT_LINEARS, is_stacked
from executor.quant.float import FLOAT
from executor.quant.kv_cache import C8, UNUSABLE, faults, tensor_names
from executor.quant.scheme import Scheme
from executor.quant.w4a8_dynamic import W4A8Dynamic
from executor.quant.w8a8 import W8A8
from executor.quant.w8a8_dynamic import W8A8Dynamic
from executor.quant.w8a8_mix import W8A8Mix
from executor.quant.w8a8sc import compressed_scheme, uncompressed_sizes
from executor.quant.w8a16 import W8A16
from executor.quant.wint8 import WInt8

SCHEMES: dict[str, Scheme] = {
    FLOAT_TYPE: FLOAT,
    "W8A8": W8A8("w8a8"),
    "W8A8S": W8A8("w8a8s"),
    "W8A8_DYNAMIC": W8A8Dynamic(),
    "W8A8_MIX": W8A8Mix(),
    "W8A16": W8A16(),
    "W4A8_DYNAMIC": W4A8Dynamic(),
}
"""By the word of descriptions. W8A8SC has a scheme for every linear: see compressed_scheme."""
COMPRESSED_TYPE = "W8A8SC"
MADE: dict[str, Scheme] = {"wint8": WInt8()}
"""By the word of recipes: those of executor/quant/sizes.py:MADE_AT_LOAD."""
_grouped = cache(W8A16)


def choose_schemes(model: nn.Module, catalog: Catalog, description: Description | None) -> list[str]:
    """Hand every layer the scheme of its tensors; the names of tensors that these leave knowingly.

    Raises UserError for types that are unknown or do not fit together.
    """
    left: list[str] = []
    if description is None:
        return left
    asked = {pull.name for pull in model.pulls({})}  # from here on layers know their names
    problems = []
    for layer in model.modules():
        try:
            if isinstance(layer, Linear):
                asked -= {f"{name}.weight" for name, _, _ in layer.share.named(layer.prefix)}
                left += _choose_linear(layer, catalog, description)
            elif isinstance(layer, Experts):
                asked = {name for name in asked if not name.startswith(f"{layer.prefix}.")}
                left += _choose_experts(layer, catalog, description)
            elif isinstance(layer, RMSNorm) and _has(f"{layer.prefix}.bias", catalog, description):
                layer.add_bias()
        except UserError as error:
            problems.append(str(error))
    problems += (
        f"{description.file}: '{name}' is {description.type_of(name)}; only linears and experts are read in such "
        "types. Quantize the model again, and leave it float"
        for name in sorted(asked)
        if description.type_of(name) != FLOAT_TYPE
    )
    if problems:
        raise UserError("\n".join(folded(problems)))
    return left


def _choose_linear(layer: Linear, catalog: Catalog, description: Description) -> list[str]:
    names = [name for name, _, _ in layer.share.named(layer.prefix)]
    weights = [f"{name}.weight" for name in names]
    if _kind(weights, description) == COMPRESSED_TYPE:
        scheme = compressed_scheme(layer.share, names, catalog)
    else:
        scheme = _fitting(_scheme(weights, description), names, catalog)
    if "bias" in scheme.left:
        has_bias = layer.share.has_bias
    else:
        biases = [f"{name}.bias" for name in names]
        if layer.share.shard == "in" and layer.share.group.rank:  # rank 0 adds it, and this rank's files may lack it
            found = [name in catalog or name in description.types for name in biases]
        else:
            found = [_has(name, catalog, description) for name in biases]
        has_bias = layer.share.has_bias or any(found)
    if scheme is not FLOAT:
        _refuse([f"{name}.{suffix}" for name in names for suffix in scheme.refused], scheme, catalog, description)
        layer.take(scheme, has_bias)
    elif has_bias and not layer.share.has_bias:
        layer.take(FLOAT, True)
    return [f"{name}.{suffix}" for name in names for suffix in scheme.left]


def _has(name: str, catalog: Catalog, description: Description) -> bool:
    """Whether the checkpoint has a tensor that the architecture has not. UserError where it is described only."""
    if name not in catalog and name in description.types:
        raise UserError(
            f"{description.file}: '{name}' is described, and is in none of the files: the model would answer without "
            "it. Copy the folder again from where it came"
        )
    return name in catalog


def make_schemes(model: nn.Module, quantization: str, rounds_head: bool) -> list[str]:
    """Hand text linears, experts and, if `rounds_head`, the output head a scheme of MADE; vision, routers and embedding
    stay float.

    Gives what `choose_schemes` does: float checkpoints leave no tensor.
    """
    scheme = MADE[quantization]
    for _ in model.pulls({}):
        pass  # from here on layers know their names
    for layer in list(model.modules()):
        if isinstance(layer, Linear) and _TEXT.search(layer.prefix):
            layer.take(scheme, layer.share.has_bias)
        elif isinstance(layer, Experts) or (rounds_head and isinstance(layer, Head)):
            layer.take(scheme)
    return []


_TEXT = re.compile(r"^model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(?!gate$)")


def choose_cache(model: nn.Module, catalog: Catalog, description: Description | None, int8: bool) -> list[str]:
    """Let attention layers have the int8 cache that the description announces, or leave its scales: their names then.

    For a model that has listed its pulls. Scales that nothing announces are refused with all else that nobody reads.
    Raises UserError for tensors that are not usable.
    """
    if description is None or description.kv_cache is None:
        return []
    attentions = {layer.name: layer for layer in model.modules() if isinstance(layer, Attention)}
    if not int8:
        return [name for attention in attentions for name in tensor_names(attention)]
    if description.kv_cache != C8:
        raise UserError(f"{description.file}: kv_cache_type is {description.kv_cache}; this release reads {C8}")
    (channels,) = {layer.qkv_proj.share.parts[1].num_rows for layer in attentions.values()}
    found = "; ".join(faults(catalog, attentions, channels))
    if found:
        raise UserError(f"{description.file}: {UNUSABLE.format(found)}")
    for layer in attentions.values():
        layer.quantize_cache()
    return []


def _fitting(scheme: Scheme, linears: list[str], catalog: Catalog) -> Scheme:
    """The scheme in the form that the checkpoint's shapes have: W8A16 by row, or by groups of a row."""
    scale, weight = (catalog.get(f"{linears[0]}.{suffix}") for suffix in ("weight_scale", "weight"))
    if not isinstance(scheme, W8A16) or scale is None or weight is None or len(scale.shape) != 2 or scale.shape[1] < 2:
        return scheme
    if weight.shape[1] % scale.shape[1]:
        raise UserError(
            f"'{linears[0]}.weight_scale' has {scale.shape[1]} scales for the {weight.shape[1]} inputs of a row, which "
            "are no equal groups; quantize the model again"
        )
    return _grouped(weight.shape[1] // scale.shape[1])


def _choose_experts(layer: Experts, catalog: Catalog, description: Description) -> list[str]:
    """Hand it the one scheme of all its experts; patterns of tensors that are left."""
    prefix, stacked = layer.prefix, is_stacked(catalog, layer.prefix)
    if stacked:
        halves = ("gate_up", "down")
        linears = [f"{prefix}.{half}_proj" for half in halves]
        # A description may call the weight by its linear's name or by its own, as checkpoints do.
        weights = [name if name in description.types else f"{name}.weight" for name in linears]
    else:
        linears = [f"{prefix}.{expert}.{name}" for expert in range(layer.share.num_experts) for name in EXPERT_LINEARS]
        weights = [f"{linear}.weight" for linear in linears]
    scheme = _fitting(_scheme(weights, description), linears, catalog)
    suffixes = [*scheme.refused, *(() if "bias" in scheme.left else ("bias",))]
    beside = [f"{linear}{dot}{suffix}" for linear in linears for suffix in suffixes for dot in "._"]
    _refuse(beside, scheme, catalog, description)
    if scheme is not FLOAT:
        layer.take(scheme)
    return [f"{prefix}.*[._]{suffix}" for suffix in scheme.left]


def _refuse(names: list[str], scheme: Scheme, catalog: Catalog, description: Description) -> None:
    """UserError for a tensor that changes what is computed and that nothing would read."""
    found = next((name for name in names if _has(name, catalog, description)), None)
    if found is not None:
        why = next((why for suffix, why in scheme.refused.items() if found.endswith(suffix)), _BIAS)
        raise UserError(f"{description.file}: '{found}' stands beside {scheme.name} weights, and is not read: {why}")


_BIAS = "experts have no biases here; quantize them without shifting activations (smoothing with symmetric: True)"


def assume_schemes(model: nn.Module, quantization: str, rounds_head: bool = False) -> None:
    """The same where there is no folder: what the vendor quantizes by default under a recipe's `quantization`.

    `rounds_head`: see make_schemes.
    Raises UserError for a type that this release has no scheme for.
    """
    if quantization == "none":
        return
    if quantization in MADE:
        make_schemes(model, quantization, rounds_head)
        return
    for _ in model.pulls({}):
        pass  # from here on layers know their names
    for layer in model.modules():
        if isinstance(layer, Linear):
            names = [name for name, _, _ in layer.share.named(layer.prefix)]
            is_compressed = assumed_type(names[0], quantization) == COMPRESSED_TYPE
            scheme = uncompressed_sizes(layer.share) if is_compressed else _assumed(names[0], quantization)
            if scheme is not FLOAT:
                layer.take(scheme, layer.share.has_bias)
        elif isinstance(layer, Experts):
            layer.take(_assumed(layer.prefix, quantization))


def schemes_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of schemes, each with the linears and experts that have it, as checkpoints name them, without numbers.

    For a model that has listed its pulls.
    """
    found: dict[str, set[str]] = {}
    for layer in model.modules():
        if isinstance(layer, Linear | Experts):
            found.setdefault(layer.scheme.name, set()).add(re.sub(r"^model\.|\.\d+(?=\.|$)", "", layer.prefix))
    return {scheme: sorted(names) for scheme, names in sorted(found.items())}


def _assumed(name: str, quantization: str) -> Scheme:
    kind = assumed_type(name, quantization)
    if kind not in SCHEMES:
        raise UserError(
            f"model_config.quantization: {quantization} weights have {name} as {kind}, which is not part of this "
            f"release yet; it reads {', '.join(SCHEMES)}"
        )
    return SCHEMES[kind]


def _kind(names: list[str], description: Description) -> str:
    """The type of linears that are multiplied together."""
    kinds = {name: description.type_of(name) for name in names}
    if len(set(kinds.values())) > 1:
        firsts = {kind: name for name, kind in reversed(kinds.items())}  # one of each type
        named = ", ".join(f"{name} is {kind}" for kind, name in reversed(firsts.items()))
        raise UserError(
            f"{description.file}: linears that are multiplied together have different types: {named}; quantize the "
            "model again with one type for all of them"
        )
    return kinds[names[0]]


def _scheme(names: list[str], description: Description) -> Scheme:
    kind = _kind(names, description)
    if kind not in SCHEMES:
        raise UserError(f"{description.file}: '{names[0]}' is {kind}; this release reads {', '.join(SCHEMES)}")
    return SCHEMES[kind]
