"""What a load reads: each wanted byte once and by plain reads, where places have the file's form."""

import os

import pytest
import torch
from safetensors.torch import save_file

from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.pull import Pull, whole
from executor.checkpoint.reading import SliceReader, takes_bytes
from executor.checkpoint.weights import load_weights
from executor.errors import UserError


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.language_model.a.weight": torch.randn(300, 64, generator=generator).bfloat16(),
        "model.language_model.b.weight": torch.randn(4, 32, 16, generator=generator),
        "model.language_model.c.bias": torch.randn(7, generator=generator),
        "model.language_model.d.weight": torch.randint(-128, 127, (6, 5), dtype=torch.int8, generator=generator),
    }


@pytest.fixture
def checkpoint(tmp_path, tensors) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return Checkpoint(tmp_path)


def test_every_wanted_byte_is_read_once(checkpoint, tensors, monkeypatch):
    a, b, c, d = tensors
    fused = torch.zeros(500, 64, dtype=torch.bfloat16)
    into = {
        a: fused[100:220],  # rows of a fused parameter
        b: torch.zeros(2, 32, 16),
        c: torch.zeros(7),
        d: torch.zeros(6, 5, dtype=torch.int8),
    }
    rows = {a: slice(30, 150), b: slice(1, 3), c: slice(0, 7), d: slice(0, 6)}
    pulls = [Pull(name, tuple(tensors[name].shape), (rows[name],), into[name]) for name in tensors]
    ranges: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        ranges.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr("executor.checkpoint.reading.READ_BYTES", 1000)
    report = load_weights(pulls, checkpoint)
    assert report.bytes_read == sum(count for _, count in ranges) == sum(part.nbytes for part in into.values())
    assert ranges == sorted(ranges) and max(count for _, count in ranges) <= 1000
    assert all(torch.equal(into[name], tensors[name][rows[name]]) for name in tensors)
    assert not fused[:100].any() and not fused[220:].any()


def test_what_has_another_form_goes_through_the_map(checkpoint, tensors, monkeypatch):
    a, b, *_ = tensors
    wide, columns, turned = torch.zeros(300, 64), torch.zeros(300, 8).bfloat16(), torch.zeros(4, 16, 32)
    strided = torch.zeros(64, 300).bfloat16().t()
    pulls = [
        whole(a, wide),
        Pull(a, (300, 64), (slice(None), slice(8, 16)), columns),
        Pull(b, (4, 16, 32), (slice(None),) * 3, turned, transpose=True),
        whole(a, strided),
    ]
    infos = [checkpoint.catalog[pull.name] for pull in pulls]
    assert [takes_bytes(pull, info) for pull, info in zip(pulls, infos, strict=True)] == [False] * 4
    monkeypatch.setattr(os, "preadv", None)
    load_weights(pulls, checkpoint)
    assert torch.equal(wide, tensors[a].float()) and torch.equal(columns, tensors[a][:, 8:16])
    assert torch.equal(turned, tensors[b].transpose(1, 2)) and torch.equal(strided, tensors[a])


def test_a_file_that_shrinks_while_it_is_read_is_named(checkpoint, tensors):
    name = next(reversed(tensors))
    pull, info = whole(name, torch.zeros(6, 5, dtype=torch.int8)), checkpoint.catalog[name]
    with SliceReader(info.file) as reader:
        os.truncate(info.file, info.file.stat().st_size - 10)
        with pytest.raises(OSError, match="ends before its last tensor"):
            reader.read(pull, info, lambda part: None)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_weights([pull], checkpoint)
