"""A family's runner.py: the names it has, and the custom ones that the families' READMEs show."""

import re
import sys
import types

import pytest
import torch

from models.published import published_config
from models.registry import family_runner
from tests.reference import REPO

NAMES = ("connect", "build_processor", "build_model", "build_replica", "decode_graphs")


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_runners_have_the_same_names(name):
    runner = family_runner(published_config(name))
    assert all(callable(getattr(runner, part)) for part in NAMES)
    text = (REPO / "models" / runner.__name__.split(".")[1] / "runner.py").read_text()
    assert len(text.splitlines()) <= 60, "a page"


def custom(family: str, monkeypatch) -> types.ModuleType:
    """The README's runner, run as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "models" / family / "README.md").read_text(), re.DOTALL)
    module = types.ModuleType(f"custom_{family}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(REPO)
    exec(compile(code, "README.md", "exec"), vars(module))
    assert code.count("\n") <= 28 and all(hasattr(module, name) for name in NAMES)
    return module


def test_the_custom_runner_of_qwen3(monkeypatch, capsys):
    module = custom("qwen3_vl", monkeypatch)
    assert capsys.readouterr().out.strip()
    (features,) = module.engine.runner.features.values()
    features = getattr(features, "features", features)
    assert features.shape[1] == 3 and not torch.any(features[:, 1:]) and torch.any(features[:, 0])


def test_the_custom_runner_of_qwen2_5(monkeypatch, capsys):
    module = custom("qwen2_5_vl", monkeypatch)
    assert capsys.readouterr().out.strip()
    text = module.engine.processor.tokenizer.decode(module.prompt.token_ids)
    assert "system\nAnswer in one word." in text
