"""`torchrun --nproc_per_node TP -m executor.commands.compress --model_path W8A8S --save_directory OUT`.

Compresses W8A8S weights for the 300I DUO (W8A8SC), each rank's own: the number of ranks is settled here for good.
Without torchrun one process makes the parts of `--tp` ranks one after the other. Needs CANN's compressor.
OUT: `part{rank}-of-{TP}/` with weights and description, and beside them config.json (float16), tokenizer, template and
processor files. The vision encoder and linears of other types stay as they are; each part holds its rank's slice of
them, and the vision encoder whole.
"""

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.checkpoint.files import DESCRIPTIONS
from executor.checkpoint.writing import (
    CONFIG,
    STAGING,
    abandon_folder,
    begin_folder,
    check_apart,
    check_empty,
    copy_files,
    finish_folder,
    not_written,
    with_dtype,
    write_json,
)
from executor.commands.compress.job import DTYPE, Job, Share, config_of, open_job, share_of
from executor.commands.compress.part import Compressor, write_part
from executor.commands.compress.ranks import Ranks
from executor.commands.tool import Document, ToolParser, checkpoint_folder, run_tool
from executor.errors import UserError
from executor.host.env import RankPlace, environment, rank_place
from executor.launch.foreign import rank_variables
from executor.quant.compressor import find_executable

COPIED = ("*.json", "*.txt", "*.jinja", "*.model")
NOT_COPIED = (CONFIG, DESCRIPTIONS, "*.safetensors.index.json")
Bytes = dict[str, list[int]]  # [plain, compressed] by the name of a linear
logger = logging.getLogger(__name__)


def work(argv: Sequence[str]) -> Document:
    told, place = _parse(argv), _place()
    target, size = Path(told.save_directory).expanduser(), _size(told.tp, place)
    parts = range(size) if place.world_size == 1 else (place.rank,)
    opened: list[tuple[Job, list[Share], Compressor]] = []

    def prepare() -> None:
        source = checkpoint_folder(told.model_path)
        check_apart(source, target)
        check_empty(target)
        job = open_job(source, size)
        shares = [share_of(job, rank, job.checkpoint, job.description) for rank in parts]
        opened.append((job, shares, Compressor(find_executable(told.executable), told.multiprocess_num)))

    ranks = Ranks(place)
    ranks.together("opened", prepare)
    found = compress_all(*opened[0], target, ranks)
    for rank, each in enumerate(found):
        _print_ratios(f"part {rank}", each)
    plain, small = (sum(column) for column in zip(*(row for each in found for row in each.values()), strict=True))
    if small >= plain:
        logger.warning("the weights became no smaller: they are not sparse; was the calibration one for w8a8s?")
    print(f"{target}: {small / 2**20:.1f} of {plain / 2**20:.1f} MiB, ratio {small / plain:.3f}, for {size} rank(s)")
    document = {"save_directory": str(target), "tp": size, "ratio": round(small / plain, 4)}
    layers = _ratios_by_layer({f"{rank}/{name}": row for rank, each in enumerate(found) for name, row in each.items()})
    return document | {"plain_bytes": plain, "compressed_bytes": small, "layers": layers}


def compress_all(job: Job, shares: Sequence[Share], compressor: Compressor, target: Path, ranks: Ranks) -> list[Bytes]:
    """Every part, the leading rank's process around them: it begins and ends the folder. All ranks' bytes."""
    was_there = target.exists()

    def begin() -> None:
        staging = begin_folder(target)
        copy_files(job.folder, staging, _is_copied)
        write_json(staging / CONFIG, with_dtype(config_of(job), str(DTYPE).removeprefix("torch.")))

    def write() -> list[Bytes]:
        return [write_part(job, share, compressor, target / STAGING) for share in shares]

    def together(step: str, act: Callable[[], Any]) -> list[Any]:
        def writing() -> Any:
            try:
                return act()
            except OSError as error:
                raise not_written(target, error) from error

        return ranks.together(step, writing)

    try:
        together("begun", lambda: begin() if ranks.leads else None)
        found = [each for of_rank in together("written", write) for each in of_rank]
        together("finished", lambda: finish_folder(target) if ranks.leads else None)
        return found
    finally:
        if ranks.leads:
            abandon_folder(target, keep=was_there)


def _is_copied(name: Path) -> bool:
    """Tokenizer, template, processor and generation files, whatever their names: all but weights and their indices."""
    return any(name.match(pattern) for pattern in COPIED) and not any(name.match(pattern) for pattern in NOT_COPIED)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser("compress", "Compress w8a8s weights for the 300I DUO (w8a8sc), for a number of ranks.")
    parser.add("model_path", required=True, metavar="FOLDER", help="the w8a8s weights")
    parser.add("save_directory", required=True, metavar="FOLDER", help="a folder that does not exist yet")
    parser.add("tp", type=int, metavar="N", help="ranks to compress for; under torchrun its number of processes")
    parser.add("multiprocess_num", type=int, default=4, metavar="N", help="weights at a time on each rank (default 4)")
    parser.add("executable", metavar="FILE", help="CANN's compressor, where it is not on PATH or in msmodelslim")
    told = parser.parse_args(list(argv))
    for name in ("tp", "multiprocess_num"):
        number = getattr(told, name)
        if number is not None and number < 1:
            raise UserError(f"--{name}: got {number}; it must be 1 or more")
    return told


def _place() -> RankPlace:
    """This process among torchrun's. UserError for half of a launcher, and for another one's ranks."""
    variables = environment()
    if rank_variables(variables) and "RANK" not in variables:
        raise UserError(
            "this is one of several tasks of Slurm: start one task, with --tp for the number of ranks, or torchrun "
            "--nproc_per_node TP in it"
        )
    return rank_place()


def _size(tp: int | None, place: RankPlace) -> int:
    if place.world_size > 1 and tp not in (None, place.world_size):
        raise UserError(f"--tp: got {tp}, and torchrun started {place.world_size} processes; leave --tp out")
    return place.world_size if place.world_size > 1 else tp or 1


def _print_ratios(title: str, found: Mapping[str, list[int]]) -> None:
    """A line for every layer of a part: its ratio, and those of its linears."""
    for layer, ratio in _ratios_by_layer(found).items():
        linears = [(name.rpartition(".")[2], row) for name, row in found.items() if _layer_of(name) == layer]
        each = ", ".join(f"{name} {small / plain:.3f}" for name, (plain, small) in linears)
        print(f"{title}  {layer:<10} {ratio:.3f}  ({each})")


def _ratios_by_layer(found: Mapping[str, list[int]]) -> dict[str, float]:
    """Compressed by plain bytes; what stands in no layer by its own name."""
    sums: dict[str, list[int]] = {}
    for name, row in found.items():
        held = sums.setdefault(_layer_of(name), [0, 0])
        held[:] = [before + more for before, more in zip(held, row, strict=True)]
    return {layer: round(small / plain, 4) for layer, (plain, small) in sums.items()}


def _layer_of(name: str) -> str:
    layer = re.search(r"layers\.\d+", name)
    return layer[0] if layer else name.rpartition("/")[2]


def _interrupt(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would disturb the tidying
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # ends like Ctrl-C: executables and files of the run go with it
    sys.exit(run_tool("compress", work, is_shown=environment().get("RANK", "0") == "0"))
