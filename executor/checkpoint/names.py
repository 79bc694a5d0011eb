"""Names of tensors: what older files and training tools call them, and what they are called here. Imports no torch."""

import re

# DataParallel and DeepSpeed, peft, torch.compile, FSDP, activation checkpointing. `module` is a word of models, too.
WRAPPERS = re.compile(
    r"^((_forward_module|module|base_model\.model)\.)+|"
    r"(?:(?<=\.)|^)((_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\.)+"
    r"((module|base_model\.model)\.)*"
)


def canonical_name(name: str) -> str:
    """Maps the legacy names (`visual.*`, `model.*` of the text, `language_model.model.*`) to the current ones.

    What training tools wrap a model in when they save it is taken off: see WRAPPERS.
    """
    name = WRAPPERS.sub("", name)
    if name.startswith(("model.visual.", "model.language_model.", "lm_head.")):
        return name
    for legacy, current in (
        ("visual.", "model.visual."),
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("language_model.", "model.language_model."),
        ("model.", "model.language_model."),
    ):
        if name.startswith(legacy):
            return current + name.removeprefix(legacy)
    return name
