#!/usr/bin/env bash
# Qwen2.5-VL's published config.json says "type": "mrope". With "rope_type": "yarn" added beside it, YaRN is computed by
# transformers 5.24 and not by 4.57, which puts the older key over the newer one (a log line about unrecognized keys is
# all that shows). Qwen3-VL in the same 4.57 does compute it.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cat >"$folder/probe.py" <<'PYTHON'
import sys

import transformers
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

transformers.logging.set_verbosity_error()
sizes = dict(hidden_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64)
sizes |= dict(max_position_embeddings=131072, rope_theta=1e6)
yarn = dict(type="mrope", rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)
config2 = Qwen2_5_VLConfig.from_dict(dict(sizes, rope_scaling=dict(yarn, mrope_section=[16, 24, 24])))
text3 = dict(sizes, head_dim=128, rope_scaling=dict(yarn, mrope_section=[24, 20, 20]))
config3 = Qwen3VLConfig.from_dict(dict(text_config=text3))
rotary2 = Qwen2_5_VLRotaryEmbedding(config=config2.get_text_config())
rotary3 = Qwen3VLTextRotaryEmbedding(config=config3.get_text_config())
print(f"transformers {transformers.__version__}: type mrope and rope_type yarn are computed as")
for family, rotary in (("Qwen2.5-VL", rotary2), ("Qwen3-VL", rotary3)):
    # 1 / theta^(k/64) without YaRN; the slowest frequency is divided by the factor with it.
    slowest = float(rotary.inv_freq[-1]) / 1e6 ** (-63 / 64)
    scaling = rotary.attention_scaling
    print(f"  {family:<10} {rotary.rope_type}: slowest frequency x {slowest:.2f}, attention x {scaling:.3f}")
sys.exit([rotary2.rope_type, rotary3.rope_type] != sys.argv[1:])
PYTHON

make_environment torch==2.13.0 transformers==4.57.6
status=0
"$python" "$folder/probe.py" default yarn || status=1
pip_install transformers==5.24.0
"$python" "$folder/probe.py" yarn yarn || status=1
[ "$status" = 0 ] && echo "as found: the older key wins in 4.57's Qwen2.5-VL alone"
exit "$status"
