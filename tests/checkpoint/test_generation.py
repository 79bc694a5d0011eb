"""generation_config.json: what changes answers is read or refused by name, and answers can end."""

import json
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from executor.checkpoint.generation import NOT_READ, read_eos_token_ids, read_generation_config
from executor.errors import UserError
from executor.recipe.generation import sampling_params
from executor.recipe.schema import build_recipe

# What changes no answer of these models: length in all (see executor.recipe.generation), caches, speculation, beams'
# own, outputs beside the answer, ids that only start or fill.
HARMLESS = [
    "max_length",
    "early_stopping",
    "length_penalty",
    "use_mtp",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "renormalize_logits",
    "remove_invalid_values",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "low_memory",
    "prefill_chunk_size",
    "transformers_version",
]
READ = ["do_sample", "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
EFFECTIVE = {
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [220],
    "bad_words_ids": [[3]],
    "sequence_bias": [[[3], -1.0]],
    "force_words_ids": [[3]],
    "constraints": [{"a": 1}],
    "stop_strings": "END",
    "forced_bos_token_id": 0,
    "forced_eos_token_id": 488,
    "forced_decoder_ids": [[1, 2]],
    "exponential_decay_length_penalty": [5, 1.1],
    "num_beams": 4,
    "num_beam_groups": "2",
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 3,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 1e-3,
    "min_length": 10,
    "max_time": 1.5,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "token_healing": True,
    "watermarking_config": {"bias": 2.5},
}


def said(folder, content: dict) -> dict:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_generation_config(folder)


def test_every_key_of_transformers_is_read_refused_or_harmless():
    keys = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert "num_beams" in keys and "top_h" in keys
    assert sorted(keys - {*NOT_READ, *READ, *HARMLESS}) == []


@pytest.mark.parametrize("key", NOT_READ)
def test_what_changes_answers_is_refused_and_what_does_not_passes(tmp_path, key):
    value = EFFECTIVE.get(key, 1.5)
    with pytest.raises(UserError, match=f"generation_config.json: {key} is .*, wanted null.*Remove {key} from gener"):
        said(tmp_path, {key: value})
    for neutral in (None, *NOT_READ[key]):
        said(tmp_path, {key: neutral})
    if 1 in NOT_READ[key]:
        said(tmp_path, {key: 1.0})
        with pytest.raises(UserError, match=key):
            said(tmp_path, {key: True})


@pytest.mark.parametrize("key", ["presence_penalty", "frequency_penalty"])
def test_penalties_are_taken(tmp_path, key):
    generation = build_recipe({"model_config": {"model_path": "x"}}).generation
    assert getattr(sampling_params(generation, said(tmp_path, {key: "1.5"})), key) == 1.5
    assert getattr(sampling_params(generation, said(tmp_path, {key: -2})), key) == -2
    assert getattr(sampling_params(generation, said(tmp_path, {key: None})), key) == 0
    for odd in (2.5, True, "x", []):
        with pytest.raises(UserError, match=f"generation_config.json: {key} is .*from -2 to 2"):
            said(tmp_path, {key: odd})


@pytest.mark.parametrize("value", [512, [488, 512]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_that_no_answer_can_reach(tmp_path, file, value):
    (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    tokenizer = SimpleNamespace(eos_token_id=7)
    with pytest.raises(UserError, match=f"{file}: eos_token_id is .*vocabulary, below 512"):
        read_eos_token_ids(tmp_path, tokenizer, 512)
    assert max(read_eos_token_ids(tmp_path, tokenizer, 513)) == 512
    (tmp_path / file).unlink()
    assert read_eos_token_ids(tmp_path, tokenizer, 8) == (7,)
    with pytest.raises(UserError, match="eos_token has id 7, beyond the model's vocabulary of 7"):
        read_eos_token_ids(tmp_path, tokenizer, 7)
