"""W8A8SC: the layout and the stand-in of the compressor, what a part holds, and weights of a wrong form."""

import stat
import sys
from pathlib import Path

import pytest
import torch

from emulator.kernels.compressed import unzip_weight, zip_weight
from executor.checkpoint.headers import TensorInfo
from executor.checkpoint.part_pulls import of_part, open_checkpoint, taken
from executor.checkpoint.parts import part_folders, size_finding
from executor.checkpoint.pull import Pull, elsewhere
from executor.errors import UserError
from executor.parallel.groups import Group
from executor.parallel.partition import Part
from executor.quant.compressor import compress, find_executable, in_fractals, work_folder
from executor.quant.scheme import LinearShare
from executor.quant.w8a8sc import W8A8SC, compressed_scheme, index_bytes
from tests.quant.compressing import stand_in


def sparse(n: int, k: int) -> torch.Tensor:
    weight = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    weight[: n // 2, k // 2 :] = 0
    return weight


def test_fractals_hold_sixteen_outputs_by_thirty_two_inputs():
    weight = torch.randint(-128, 128, (40, 70), dtype=torch.int8)
    laid_out = in_fractals(weight)
    assert laid_out.shape == (3, 3, 16, 32) and laid_out.is_contiguous()
    for n, k in [(0, 0), (39, 69), (16, 31), (15, 32), (33, 5)]:
        assert laid_out[k // 32, n // 16, n % 16, k % 32] == weight[n, k]
    assert laid_out.sum() == weight.sum(), "the rest is zeros"


@pytest.mark.parametrize("n, k", [(16, 32), (128, 256), (40, 70), (300, 520), (1, 1)])
def test_the_stand_in_has_the_emulators_codec(n, k, tmp_path):
    torch.manual_seed(n)
    weight = sparse(n, k)
    with work_folder() as folder:
        packed = compress(stand_in(tmp_path), weight, "up_proj", Path(folder))
        assert list(Path(folder).iterdir()) == []
    values, index = zip_weight(weight)
    assert torch.equal(packed.values, values) and torch.equal(packed.index, index)
    assert packed.info.tolist() == [8, 8, k, n, 1] and packed.info.dtype is torch.int64
    assert len(index) == index_bytes(k, n) == 8 * -(-k // 256) * -(-n // 128)
    assert torch.equal(unzip_weight(packed.values, packed.index, k, n), weight)


@pytest.mark.parametrize(
    "script, words",
    [
        ("print('Error: output_mm is empty!')", "failed for q_proj .16, 32. .exit status 0.\n  Error: output_mm"),
        ("sys.stderr.write('no device'); sys.exit(3)", "exit status 3.\n  no device"),
        ("", "exit status 0.; it said nothing"),
        ("[open(path, 'wb').write(bytes(12)) for path in sys.argv[9:]]", "gave for q_proj .* 12 of index and info"),
    ],
)
def test_a_compressor_that_fails_is_told_by_its_files(tmp_path, script, words):
    executable = tmp_path / "compress_excutor"
    executable.write_text(f"#!{sys.executable} -IS\nimport sys\n{script}\n")
    executable.chmod(0o700)
    with work_folder() as folder, pytest.raises(RuntimeError, match=words):
        compress(executable, torch.ones(16, 32, dtype=torch.int8), "q_proj", Path(folder))


def test_the_executable_is_found_or_its_making_is_told(tmp_path, monkeypatch):
    made = stand_in(tmp_path / "bin")
    assert find_executable(str(made)) == made.resolve()
    monkeypatch.setenv("PATH", str(made.parent))
    assert find_executable(None) == made.resolve()
    monkeypatch.setenv("PATH", str(tmp_path))
    package = tmp_path / "site" / "msmodelslim"
    built = package / "pytorch" / "weight_compression" / "compress_graph" / "build"
    built.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(UserError, match=r"(?s)compress_excutor.*is not here.*compress_graph/build/.*build.sh"):
        find_executable(None)
    in_package = stand_in(built)
    assert find_executable(None) == in_package.resolve()
    in_package.chmod(stat.S_IRUSR)
    with pytest.raises(UserError, match="is not here"):
        find_executable(str(in_package))


# What a part holds


def test_pulls_of_a_part_read_what_those_of_the_whole_do():
    """Rows in one or several slices, turned tensors, scalars: side by side in the part's file."""
    whole = {"a": torch.arange(60).view(12, 5), "b": torch.arange(60).view(3, 4, 5), "c": torch.tensor(7)}
    whole["model.visual.d"] = torch.arange(8)
    pulls = [
        Pull("a", (12, 5), (slice(6, 8),), torch.empty(2, 5)),
        Pull("a", (12, 5), (slice(1, 4), slice(None)), torch.empty(3, 5)),
        Pull("b", (3, 5, 4), (slice(1, 3), slice(1, 2), slice(0, 2)), torch.empty(2, 1, 2), transpose=True),
        Pull("b", (3, 5, 4), (slice(1, 3), slice(3, 5), slice(0, 2)), torch.empty(2, 2, 2), transpose=True),
        Pull("c", (), (), torch.empty(())),
        Pull("model.visual.d", (8,), (slice(2, 4),), torch.empty(2)),
        elsewhere("e", (4, 4)),
        elsewhere("model.visual.f", (4, 4)),
    ]
    held = taken(pulls)
    assert held["a"] == (((1, 4), (6, 8)), ((0, 5),)) and "e" not in held
    part = {}
    for name, dims in held.items():
        part[name] = whole[name]
        for place, bounds in enumerate(dims):
            rows = torch.cat([torch.arange(start, stop) for start, stop in bounds])
            part[name] = part[name].index_select(place, rows)
    assert torch.equal(part["model.visual.d"], whole["model.visual.d"]), "vision stays whole"
    local = list(of_part(pulls))
    assert [pull.name for pull in local] == ["a", "a", "b", "b", "c", "model.visual.d", "model.visual.f"]
    for before, after in zip(pulls, local, strict=False):
        if before.into.numel():
            assert tuple(after.file_shape) == tuple(part[after.name].shape)
            assert torch.equal(part[after.name][after.file_index], whole[before.name][before.file_index])


def test_rows_that_are_taken_twice_are_a_defect():
    with pytest.raises(AssertionError, match="takes rows twice"):
        taken(Pull("a", (9,), (slice(*bounds),), torch.empty(3)) for bounds in ((0, 3), (2, 5)))


@pytest.mark.parametrize(
    "names, words",
    [
        (("part0-of-2",), "part1-of-2 is missing"),
        (("part0-of-2", "part1-of-2", "part0-of-1"), "several numbers of ranks: 1, 2"),
        (("part0-of-1", "part1-of-1"), "a part beyond the last"),
    ],
)
def test_sets_of_parts_that_are_not_whole(tmp_path, names, words):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=words):
        part_folders(tmp_path)


def test_parts_are_for_their_number_of_ranks(tmp_path):
    for rank in range(11):
        (tmp_path / f"part{rank}-of-11").mkdir()
    assert [path.name for path in part_folders(tmp_path)][9:] == ["part9-of-11", "part10-of-11"]
    assert size_finding(tmp_path, True, 11) is None
    with pytest.raises(UserError, match="the recipe has 2, and the weights in .* compressed for 11; .*: 11, or"):
        open_checkpoint(tmp_path, 0, 2)
    flat = tmp_path / "flat"
    flat.mkdir()
    assert size_finding(flat, False, 4) is None and size_finding(flat, True, 1) is None
    assert "compressed for 1;" in size_finding(flat, True, 4)
    (flat / "model-rank-0-part-0.safetensors").touch()
    with pytest.raises(UserError, match="another tool's container"):
        part_folders(flat)


# Tensors of a wrong form


def share(*parts: tuple[str, int]) -> LinearShare:
    made = tuple(Part(name, rows, slice(0, rows)) for name, rows in parts)
    return LinearShare(256, slice(0, 256), made, "out", Group(), False)


def catalog(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    held = {"weight": (100,), "index": (8,), "info": (5,)} | shapes
    return {f"mlp.up_proj.{suffix}": TensorInfo(shape, torch.int8, Path()) for suffix, shape in held.items() if shape}


def test_sizes_come_from_the_checkpoints_headers():
    assert compressed_scheme(share(("up_proj", 128)), ["mlp.up_proj"], catalog()).sizes == ((100, 8),)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"index": (16,)}, r"index \[16\].* it must have weight \[bytes\], index \[8\], info \[5\]"),
        ({"weight": (128, 256)}, r"weight \[128, 256\]"),
        ({"info": (4,)}, r"info \[4\]"),
        ({"index": (), "info": ()}, "mlp.up_proj.index, mlp.up_proj.info is missing"),
    ],
)
def test_another_form_is_refused_before_loading(shapes, words):
    with pytest.raises(UserError, match=words):
        compressed_scheme(share(("up_proj", 128)), ["mlp.up_proj"], catalog(**shapes))


def test_a_compressed_vision_encoder_is_refused():
    with pytest.raises(UserError, match="heads are widened"):
        compressed_scheme(share((None, 128)), ["model.visual.blocks.0.attn.qkv"], catalog())


def test_weights_of_other_sizes_are_refused():
    scheme, linear = W8A8SC(((10, 8), (20, 8))), share(("gate_proj", 96), ("up_proj", 128))
    tensors = {f"info_{number}": torch.tensor([8, 8, 256, n, 1]) for number, n in enumerate((96, 128))}
    tensors |= {name: torch.zeros(224) for name in ("deq_scale", "quant_bias")}
    tensors |= {f"{name}_{number}": torch.zeros(8) for name in ("weight", "index") for number in (0, 1)}
    tensors |= {"input_scale": torch.ones(2), "input_offset": torch.zeros(2)}
    weight = scheme.weight(linear, tensors)
    assert weight.num_out == (96, 128) and len(weight.input_scale) == 1
    wrong = tensors | {"info_1": torch.tensor([8, 8, 512, 128, 1])}
    with pytest.raises(UserError, match=r"\(up_proj\) was compressed for k, n = \[512, 128\].*\[256, 128\]"):
        scheme.weight(linear, wrong)
    with pytest.raises(UserError, match="input_scale of linears that are multiplied together differ"):
        scheme.weight(linear, tensors | {"input_scale": torch.tensor([1.0, 2.0])})


def test_every_rank_reads_its_own_quant_bias():
    """Where results are summed: the part of a rank that adds no bias has zeros."""
    second = LinearShare(512, slice(256, 512), (Part(None, 128, slice(0, 128)),), "in", Group(1, 2), False)
    scheme = W8A8SC(((100, 8),))
    tensors = {name: x for name, x in scheme.linear_tensors(second).items() if x is not None}
    assert tensors["quant_bias"].shape == (128,) and tensors["weight_0"].shape == (100,)
    names = {pull.name for pull in scheme.pull_linear(second, tensors, {}, "o_proj") if pull.into.numel()}
    assert names == {f"o_proj.{suffix}" for suffix in (*scheme_suffixes(), "weight", "index", "info")}


def scheme_suffixes() -> tuple[str, ...]:
    return ("deq_scale", "quant_bias", "input_scale", "input_offset")
