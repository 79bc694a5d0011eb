"""Which module runs which architecture of config.json."""

RUNNERS = {
    "Qwen2_5_VLForConditionalGeneration": "models.qwen2_5_vl.runner",
    "Qwen3VLForConditionalGeneration": "models.qwen3_vl.runner",
    "Qwen3VLMoeForConditionalGeneration": "models.qwen3_vl.runner",
}
