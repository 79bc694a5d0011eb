"""`python -m executor.commands.quantize --model_path FLOAT --save_directory OUT --scheme w8a8 --calibration PICTURES`.

Makes a quantized checkpoint in msmodelslim's v1 form, layer by layer: a model needs the memory of one layer and of the
activations of one calibration sample. Stopped and started again with the same words it goes on where it was.
`--check FOLDER` judges a quantized checkpoint instead. docs/quantization.md says which scheme is for what.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from executor.commands.tool import Document, ToolParser, checkpoint_folder, run_tool
from executor.errors import UserError
from executor.host.env import calm_threads, find_path

SCHEMES = ("w8a8", "w8a8_dynamic", "w8a8_mix", "w8a16", "w4a8_dynamic", "w8a8s")
DEFAULT_SMOOTH = 0.5


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser("quantize", "Make a quantized checkpoint of a float one, or judge one.")
    parser.add("model_path", metavar="FOLDER", help="a float checkpoint on this machine")
    parser.add("save_directory", metavar="FOLDER", help="where the quantized one goes: empty, or not there yet")
    parser.add("scheme", choices=SCHEMES, help="how weights and activations are stored and multiplied")
    parser.add("calibration", metavar="PATH", help="a folder of pictures and videos, or rows (JSONL)")
    parser.add("samples", type=int, default=32, help="of the calibration set, at most (default 32)")
    parser.add("device", choices=("auto", "cpu", "npu"), default="auto", help="what the calibration is computed on")
    parser.add("dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="and in which type")
    parser.add("smooth", type=float, help="SmoothQuant's alpha, 0 for none (default 0.5 where activations are int8)")
    parser.add("percentile", type=float, default=100.0, help="of its values that an activation's scale covers")
    parser.add("rounding", choices=("nearest", "gptq"), default="nearest", help="of weights")
    parser.add("keep_float", nargs="+", default=[], metavar="PATTERN", help="linears that stay float as well")
    parser.add("quantize", nargs="+", default=[], metavar="PATTERN", help="linears that do not stay float by default")
    parser.add("quantize_vision", action=argparse.BooleanOptionalAction, default=True, help="the vision encoder")
    return parser.parse_args(list(argv))


def work(argv: Sequence[str]) -> Document:
    told = parse(argv)
    for name in ("model_path", "save_directory", "scheme"):
        if getattr(told, name) is None:
            raise UserError(f"--{name} is missing: --model_path FLOAT --save_directory OUT --scheme SCHEME, or --check")
    calm_threads()  # before anything imports torch
    return quantize(told)


def quantize(told: argparse.Namespace) -> Document:
    from executor.calibrate.run import quantize as run
    from executor.calibrate.settings import Settings

    source = open_source(told.model_path)
    device, dtype = open_device(told, source.dtype)
    smooth = told.smooth
    if smooth is None:
        smooth = 0.0 if told.scheme == "w8a16" else DEFAULT_SMOOTH
    settings = Settings(
        scheme=told.scheme,
        smooth=smooth,
        percentile=told.percentile,
        rounding=told.rounding,
        keep_float=tuple(told.keep_float),
        quantize=tuple(told.quantize),
        quantize_vision=told.quantize_vision,
        samples=told.samples,
        dtype=dtype,
    )
    calibration = None if told.calibration is None else find_path(told.calibration)
    out = Path(told.save_directory).expanduser()
    report = run(source, out, settings, calibration, device)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
    print(
        f"{out}: {kinds}; {report.source_bytes / 1e9:.2f} GB became {report.written_bytes / 1e9:.2f} GB in "
        f"{report.seconds:.0f} s; peak memory {report.peak_bytes / 1e9:.2f} GB (bound {report.bound_bytes / 1e9:.2f})"
    )
    return {"save_directory": str(out), "scheme": told.scheme, **asdict(report)}


def open_source(model_path: str) -> Any:
    """The float checkpoint. UserError for one that is quantized already, or no model of this release."""
    from executor.calibrate.run import Source
    from executor.recipe.settle import read_folder
    from models.registry import family_runner, parse_config

    folder = checkpoint_folder(model_path)
    config, quantization, _ = read_folder(folder, model_path)
    if quantization != "none":
        raise UserError(f"--model_path: {model_path} is quantized already ({quantization}); give the float checkpoint")
    return Source(folder, config, family_runner(config), parse_config(config).dtype)


def open_device(told: argparse.Namespace, own: str) -> tuple[Any, str]:
    """The backend, and the type that the calibration is computed in: a CPU's is float32 where nothing is said."""
    from executor.device.table import BACKENDS, DeviceSettings

    name = told.device
    if name == "auto":
        name = "npu" if BACKENDS["npu"].is_installed else "cpu"
    backend = BACKENDS[name]
    dtype = told.dtype
    if dtype == "auto":
        dtype = "float32" if name == "cpu" else own if own in backend.dtypes else "bfloat16"
    if dtype not in backend.dtypes:
        raise UserError(f"--dtype: {name} computes in {' or '.join(backend.dtypes)}, got {dtype}")
    if not backend.is_installed:
        raise UserError(f"--device: {name} needs {backend.package} beside torch, and it is not installed here; use cpu")
    return backend.open(DeviceSettings(dtype)), dtype


if __name__ == "__main__":
    sys.exit(run_tool("quantize", work))
