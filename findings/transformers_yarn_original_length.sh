#!/usr/bin/env bash
# YaRN for Qwen2.5-VL and Qwen3-VL: where original_max_position_embeddings stands decides what a release computes.
#
# The key may stand in the rope_scaling dictionary and beside it. 4.57 reads the inner one alone. 5.24 prefers the outer
# one, but in the flat config.json that Qwen2.5-VL is published with it does not see it: a file with only the outer key
# is then read as if the trained length were max_position_embeddings.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cat >"$folder/probe.py" <<'PYTHON'
import sys

import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

transformers.logging.set_verbosity_error()
five = transformers.__version__.startswith("5.")
inner, outer, longest = 32768, 8192, 131072
sizes = dict(hidden_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
sizes |= dict(max_position_embeddings=longest, rope_theta=1e6)
families = {
    "Qwen2.5-VL": (Qwen2_5_VLConfig, Qwen2_5_VLRotaryEmbedding, dict(mrope_section=[16, 24, 24])),
    "Qwen3-VL": (Qwen3VLConfig, Qwen3VLTextRotaryEmbedding, dict(mrope_section=[24, 20, 20])),
}


def frequencies(family, flat, beside, within):
    config_class, rotary_class, rope = families[family]
    rope = dict(rope, rope_type="yarn", factor=4.0)
    if within:
        rope["original_max_position_embeddings"] = within
    text = dict(sizes, rope_scaling=rope) | (dict(original_max_position_embeddings=beside) if beside else {})
    text |= dict(head_dim=128) if family == "Qwen3-VL" else {}
    config = config_class.from_dict(text if flat else dict(text_config=text))
    return rotary_class(config=config.get_text_config()).inv_freq


# (family, flat, beside, within): the length that 4.57 and 5.24 compute with
cases = {
    ("Qwen2.5-VL", True, outer, inner): (inner, inner),
    ("Qwen2.5-VL", False, outer, inner): (inner, outer),
    ("Qwen3-VL", False, outer, inner): (inner, outer),
    ("Qwen2.5-VL", True, outer, None): (longest, longest),
    ("Qwen2.5-VL", False, outer, None): (longest, outer),
    ("Qwen3-VL", False, outer, None): (longest, outer),
}
status = 0
print(f"transformers {transformers.__version__}")
for (family, flat, beside, within), wanted in cases.items():
    got = frequencies(family, flat, beside, within)
    computed = [n for n in (outer, inner, longest) if torch.equal(got, frequencies(family, False, None, n))]
    form = "flat" if flat else "text_config"
    print(f"  {family:<10} {form:<11} beside the dictionary {beside}, within {within}: computed with {computed}")
    status |= computed != [wanted[five]]
sys.exit(status)
PYTHON

make_environment torch==2.13.0 transformers==4.57.6
status=0
"$python" "$folder/probe.py" || status=1
pip_install transformers==5.24.0
"$python" "$folder/probe.py" || status=1
[ "$status" = 0 ] && echo "as found: one file, two trained lengths, by release and by the form of the file"
exit "$status"
