"""W8A8S weights of the real msmodelslim into parts for one and two ranks, by a stand-in of CANN's compressor."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from emulator.kernels.compressed import unzip_weight
from executor.checkpoint.folder import read_json
from executor.checkpoint.load import build_on_meta
from executor.commands import check
from executor.commands.check_folder import check_folder
from executor.commands.compress import part, ranks
from executor.commands.compress.__main__ import compress_all, work
from executor.commands.compress.job import check_sizes, open_job, share_of
from executor.commands.tool import run_tool
from executor.errors import UserError
from executor.host.env import RankPlace, environment
from executor.layers.linear import Linear
from executor.parallel.groups import Group, Parallel
from executor.recipe.schema import build_recipe
from executor.recipe.settle import prepare, read_folder
from models.registry import family_runner
from tests.quant.compressing import stand_in
from tests.reference import REPO

TEXT = "model.language_model"
SPLIT_INPUTS = ("o_proj", "down_proj")
SPLIT_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
                   "video_preprocessor_config.json", "generation_config.json", "merges.txt", "vocab.json")  # fmt: skip


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def source(msmodelslim) -> Path:
    return msmodelslim("qwen3_vl_w8a8s")


@pytest.fixture(scope="module")
def executable(tmp_path_factory) -> Path:
    return stand_in(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def made_for(source, executable, tmp_path_factory):
    """By the number of ranks: that number, folder, document."""

    @cache
    def make(size: int) -> tuple[int, Path, dict]:
        folder = tmp_path_factory.mktemp("compressed") / "out"
        return size, folder, work(words(source, folder, executable, "--tp", str(size)))

    return make


@pytest.fixture(scope="module", params=[1, 2])
def made(request, made_for):
    return made_for(request.param)


def words(source, folder, executable, *options) -> list[str]:
    return ["--model_path", str(source), "--save-directory", str(folder), "--executable", str(executable), *options]


def parts_of(folder: Path, size: int) -> list[dict[str, torch.Tensor]]:
    named = [folder / f"part{rank}-of-{size}" / "quant_model_weight_w8a8sc.safetensors" for rank in range(size)]
    return [load_file(file) for file in named]


def tensors_of(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "quant_model_weight_w8a8s.safetensors")


def of_rank(name: str, x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's slice of a text tensor, as the architecture is split."""
    linear, suffix = name.split(".")[-2:]
    if linear in SPLIT_INPUTS and suffix == "weight":
        return x.chunk(size, dim=1)[rank]
    if linear in SPLIT_ROWS and len(x) > 1:
        return x.chunk(size)[rank]
    return x


def test_every_tensor_of_a_part_is_its_ranks(made, source):
    size, folder, _ = made
    whole, types = tensors_of(source), json.loads((source / "quant_model_description.json").read_text())
    for rank, held in enumerate(parts_of(folder, size)):
        seen = set()
        for name, x in whole.items():
            kind, prefix = types[name], name.rpartition(".")[0]
            seen.add(name)
            if name.startswith("model.visual."):
                if kind == "FLOAT" and types.get(f"{prefix}.weight") == "W8A8S":
                    assert name.endswith(".bias") and name not in held  # quant_bias holds it
                else:
                    assert torch.equal(held[name], x), name
                continue
            wanted = of_rank(name, x, rank, size)
            if kind != "W8A8S":
                assert torch.equal(held[name], wanted) and held[name].dtype is torch.float16, name
            elif name.endswith(".weight"):
                n, k = wanted.shape
                seen |= {f"{prefix}.index", f"{prefix}.info"}
                assert held[f"{prefix}.info"].tolist() == [8, 8, k, n, 1]
                assert len(held[f"{prefix}.index"]) == 8 * -(-k // 256) * -(-n // 128)
                assert torch.equal(unzip_weight(held[name], held[f"{prefix}.index"], k, n), wanted), name
            elif name.endswith(".quant_bias") and prefix.endswith(SPLIT_INPUTS) and rank:
                assert torch.equal(held[name], torch.zeros_like(x)), "the first rank adds it"
            else:
                assert torch.equal(held[name], wanted) and held[name].dtype is x.dtype, name
        assert held.keys() <= seen


def test_descriptions_name_every_tensor(made, source):
    size, folder, _ = made
    before = json.loads((source / "quant_model_description.json").read_text())
    for rank, held in enumerate(parts_of(folder, size)):
        described = json.loads((folder / f"part{rank}-of-{size}" / "quant_model_description.json").read_text())
        assert described["model_quant_type"] == "W8A8SC" and described["version"] == before["version"]
        assert {name for name in described if "." in name} == held.keys()
        for name, kind in described.items():
            text = (
                name.startswith((f"{TEXT}.", "lm_head")) and before.get(f"{name.rpartition('.')[0]}.weight") == "W8A8S"
            )
            assert "." not in name or kind == ("W8A8SC" if text else before[name]), name


def test_everything_else_is_beside_the_parts(made, source):
    size, folder, _ = made
    for name in PROCESSOR_FILES:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float16"
    held = {path.name for path in folder.iterdir()}
    assert {name for name in held if "part" in name} == {f"part{rank}-of-{size}" for rank in range(size)}
    assert not any(name.startswith(("quant_model", ".")) for name in held)


def test_the_report_counts_what_is_stored(made, source):
    size, folder, document = made
    types = json.loads((source / "quant_model_description.json").read_text())
    names = [name for name, kind in types.items() if kind == "W8A8S" and name.endswith(".weight") and TEXT in name]
    small = plain = 0
    for held in parts_of(folder, size):
        for name in names:
            prefix = name.rpartition(".")[0]
            small += held[name].numel() + held[f"{prefix}.index"].numel()
            plain += int(held[f"{prefix}.info"][2:4].prod())
    assert (document["compressed_bytes"], document["plain_bytes"], document["tp"]) == (small, plain, size)
    assert document["ratio"] == round(small / plain, 4)
    assert list(document["layers"]) == [f"layers.{number}" for number in range(3)]


# Before it is loaded


def settled(folder, world_size=1, vision="tp", **model):
    model = {"model_path": str(folder), "device": "npu_emulated", "soc": "atlas_300i_duo"} | model
    sections = {"model_config": model, "parallel_config": {"world_size": world_size, "vision_parallel": vision}}
    return prepare(build_recipe(sections | {"scheduler_config": {"max_model_len": 512, "num_blocks": 64}}))


def test_a_folder_is_for_its_number_of_ranks(made):
    size, folder, _ = made
    assert settled(folder, size).recipe.model.quantization == "w8a8sc"
    other = 3 - size
    with pytest.raises(UserError, match=f"attn_tp_size: the recipe has {other}, and .* compressed for {size}; set "):
        settled(folder, other)


def test_check_reads_the_part_of_its_rank(made):
    """The model that `check` traces: its schemes come from a part's own headers."""
    size, folder, _ = made
    recipe = settled(folder, size).recipe
    config = read_json(folder, "config.json")
    group = Group(0, size)
    model = build_on_meta(
        lambda: check._quantized(
            recipe, family_runner(config).build_model(config, Parallel(text=group, world=group, vision=group))
        ),
        torch.float16,
    )
    assert "w8a8sc" in {layer.scheme.name for layer in model.modules() if isinstance(layer, Linear)}


@pytest.mark.parametrize("vision", ["tp", "data"])
def test_memory_is_counted_from_the_part(made, vision):
    """A rank's weights are its part: of the vision encoder all, or a slice but for what is whole on every rank."""
    size, folder, _ = made
    prepared = settled(folder, size, vision)
    assert prepared.recipe.parallel.vision_parallel == vision
    scales = ("deq_scale", "info")  # kept as float32; read once
    held = [
        {name: x.numel() * (4 if name.endswith(scales) else x.element_size()) for name, x in part.items()}
        for part in parts_of(folder, size)
    ]
    seen = sum(count for name, count in held[0].items() if name.startswith("model.visual."))
    whole = prepared.shapes.replicated_vision_parameters * 2
    kept = whole + (seen - whole) / (size if vision == "tp" else 1)
    text = max(sum(part.values()) for part in held) - seen
    assert prepared.memory.weights_bytes == pytest.approx(text + kept, abs=2)


def test_other_devices_refuse_it(made_for):
    _, folder, _ = made_for(1)
    with pytest.raises(UserError, match="w8a8sc weights .* do not run on cpu; .* use the w8a8s weights"):
        settled(folder, device="cpu", soc=None)
    with pytest.raises(UserError, match="w8a8sc weights are unpacked by atlas_300i_duo only, got soc atlas_800i_a2"):
        settled(folder, soc="atlas_800i_a2")


def test_parts_are_judged_as_a_checkpoint(made, made_for, tmp_path):
    size, folder, _ = made
    report = check_folder(folder)
    assert report.faults == report.warnings == [] and report.kinds["W8A8SC"] == 18
    assert report.num_tensors == sum(map(len, parts_of(folder, size)))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / f"part{size - 1}-of-{size}" / "quant_model_weight_w8a8sc.safetensors"
    held = load_file(file)
    name = f"{TEXT}.layers.0.mlp.up_proj.index"
    save_file(held | {name: held[name][:-8].clone()}, file)
    assert "up_proj.weight' is W8A8SC with weight" in " ".join(check_folder(copy).faults)
    shutil.rmtree(file.parent)
    (copy / f"part{size}-of-{size}").mkdir()
    assert "missing or too much" in " ".join(check_folder(copy).faults)


def test_one_part_may_lie_flat(made_for, tmp_path):
    _, folder, _ = made_for(1)
    flat = Path(shutil.copytree(folder, tmp_path / "flat"))
    for path in (flat / "part0-of-1").iterdir():
        path.rename(flat / path.name)
    (flat / "part0-of-1").rmdir()
    assert check_folder(flat).faults == [] and settled(flat).recipe.model.quantization == "w8a8sc"
    with pytest.raises(UserError, match="compressed for 1; set attn_tp_size: 1"):
        settled(flat, 2)


# What is refused, and what fails


@pytest.fixture
def copied(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copied"))


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def float_description(folder):
    file = folder / "quant_model_description.json"
    types = {name: "FLOAT" if "." in name else kind for name, kind in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(types))


def sparse_vision_alone(folder):
    file = folder / "quant_model_description.json"
    types = json.loads(file.read_text())
    types |= {name: "FLOAT" for name in types if name.startswith((TEXT, "lm_head"))}
    file.write_text(json.dumps(types))


def wide_float(folder):
    file = folder / "quant_model_weight_w8a8s.safetensors"
    held = load_file(file)
    held[f"{TEXT}.norm.weight"] = held[f"{TEXT}.norm.weight"].float() * 1e6
    save_file(held, file)


def without_scale(folder):
    file = folder / "quant_model_weight_w8a8s.safetensors"
    held = load_file(file)
    del held[f"{TEXT}.layers.1.mlp.up_proj.input_scale"]
    save_file(held, file)


@pytest.mark.parametrize(
    "prepare, options, expected",
    [
        (
            None,
            ("--tp", "3"),
            "cannot be split over 3 ranks: 4 query heads do not divide .* Degrees that work: 1, 2, 4",
        ),
        (None, ("--tp", "0"), "--tp: got 0"),
        (None, ("--multiprocess_num", "0"), "--multiprocess_num: got 0"),
        (drop("config.json"), (), "has no config.json"),
        (drop("tokenizer.json", "vocab.json"), (), "tokenizer"),
        (drop("preprocessor_config.json"), (), "preprocessor_config.json"),
        (drop("quant_model_description.json"), (), "float weights|scheme"),
        (float_description, (), "has float weights; what is compressed are w8a8s weights"),
        (sparse_vision_alone, (), "weights in the vision encoder alone"),
        (without_scale, (), "'model.language_model.layers.1.mlp.up_proj.input_scale' is missing"),
        (wide_float, (), "norm.weight' of .* has values that float16 cannot hold"),
        (lambda folder: (folder / "part0-of-1").mkdir(), (), "is compressed already"),
        (None, ("--executable", "/absent/compress_excutor"), "compress_excutor, CANN's compressor, is not here"),
    ],
)
def test_mistakes_end_with_2_and_leave_no_folder(copied, tmp_path, executable, capsys, prepare, options, expected):
    if prepare:
        prepare(copied)
    assert run_tool("compress", work, words(copied, tmp_path / "out", executable, *options)) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert re.search(expected, error), error
    assert not (tmp_path / "out").exists()


def test_other_schemes_experts_and_full_folders_are_refused(msmodelslim, source, executable, tmp_path):
    (tmp_path / "note.txt").touch()
    with pytest.raises(UserError, match="is not empty: it holds note.txt"):
        work(words(source, tmp_path, executable))
    with pytest.raises(UserError, match="has w8a8 weights; what is compressed are w8a8s"):
        work(words(msmodelslim("qwen3_vl_w8a8"), tmp_path / "out", executable))
    with pytest.raises(UserError, match="does not exist"):
        work(words(tmp_path / "absent", tmp_path / "out", executable))
    sizes = read_folder(REPO / "models" / "tiny" / "qwen3_vl_moe", "tiny")[2]
    with pytest.raises(UserError, match="is a mixture of experts, and there is no product by compressed experts"):
        check_sizes(tmp_path, 1, sizes)


FAILING = """
if sys.argv[2] == "9":
    sys.stderr.write("E10001: the chip is busy")
    sys.exit(1)
"""


def test_a_weight_that_cannot_be_compressed_is_named(source, executable, tmp_path, capsys):
    """gate_proj and up_proj have nine fractals of outputs."""
    failing = tmp_path / "compress_excutor"
    failing.write_text(executable.read_text().replace("import sys\n", f"import sys\n{FAILING}", 1))
    failing.chmod(0o700)
    assert run_tool("compress", work, words(source, tmp_path / "out", failing)) == 1
    said = capsys.readouterr().err
    assert "failed for model.language_model.layers.0.mlp.gate_proj [144, 256] (exit status 1)" in said
    assert "E10001: the chip is busy" in said
    assert not (tmp_path / "out").exists()


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["write_safetensors", "write_json"])
def test_a_full_disk_leaves_nothing(source, executable, tmp_path, monkeypatch, capsys, failing):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(part, failing, full_disk)
    monkeypatch.setattr(part, "_compressed", dict_of_zeros)
    assert run_tool("compress", work, words(source, tmp_path / "out", executable)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def dict_of_zeros(job, share, compressor):
    one = torch.zeros(1, dtype=torch.int8)
    return {name: part.Packed(one, one, torch.zeros(5, dtype=torch.int64)) for name in share.linears}


def test_what_does_not_read_back_is_no_result(source, executable, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "_compressed", dict_of_zeros)
    with pytest.raises(RuntimeError, match="part0-of-1 does not read back: .* must have weight .bytes., index .32."):
        work(words(source, tmp_path / "out", executable))
    assert not (tmp_path / "out").exists()


# Processes of torchrun


class Peer(ranks.Ranks):
    """A rank in a thread, over a store of this process."""

    def __init__(self, rank: int, store: dist.Store) -> None:
        self.place, self.store = RankPlace(rank, 2, rank, 2), store


def two_ranks(source, folder, executable, monkeypatch) -> list:
    """What both ranks gave or raised. Models are built one at a time: torch's default dtype is one for all threads."""
    store, found, building, job = dist.HashStore(), [None, None], threading.Lock(), open_job(source, 2)
    shares = [share_of(job, rank, job.checkpoint, job.description) for rank in (0, 1)]

    def share_of_one(*arguments):
        with building:
            return share_of(*arguments)

    def run(rank: int) -> None:
        try:
            compressor = part.Compressor(executable, 2)
            found[rank] = compress_all(job, [shares[rank]], compressor, folder, Peer(rank, store))
        except (UserError, RuntimeError) as error:
            found[rank] = error

    monkeypatch.setattr(part, "share_of", share_of_one)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


def test_two_ranks_make_what_one_process_does(made_for, source, executable, tmp_path, monkeypatch):
    _, folder, _ = made_for(2)
    first, second = two_ranks(source, tmp_path / "out", executable, monkeypatch)
    assert first == second and len(first) == 2
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert all((folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in files)


def test_a_rank_that_fails_fails_all(source, executable, tmp_path, monkeypatch):
    write = part.write_safetensors

    def full_for_the_second(path, entries):
        return full_disk() if "part1" in str(path) else write(path, entries)

    monkeypatch.setattr(part, "write_safetensors", full_for_the_second)
    found = two_ranks(source, tmp_path / "out", executable, monkeypatch)
    words = "No space left on device; what was written of it has been removed"
    assert [str(error) for error in found] == [f"rank 1: {tmp_path / 'out'} cannot be written: {words}"] * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables, words_of",
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE"),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "MASTER_ADDR": "one"}, "one of several tasks of Slurm"),
        (TORCHRUN, "--tp: got 3, and torchrun started 2 processes"),
    ],
)
def test_other_launchers_are_refused(source, tmp_path, executable, monkeypatch, variables, words_of):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words_of):
        work(words(source, tmp_path / "out", executable, "--tp", "3"))


@pytest.mark.long
def test_torchrun(made, source, executable, tmp_path):
    size, folder, _ = made
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*launcher, "-m", "executor.commands.compress", *words(source, tmp_path / "out", executable)]
    settings = environment() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=REPO, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["tp"] == size
    again = subprocess.run(command, cwd=REPO, env=settings, capture_output=True, text=True, timeout=120)
    assert again.returncode != 0 and "is not empty" in json.loads(again.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_executables_and_leaves_nothing(source, tmp_path, number):
    """They may have children of their own, and take minutes for a large weight."""
    slow, started, files = tmp_path / "slow", tmp_path / "started", tmp_path / "tmp"
    files.mkdir()
    slow.write_text(f"#!/bin/sh\nsleep 300 &\necho $! >> {started}\nwait\n")
    slow.chmod(0o700)
    command = [sys.executable, "-m", "executor.commands.compress", *words(source, tmp_path / "out", slow)]
    process = subprocess.Popen(
        command, cwd=REPO, env={**environment(), "TMPDIR": str(files)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while not started.exists() or len(started.read_text().split()) < 4:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and json.loads(out.splitlines()[-1])["error"] == "interrupted"
    assert not list(files.glob("compress_*")) and not (tmp_path / "out").exists()
    sleeping = [pid for pid in started.read_text().split() if _is_alive(int(pid))]
    assert sleeping == []


def _is_alive(pid: int) -> bool:
    """Whether it runs; one that ended and that nobody has asked for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
