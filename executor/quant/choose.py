"""Which scheme every layer of a model has: read from the checkpoint's description, and handed to the layers.

The model is built as if its weights were float and has no memory yet; a layer that is quantized takes another scheme.
"""

from torch import nn

from executor.checkpoint.description import FLOAT_TYPE, Description
from executor.checkpoint.pull import Catalog
from executor.errors import UserError
from executor.layers.linear import Linear
from executor.layers.moe import Experts
from executor.layers.norm import RMSNorm
from executor.quant.float import FLOAT
from executor.quant.scheme import Scheme
from executor.quant.w8a8 import W8A8
from executor.quant.w8a8_dynamic import W8A8Dynamic
from executor.quant.w8a8sc import compressed_scheme
from executor.quant.w8a16 import W8A16

SCHEMES: dict[str, Scheme] = {
    FLOAT_TYPE: FLOAT,
    "W8A8": W8A8("w8a8"),
    "W8A8S": W8A8("w8a8s"),
    "W8A8_DYNAMIC": W8A8Dynamic(),
    "W8A16": W8A16(),
}
"""By the word of descriptions. W8A8SC has a scheme for every linear: see compressed_scheme."""
COMPRESSED_TYPE = "W8A8SC"


def choose_schemes(model: nn.Module, catalog: Catalog, description: Description | None) -> list[str]:
    """Hand every layer the scheme of its tensors; the names of tensors that these leave knowingly.

    Raises UserError for types that are unknown or do not fit together.
    """
    left: list[str] = []
    if description is None:
        return left
    for _ in model.pulls(catalog):
        pass  # from here on layers know their names
    for layer in model.modules():
        if isinstance(layer, Linear):
            names = [name for name, _, _ in layer.share.named(layer.prefix)]
            kind = _kind([f"{name}.weight" for name in names], description)
            is_compressed = kind == COMPRESSED_TYPE
            scheme = compressed_scheme(layer.share, names, catalog) if is_compressed else SCHEMES[kind]
            if scheme is not FLOAT:
                layer.take(scheme, any(f"{name}.bias" in catalog for name in names))
                left += (f"{name}.{suffix}" for name in names for suffix in scheme.left)
            elif not layer.share.has_bias and f"{names[0]}.bias" in catalog:
                layer.take(FLOAT, True)
        elif isinstance(layer, Experts):
            expert = f"{layer.prefix}.0"
            names = [f"{expert}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
            layer.take(SCHEMES[_kind(names, description)])
        elif isinstance(layer, RMSNorm) and f"{layer.prefix}.bias" in catalog:
            layer.add_bias()
    return left


def _kind(names: list[str], description: Description) -> str:
    """The type of linears that are multiplied together."""
    kinds = {name: description.type_of(name) for name in names}
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise UserError(
            f"{description.file}: linears that are multiplied together have different types: {named}; quantize the "
            "model again with one type for all of them"
        )
    kind = kinds[names[0]]
    known = SCHEMES if ".experts." in names[0] else (*SCHEMES, COMPRESSED_TYPE)
    if kind not in known:
        raise UserError(f"{description.file}: '{names[0]}' is {kind}; this release reads {', '.join(known)}")
    return kind
