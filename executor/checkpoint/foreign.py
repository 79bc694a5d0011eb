"""What a folder may hold that this project does not read as it stands: adapters, and weights of other quantizers.

Reads JSON files only. Quantized folders of msmodelslim are told apart by their quant_model_description*.json.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.checkpoint.description import read_description
from executor.checkpoint.folder import read_json
from executor.errors import UserError

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# Of peft, mlx and swift, diffusers' trainers, DeepSpeed and LLaVA's scripts. `non_lora` holds what was trained beside.
ADAPTER_WEIGHTS = ("adapter_model*", "adapters.safetensors", "adapters.npz", "adapter.safetensors", "adapter*.bin",
                   "pytorch_lora_weights*", "lora*.safetensors", "non_lora*", "*_adapters.safetensors")  # fmt: skip
_UNNAMED = "a quantizer without a name"
# Keys of config.json that quantizers write, and whose they are where no name stands in them.
_KEYS = {
    "quantization_config": _UNNAMED,
    "compression_config": "compressed-tensors",
    "quantization": "mlx",
    "quantize": "msmodelslim, whose quant_model_description*.json is not in the folder",
}
# Files in which quantizers describe their weights where config.json does not, and the key under which a name stands.
_DESCRIPTIONS = {
    "hf_quant_config.json": ("producer", "name"),  # NVIDIA's modelopt
    "quantize_config.json": ("quant_method",),  # GPTQ tools before they wrote into config.json
    "quant_config.json": ("quant_method",),  # AutoAWQ, likewise
}
_ANONYMOUS = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}


def refuse_adapter(folder: Path) -> None:
    """UserError for a folder with a LoRA (or another) adapter, alone or beside a model, with how to merge it.

    One in a folder of it is a warning: what training left there is not always part of the model.
    """
    weights = _adapter_weights(folder)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        held = [name for name in (ADAPTER_CONFIG, *_adapter_weights(inner)) if (inner / name).is_file()]
        if held:
            logger.warning(
                "%s: the folder in it, %s, holds an adapter (%s), which is not read: the model answers without it",
                folder, inner.name, " and ".join(held[:3]),
            )  # fmt: skip
    if not (folder / ADAPTER_CONFIG).is_file() and not weights:
        return
    adapter = read_json(folder, ADAPTER_CONFIG, required=False)
    kind = adapter.get("peft_type")
    kind = f"a {'LoRA' if kind == 'LORA' else kind} adapter" if isinstance(kind, str) else "an adapter"
    base = adapter.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    files = " and ".join([*([ADAPTER_CONFIG] if (folder / ADAPTER_CONFIG).is_file() else []), *weights[:2]])
    merge = (
        "Adapters are not read: merge it into its model with peft,\n"
        f"  model = AutoModelForImageTextToText.from_pretrained('{base or 'MODEL'}')\n"
        f"  PeftModel.from_pretrained(model, '{folder}').merge_and_unload().save_pretrained('NEW_FOLDER')\n"
        "copy the model's tokenizer and preprocessor files there, and set model_config.model_path to it"
    )
    if (folder / "config.json").is_file() and any(_model_weights(folder)):
        raise UserError(
            f"{folder} holds {kind} ({files}) beside a model, and answers without it are not the fine-tuned model's. "
            f"{merge}. To run the model without the adapter, move {files} out of the folder"
        )
    of = f" of {base}" if base else ""
    raise UserError(f"{folder} is {kind}{of} ({files}), not a whole model. {merge}")


def _adapter_weights(folder: Path) -> list[str]:
    return sorted({path.name for pattern in ADAPTER_WEIGHTS for path in folder.glob(pattern) if path.is_file()})


def _model_weights(folder: Path) -> list[Path]:
    adapters = _adapter_weights(folder)
    return [path for path in folder.glob("*.safetensors") if path.name not in adapters]


def find_quantization(folder: Path, config: Mapping[str, Any]) -> str:
    """The scheme that msmodelslim's description in the folder names, `none` for float weights.

    UserError, naming the quantizer, for weights that another one made.
    """
    if (description := read_description(folder)) is not None:
        return description.label
    text = config.get("text_config")
    holders = {"config.json": config, "config.json: text_config": text if isinstance(text, Mapping) else {}}
    for where, holder in holders.items():
        for key, anonymous in _KEYS.items():
            value = holder.get(key)
            if value is not None and value != {}:
                raise _refused(folder, _method(value, anonymous), f"{where}: {key}")
    for name, path in _DESCRIPTIONS.items():
        if (folder / name).is_file():
            value: Any = read_json(folder, name)
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            raise _refused(folder, value if isinstance(value, str) and value else _ANONYMOUS[name], name)
    return "none"


def _method(described: Any, anonymous: str) -> str:
    """The quantizer's name in what config.json says of it. Old files of bitsandbytes leave it out."""
    if not isinstance(described, Mapping):
        return str(described) if anonymous == _UNNAMED else anonymous
    named = described.get("quant_method")
    if isinstance(named, str) and named:
        return named
    if any(described.get(key) for key in ("load_in_8bit", "load_in_4bit")):
        return "bitsandbytes"
    if "config_groups" in described:
        return "compressed-tensors"
    return anonymous


def _refused(folder: Path, quantizer: str, where: str) -> UserError:
    return UserError(
        f"{folder}: the checkpoint is quantized by {quantizer} ({where}), which this project does not read; take the "
        "float checkpoint of the same model (bfloat16 or float16, the published name without -AWQ, -GPTQ, -FP8 and the "
        "like)"
    )
