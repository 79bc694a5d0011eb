"""Each rank reads its share of a large checkpoint, and holds no more than that in memory of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from executor.checkpoint.load import build_on_meta
from models.qwen3_vl import runner as family
from tests.parallel.jobs import REPO, case, run_ranks

GIB = 1 << 30


def large_checkpoint(folder: Path) -> int:
    """A Qwen3-VL of 1.5 GB of zeros, a hole in the file system; returns the bytes of all its tensors."""
    shutil.copytree(REPO / "models/tiny/qwen3_vl", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }  # fmt: skip
    config["vision_config"]["out_hidden_size"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    model = build_on_meta(lambda: family.build_model(config), torch.bfloat16)
    header, at = {}, 0
    for pull in model.pulls({}):
        size = 2 * torch.Size(pull.file_shape).numel()
        header.setdefault(pull.name, {"dtype": "BF16", "shape": pull.file_shape, "data_offsets": [at, at + size]})
        at = header[pull.name]["data_offsets"][1] if header[pull.name]["data_offsets"][0] == at else at
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_reads_and_holds_its_share(tmp_path, num_ranks) -> None:
    folder = tmp_path / "large"
    total_bytes = large_checkpoint(folder)
    assert total_bytes > 1.4 * GIB, "a rank of two that held the whole must go beyond the limit"
    told = case("qwen3_vl", num_ranks)
    told["model_config"] |= {"model_path": str(folder), "dtype": "bfloat16"}
    told["generation_config"]["max_new_tokens"] = 1
    told["data_config"] = {"prompt": "Hello"}
    (found,) = run_ranks(num_ranks, [told], tmp_path)
    assert found["status"] == 0
    for read_bytes, share_bytes, grown_bytes in found["loads"]:
        assert share_bytes < 1.05 * total_bytes / num_ranks
        assert read_bytes <= 1.05 * share_bytes
        assert share_bytes < grown_bytes <= share_bytes + GIB, f"{grown_bytes / GIB:.2f} of {share_bytes / GIB:.2f} GiB"
