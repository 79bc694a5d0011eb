"""The six folders that the real msmodelslim 26.1.0 wrote of the tiny checkpoints, bit for bit, from what differs.

An archive holds, for every file of weights, its header and the tensors that models/tiny does not have: what is equal
there (cast to the file's type) is left out, and int8 weights are stored as the difference from the tiny weight rounded
by its rows' largest values where that is shorter. Rebuilt files are compared with the digests of the originals.
`python -m tests.msmodelslim.folders SOURCE` packs anew what SOURCE holds.
"""

import hashlib
import io
import json
import lzma
import shutil
import struct
import sys
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from executor.checkpoint.headers import TensorInfo, read_header
from executor.checkpoint.names import canonical_name
from tests.reference import REPO

HERE = Path(__file__).parent
ARCHIVES = {
    "qwen2_5_vl": ("qwen2_5_vl_w8a8",),
    "qwen3_vl": ("qwen3_vl_w8a8", "qwen3_vl_w8a8_dynamic", "qwen3_vl_w8a16", "qwen3_vl_w8a8s"),
    "qwen3_vl_moe": ("qwen3_vl_moe_w8a8",),
}
"""The names of the folders by the tiny checkpoint they were made of."""
FOLDERS = tuple(name for names in ARCHIVES.values() for name in names)
EXPECTED = "expected.json"
SAME, STEPS, WHOLE = "same", "steps", "whole"  # as the tiny checkpoint has it; difference from that; all of it


def family_of(name: str) -> str:
    return next(family for family, names in ARCHIVES.items() if name in names)


def unpack(name: str, to: Path) -> Path:
    """The folder as published: what the tool wrote, beside the tiny checkpoint's tokenizer and processor files."""
    family, folder = family_of(name), to / name
    folder.mkdir(parents=True)
    tiny = REPO / "models" / "tiny" / family
    for file in tiny.iterdir():
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, folder / file.name)
    weights = _Tiny(tiny)
    for member, content in _archive(family).items():
        if not member.startswith(f"{name}/"):
            continue
        file = member.removeprefix(f"{name}/")
        path = folder / file.removesuffix(".packed")
        path.parent.mkdir(exist_ok=True)
        if file.endswith(".packed"):
            content = _rebuilt(path, content, weights)
        path.write_bytes(content)
    return folder


def expected(folder: Path) -> dict:
    """What the folder's model must compute; expected.json says of whom its numbers are."""
    return json.loads((folder / EXPECTED).read_text())


@lru_cache(maxsize=1)
def _archive(family: str) -> dict[str, bytes]:
    """All of an archive's files: it is compressed as one, as its folders have tensors in common."""
    with tarfile.open(HERE / f"{family}.tar.xz") as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


class _Tiny:
    """Float weights by canonical name; experts are looked up one by one, the head is the embedding."""

    def __init__(self, folder: Path) -> None:
        self.tensors = {canonical_name(key): x for key, x in load_file(folder / "model.safetensors").items()}

    def find(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        name = canonical_name(name)
        found = self.tensors.get(name)
        if name == "lm_head.weight":
            found = self.tensors["model.language_model.embed_tokens.weight"]
        if ".mlp.experts." in name and name.endswith(".weight"):
            prefix, expert, linear = name.removesuffix(".weight").rsplit(".", 2)
            half = {"gate_proj": 0, "up_proj": 1}
            if linear in half:
                found = self.tensors[f"{prefix}.gate_up_proj"][int(expert)].chunk(2, dim=1)[half[linear]].t()
            else:
                found = self.tensors[f"{prefix}.down_proj"][int(expert)].t()
        return found if found is not None and tuple(found.shape) == shape else None


def _rounded(weight: Tensor) -> Tensor:
    """int8 by row, as the tool rounds weights that it has not changed before."""
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-23)
    return (wide / scale).round().clamp(-128, 127).to(torch.int8)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _rebuilt(path: Path, packed: bytes, weights: _Tiny) -> bytes:
    stream = io.BytesIO(packed)
    kinds = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    head = stream.read(8)
    head += stream.read(struct.unpack("<Q", head)[0])
    parts = [head]
    for info, kind in zip(_infos(head, path.with_suffix(".head")), kinds["tensors"], strict=True):
        found = None if kind == WHOLE else weights.find(info.original_name, info.shape)
        if kind == SAME:
            parts.append(_bytes(found.to(info.dtype)))
        elif kind == STEPS:
            difference = torch.frombuffer(bytearray(stream.read(info.num_bytes)), dtype=torch.int8).view(info.shape)
            parts.append(_bytes(_rounded(found) + difference))
        else:
            parts.append(stream.read(info.num_bytes))
    content = b"".join(parts)
    assert hashlib.sha256(content).hexdigest() == kinds["sha256"], f"{path.name} is not what the tool wrote"
    return content


def _infos(head: bytes, scratch: Path) -> list[TensorInfo]:
    """Of a file that has only its header yet."""
    size = max(entry["data_offsets"][1] for key, entry in json.loads(head[8:]).items() if key != "__metadata__")
    with scratch.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    infos = read_header(scratch)
    scratch.unlink()
    return infos


def _packed(path: Path, weights: _Tiny) -> bytes:
    content, kinds, parts = path.read_bytes(), [], []
    head = content[: 8 + struct.unpack("<Q", content[:8])[0]]
    tensors = load_file(path)
    for info in read_header(path):
        x, found = tensors[info.original_name], weights.find(info.original_name, info.shape)
        kind, stored = WHOLE, _bytes(x)
        if found is not None and torch.equal(found.to(x.dtype).view(torch.uint8), x.view(torch.uint8)):
            kind, stored = SAME, b""
        elif found is not None and x.dtype is torch.int8:
            difference = _bytes(x - _rounded(found))
            if len(lzma.compress(difference)) < 0.97 * len(lzma.compress(stored)):
                kind, stored = STEPS, difference
        kinds.append(kind)
        parts.append(stored)
    note = json.dumps({"sha256": hashlib.sha256(content).hexdigest(), "tensors": kinds}).encode()
    return struct.pack("<Q", len(note)) + note + head + b"".join(parts)


def _files(folder: Path, weights: _Tiny) -> Iterator[tuple[str, bytes]]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder.parent).as_posix()
        if path.suffix == ".safetensors":
            yield f"{name}.packed", _packed(path, weights)
        else:
            yield name, path.read_bytes()


def pack(source: Path) -> None:
    """Write the archives from the folders as the tool wrote them."""
    for family, names in ARCHIVES.items():
        weights = _Tiny(REPO / "models" / "tiny" / family)
        with tarfile.open(HERE / f"{family}.tar.xz", "w:xz", preset=9 | lzma.PRESET_EXTREME) as archive:
            for name in names:
                for file, content in _files(source / name, weights):
                    member = tarfile.TarInfo(file)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
