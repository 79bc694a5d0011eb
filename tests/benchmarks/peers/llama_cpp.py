"""llama.cpp by its C interface (llama-cpp-python): the text layers alone. Forms: Q8_0, F16, BF16.

The GGUF is made once, beside the checkpoint, with the package `gguf`: architecture qwen2vl, no vocabulary, since
prompts are given as tokens. Linears and the embedding, which is the head as well, have the form's type, as
llama.cpp's own converter leaves them.
"""

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors import safe_open

from tests.benchmarks.peers.timing import MAX_LENGTH, Question, Tick, measure

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def converted(folder: Path, form: str) -> Path:
    target = folder.with_name(f"{folder.name}_{form}.gguf")
    if target.exists():
        return target
    raw = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target.with_suffix(".partial"), "qwen2vl")
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_rope_dimension_sections([*raw["rope_scaling"]["mrope_section"], 0])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[form]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if "visual" in name:
                continue
            values = file.get_tensor(name).float().numpy()
            if values.ndim == 1:
                writer.add_tensor(renamed(name), values)
            else:
                writer.add_tensor(renamed(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target.with_suffix(".partial").rename(target)


def renamed(name: str) -> str:
    """Of a tensor of a published folder, llama.cpp's name."""
    stem, _, kind = name.removeprefix("model.").rpartition(".")
    if stem == "embed_tokens":
        return "token_embd.weight"
    if stem == "norm":
        return "output_norm.weight"
    _, layer, inner = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


class LlamaCpp:
    def __init__(self, folder: Path, form: str) -> None:
        llama_cpp.llama_backend_init()
        path = str(converted(folder, form)).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = 8 * MAX_LENGTH, 8
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def answer(self, questions: list[Question], num_tokens: int, tick: Tick) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        lengths = [len(each.token_ids) for each in questions]
        rows = [
            (token, position, stream, position + 1 == lengths[stream])
            for stream, each in enumerate(questions)
            for position, token in enumerate(each.token_ids)
        ]
        for count in range(num_tokens):
            chosen = self.step(rows)
            tick(len(chosen))
            rows = [(token, lengths[stream] + count, stream, True) for stream, token in enumerate(chosen)]
        return lengths

    def step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Of (token, position, stream, whether its scores are wanted), the best tokens of the wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, stream, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, stream
        code = llama_cpp.llama_decode(self.context, batch)
        assert code == 0, code
        wanted = [index for index, row in enumerate(rows) if row[3]]
        scores = (llama_cpp.llama_get_logits_ith(self.context, index) for index in wanted)
        return [int(np.ctypeslib.as_array(each, (self.vocab_size,)).argmax()) for each in scores]


if __name__ == "__main__":
    measure(LlamaCpp, ("llama-cpp-python", "gguf"))
