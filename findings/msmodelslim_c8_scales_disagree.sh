#!/usr/bin/env bash
# The int8 KV cache (C8) of msmodelslim 26.1: its two pipelines write scales of different tensors under one name and one
# type, and the newer one counts the last calibration sample only.
#
# The older Calibrator takes the output of k_proj, before RoPE, over all samples. The newer pipeline (the step
# dynamic_cache of a recipe) takes what goes into the cache, after RoPE, but begins anew with every sample. So either
# cuts off values of its own calibration data; only the older one's scales of v_proj, which sees no RoPE, hold them all.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_msmodelslim_environment
umask 027 # msmodelslim refuses files that others may write

cat >"$folder/probe.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from msmodelslim.core.const import DeviceType
from msmodelslim.core.context import ContextFactory
from msmodelslim.core.quant_service.interface import BaseQuantConfig
from msmodelslim.core.quant_service.modelslim_v1.quant_service import ModelslimV1QuantService
from msmodelslim.model.qwen2_5.model_adapter import Qwen25ModelAdapter
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

folder = Path(sys.argv[1])
text = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
text |= dict(num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False)
torch.manual_seed(0)
Qwen2ForCausalLM(Qwen2Config(**text)).save_pretrained(folder / "source")
samples = [[torch.randint(0, 64, (1, 40))] for _ in range(8)]


def load():
    return Qwen2ForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()


def written(to):
    """(tensors of the cache, their types) of a folder."""
    tensors = {name: tensor for file in to.glob("*.safetensors") for name, tensor in load_file(file).items()}
    description = json.loads(next(to.glob("quant_model_description*.json")).read_text())
    cache = {name: tensor.flatten() for name, tensor in tensors.items() if "kv_cache" in name}
    return cache, {description[name] for name in cache}


def older():
    config = QuantConfig(w_bit=8, a_bit=8, dev_type="cpu", use_kvcache_quant=True)
    calibrator = Calibrator(load(), config, calib_data=samples, disable_level="L0")
    calibrator.run()
    (folder / "older").mkdir()
    calibrator.save(str(folder / "older"), save_type=["ascendV1"])
    return written(folder / "older")


class Adapter(Qwen25ModelAdapter):
    """Calibration data are token ids already: no tokenizer."""

    def _load_tokenizer(self, **options):
        return None

    def handle_dataset(self, dataset, device=None):
        return dataset


class Dataset:
    def get_dataset_by_name(self, name):
        return samples


def newer():
    service = ModelslimV1QuantService(None, Dataset(), ContextFactory())
    scheme = dict(scope="per_channel", dtype="int8", symmetric=True, method="minmax")
    recipe = dict(process=[dict(type="dynamic_cache", qconfig=scheme)], save=[dict(type="ascendv1_saver")])
    (folder / "newer").mkdir()
    adapter = Adapter("Qwen2.5-7B-Instruct", folder / "source")
    config = BaseQuantConfig(apiversion=service.backend_name, spec=recipe)
    service.quantize(config, adapter, folder / "newer", DeviceType.CPU)
    return written(folder / "newer")


@torch.no_grad()
def ranges():
    """{(layer, tensor): max per channel and sample}: k_proj's output, and the keys and values that the cache holds."""
    network, seen = load(), {}

    def count(layer, tensor, rows):
        seen.setdefault((layer, tensor), []).append(rows.abs().amax(0))

    for number, layer in enumerate(network.model.layers):
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, rows, n=number: count(n, "k_proj", rows[0]))
    for sample in samples:
        cache = network(*sample, use_cache=True).past_key_values
        for number, layer in enumerate(cache.layers):
            for tensor, states in (("keys", layer.keys), ("values", layer.values)):
                count(number, tensor, states[0].transpose(0, 1).flatten(1))
    return {key: torch.stack(rows) for key, rows in seen.items()}


def fits(scales, projection, tensor, *which):
    """Whether int8 scales are those of this tensor in these samples, in every layer."""
    pairs = [(seen[n, tensor][list(which)].amax(0), scales[name(n, projection)]) for n in range(2)]
    return all(torch.allclose(most / 127, scale, rtol=1e-2) for most, scale in pairs)


def name(layer, projection):
    return f"model.layers.{layer}.self_attn.{projection}.kv_cache_scale"


def beyond(scales, projection, tensor):
    """Largest value of the samples in the cache over the largest that int8 holds with these scales: worst channel."""
    return max(float((seen[n, tensor].amax(0) / 127 / scales[name(n, projection)]).max()) for n in range(2))


seen, everything, last = ranges(), range(8), [7]
results = {"older": older(), "newer": newer()}
scales = {which: cache for which, (cache, _) in results.items()}
for which, (cache, types) in results.items():
    print(f"{which}: type {types}, {len(cache)} tensors;", end=" ")
    print(f"the cache reaches {beyond(cache, 'k_proj', 'keys'):.2f} (keys),", end=" ")
    print(f"{beyond(cache, 'v_proj', 'values'):.2f} (values) times the largest int8 value")
facts = {
    "older: k_proj's output before RoPE, all samples": fits(scales["older"], "k_proj", "k_proj", *everything),
    "older: values, all samples": fits(scales["older"], "v_proj", "values", *everything),
    "newer: keys in the cache, last sample": fits(scales["newer"], "k_proj", "keys", *last),
    "newer: values, last sample": fits(scales["newer"], "v_proj", "values", *last),
}
others = {
    "older: keys in the cache, all samples": fits(scales["older"], "k_proj", "keys", *everything),
    "newer: keys in the cache, all samples": fits(scales["newer"], "k_proj", "keys", *everything),
    "newer: values, all samples": fits(scales["newer"], "v_proj", "values", *everything),
}
print("scales are max / 127 of")
for what, true in (facts | others).items():
    print(f"  {what}: {'yes' if true else 'no'}")
same = all(types == {"C8"} and cache.keys() == scales["older"].keys() for cache, types in results.values())
sys.exit(not (same and all(facts.values()) and not any(others.values())))
PYTHON

status=0
(cd "$folder" && "$python" probe.py "$folder" 2>"$folder/log") || { status=1; tail -5 "$folder/log"; }
[ "$status" = 0 ] && echo "as found: one name and type for two tensors; the newer scales count the last sample alone"
exit "$status"
