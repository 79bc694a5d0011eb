"""The table of backends agrees with the words of a recipe, and says what is missing where one cannot be opened."""

import sys
from typing import get_args

import pytest

from executor.device.table import BACKENDS, DeviceSettings
from executor.errors import UserError
from executor.recipe import schema


def test_backends_speak_the_recipes_words():
    assert set(BACKENDS) <= set(get_args(schema.Device))
    for name, backend in BACKENDS.items():
        assert backend.name == name
        assert set(backend.dtypes) <= set(get_args(schema.Dtype))
        assert set(backend.exe_modes) <= set(get_args(schema.ExeMode)) and "eager" in backend.exe_modes
        assert set(backend.quantization) <= set(get_args(schema.Quantization))


def test_the_cpu_opens_and_forces_what_it_is_told():
    device = BACKENDS["cpu"].open(DeviceSettings("float32"))
    assert (device.name, device.compute_dtype(schema_dtype("float32"))) == ("cpu", schema_dtype("float32"))


def schema_dtype(name: str):
    import torch

    return getattr(torch, name)


def test_a_backend_whose_package_does_not_import_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "executor.device.npu.ops", None)
    with pytest.raises(UserError, match="npu needs torch_npu beside torch.*doctor"):
        BACKENDS["npu"].open(DeviceSettings("bfloat16"))
