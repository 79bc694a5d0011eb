"""What a checkpoint says of answers: which tokens end one, and generation_config.json.

What transformers or vLLM would choose tokens by and this project does not is refused by file and key, never ignored.
Source: transformers 5.24, generation/configuration_utils.py and the logits processors that it names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from executor.checkpoint.fields import Fields, as_number
from executor.checkpoint.folder import read_json
from executor.errors import UserError

FILE = "generation_config.json"

NOT_READ: dict[str, tuple[Any, ...]] = {
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "force_words_ids": ([],),
    "constraints": ([],),
    "stop_strings": ([], ""),
    "forced_bos_token_id": (),
    "forced_eos_token_id": ([],),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "num_return_sequences": (1,),
    "typical_p": (1,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_length": (0,),
    "max_time": (),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "dola_layers": ([],),
    "token_healing": (False,),
    "watermarking_config": ({},),
}
"""Keys that change answers there, and their values that do not; null never does."""

_INSTEAD = {
    "stop_strings": "generation_config.stop of the recipe ends answers at texts",
    "min_length": "generation_config.min_new_tokens of the recipe is the least length of an answer",
    "num_return_sequences": "generation_config.n of the recipe asks for several answers",
    "no_repeat_ngram_size": "generation_config.repetition_penalty of the recipe makes repetitions rare",
}


def read_eos_token_ids(folder: Path, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's.

    `vocab_size`: of the model. UserError for an id that it can never choose.
    """
    config = Fields(read_json(folder, "config.json", required=False), f"{folder}/config.json")
    generation = Fields(read_json(folder, FILE, required=False), f"{folder}/{FILE}")
    key = "eos_token_id"
    for holder in (generation, config, config.section("text_config")):
        if holder is None or key not in holder or holder.values[key] == []:
            continue
        ids = holder.wholes(key) if isinstance(holder.values[key], list) else (holder.whole(key, least=0),)
        if max(ids) >= vocab_size:
            raise holder.fault(key, f"ids of the vocabulary, below {vocab_size}: an answer would not end there")
        return ids
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model_path '{folder}' names no eos_token_id, neither in generation_config.json, config.json nor in the "
            "tokenizer: an answer could never end"
        )
    if tokenizer.eos_token_id >= vocab_size:
        raise UserError(
            f"model_path '{folder}': the tokenizer's eos_token has id {tokenizer.eos_token_id}, beyond the model's "
            f"vocabulary of {vocab_size}; write the model's eos_token_id into {FILE}"
        )
    return (tokenizer.eos_token_id,)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, {} without one; what it says of sampling is checked, and numbers are numbers."""
    content = read_json(folder, FILE, required=False)
    said = Fields(content, f"{folder}/{FILE}", texts=True)
    _refuse_not_read(said)
    values = {
        "do_sample": said.flag("do_sample", None),
        "max_new_tokens": said.whole("max_new_tokens", None, null=True),
        "min_new_tokens": said.whole("min_new_tokens", None, least=0, null=True),
        "top_k": said.whole("top_k", None, least=-1, null=True),
    }
    for key in ("temperature", "top_p", "min_p", "repetition_penalty"):
        values[key] = said.number(key, None, null=True, zero=key in ("temperature", "min_p"))
    for key in ("presence_penalty", "frequency_penalty"):
        values[key] = _penalty(said, key)
    for key in ("top_p", "min_p"):
        if values[key] is not None and values[key] > 1:
            raise said.fault(key, "a share, at most 1")
    if values["repetition_penalty"] is not None and not 1e-6 <= values["repetition_penalty"] <= 1e6:
        raise said.fault("repetition_penalty", "a number from 0.000001 to 1000000; 1 is none")
    if values["top_k"] == -1:  # how some tools write that all are kept
        values["top_k"] = 0
    return content | {key: value for key, value in values.items() if key in said}


def _penalty(said: Fields, key: str) -> float | None:
    """As OpenAI's API has it."""
    number = as_number(said.values.get(key))
    if key in said and (number is None or abs(number) > 2):
        raise said.fault(key, "a number from -2 to 2")
    return number


def _refuse_not_read(said: Fields) -> None:
    for key, neutral in NOT_READ.items():
        if key not in said or _is_neutral(said.values[key], neutral):
            continue
        wanted = " or ".join(["null", *(str(value).lower() for value in neutral if value != "")])
        instead = f"; {_INSTEAD[key]}" if key in _INSTEAD else ""
        raise said.fault(
            key,
            f"{wanted}: answers would differ with it, and this project does not compute it. Remove {key} from "
            f"{FILE} to run without it{instead}",
        )


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    """1, 1.0 and "1" alike; false is none of them."""
    number = None if isinstance(value, bool) else as_number(value)
    return any(
        value is same if isinstance(same, bool) else number == same if isinstance(same, int) else value == same
        for same in neutral
    )
