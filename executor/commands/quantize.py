"""`python -m executor.commands.quantize --model_path FLOAT --save_directory OUT --scheme w8a8 --calibration PICTURES`.

Makes a quantized checkpoint in msmodelslim's v1 form, layer by layer: a model needs the memory of one layer and of the
activations of one calibration sample. Stopped and started again with the same words it goes on where it was.
`--check FOLDER` judges a quantized checkpoint instead. docs/quantization.md says which scheme is for what.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from executor.commands.tool import (
    Document,
    ToolParser,
    checkpoint_folder,
    run_tool,
    terminate_as_interrupt,
)
from executor.errors import UserError
from executor.host.env import calm_threads, find_path

logger = logging.getLogger(__name__)

SCHEMES = ("w8a8", "w8a8_dynamic", "w8a8_mix", "w8a16", "w4a8_dynamic", "w8a8s")
DEFAULT_SMOOTH = {"w8a16": 0.0}
"""Schemes whose activations stay float need none; half for the others."""
DEFAULT_ROUNDING = {"w8a8s": "gptq"}
"""Its steps are eight times as wide as other schemes': there it is worth its time."""


ELSEWHERE = {
    "wint8": "it is made while a float checkpoint is loaded: --set model_config.quantization=wint8 in its recipe",
    "w8a8sc": "it is made of w8a8s by python -m executor.commands.compress (docs/quantization.md)",
}
DOWNLOAD = "download the checkpoint again, whole"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser("quantize", "Make a quantized checkpoint of a float one, or judge one.")
    parser.add("model_path", metavar="FOLDER", help="a float checkpoint on this machine")
    parser.add("save_directory", metavar="FOLDER", help="where the quantized one goes: empty, or not there yet")
    parser.add("scheme", help=f"how weights and activations are stored and multiplied: {', '.join(SCHEMES)}")
    parser.add("calibration", metavar="PATH", help="a folder of pictures and videos, or rows (JSONL)")
    parser.add(
        "tool",
        choices=("auto", "msmodelslim", "builtin"),
        default="auto",
        help="what makes it (default auto: the vendor's where its command is on the PATH and able)",
    )
    parser.add("samples", type=int, default=32, help="of the calibration set, at most (default 32)")
    parser.add(
        "device",
        choices=("auto", "cpu", "npu"),
        default="auto",
        help="what the calibration is computed on (default auto)",
    )
    parser.add(
        "dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="and in which type (default auto: the checkpoint's)",
    )
    parser.add("smooth", type=float, help="SmoothQuant's alpha, 0 for none (default 0.5 where activations are int8)")
    parser.add(
        "percentile", type=float, default=100.0, help="of its values that an activation's scale covers (default 100)"
    )
    parser.add("rounding", choices=("auto", "nearest", "gptq"), default="auto", help="of weights: gptq for w8a8s")
    parser.add(
        "keep_float",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="linears that stay float as well: shell patterns of whole names, such as model.language_model.layers.0.*",
    )
    parser.add("quantize", nargs="+", default=[], metavar="PATTERN", help="linears that do not stay float by default")
    parser.add(
        "quantize_vision",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the vision encoder is quantized (default: it is)",
    )
    parser.add("check", metavar="FOLDER", help="judge this quantized checkpoint, and make none")
    options = parser.parse_args(list(argv))
    if options.scheme not in (None, *SCHEMES):
        raise UserError(
            f"--scheme: got {options.scheme}; {ELSEWHERE.get(options.scheme, 'one of ' + ', '.join(SCHEMES))}"
        )
    return options


def work(argv: Sequence[str]) -> Document:
    options = parse(argv)
    calm_threads()  # before anything imports torch
    if options.check is not None:
        if options.model_path or options.save_directory:
            raise UserError("--check judges a folder and makes none: give it alone")
        from executor.commands.check_folder import run_check

        return run_check(options.check)
    for name in ("model_path", "save_directory", "scheme"):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is missing: --model_path FLOAT --save_directory OUT --scheme SCHEME, or --check")
    return quantize(options)


def quantize(options: argparse.Namespace) -> Document:
    from executor.checkpoint.writing import check_apart

    source = open_source(options.model_path)
    out = Path(options.save_directory).expanduser()
    check_apart(source.folder, out)
    calibration = None if options.calibration is None else find_path(options.calibration)
    command = vendor_command(options, source, calibration)
    if command is not None:
        return by_vendor(options, command, source, out, calibration)
    from executor.calibrate.run import quantize as run

    device, dtype = open_device(options, source.dtype)
    report = run(source, out, settings_of(options, dtype), calibration, device, verify)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
    print(
        f"{out}: linears: {kinds}; {report.source_bytes / 1e9:.3g} GB became {report.written_bytes / 1e9:.3g} GB in "
        f"{report.seconds:.0f} s; peak memory {report.peak_bytes / 1e9:.2f} GB (bound {report.bound_bytes / 1e9:.2f})"
    )
    return {"save_directory": str(out), "scheme": options.scheme, "tool": "builtin", **asdict(report)}


def settings_of(options: argparse.Namespace, dtype: str, default_smooth: float = 0.5) -> Any:
    """What the words ask for, with the scheme's own choice where they leave one."""
    from executor.calibrate.settings import Settings

    return Settings(
        scheme=options.scheme,
        smooth=DEFAULT_SMOOTH.get(options.scheme, default_smooth) if options.smooth is None else options.smooth,
        percentile=options.percentile,
        rounding=DEFAULT_ROUNDING.get(options.scheme, "nearest") if options.rounding == "auto" else options.rounding,
        keep_float=tuple(options.keep_float),
        quantize=tuple(options.quantize),
        quantize_vision=options.quantize_vision,
        samples=options.samples,
        dtype=dtype,
    )


def vendor_command(options: argparse.Namespace, source: Any, calibration: Path | None) -> str | None:
    """The command of msmodelslim where it is wanted, there and able; None for the built-in calibrator."""
    if options.tool == "builtin":
        return None
    from executor.calibrate.vendor import COMMAND, find_tool, refusal

    command = find_tool()
    reason = refusal(source.config, settings_of(options, "float32"))
    if calibration is None:
        reason = reason or "it wants a calibration set for every scheme"
    if command is None:
        reason = f"the command {COMMAND} is not on the PATH (docs/quantization.md says how to install it)"
    if reason is None:
        return command
    if options.tool == "msmodelslim":
        raise UserError(f"--tool msmodelslim: {reason}; --tool builtin makes it without")
    logger.info("the built-in calibrator, not msmodelslim: %s", reason)
    return None


def by_vendor(options: argparse.Namespace, command: str, source: Any, out: Path, calibration: Path) -> Document:
    from executor.calibrate.vendor import ALPHA, drive
    from executor.device.table import BACKENDS

    device = options.device
    if device == "auto":
        device = "npu" if BACKENDS["npu"].is_installed else "cpu"
    settings = settings_of(options, source.dtype, ALPHA)
    count = drive(command, source.folder, source.config, out, settings, calibration, device)
    verify(out)
    print(f"{out}: {options.scheme}, made by {command} from {count} pictures")
    return {"save_directory": str(out), "scheme": options.scheme, "tool": "msmodelslim", "num_samples": count}


def verify(out: Path) -> None:
    """What --check says of the result. RuntimeError where it does not load: whatever wrote it has a fault."""
    from executor.commands.check_folder import check_folder

    report = check_folder(out)
    for warning in report.warnings:
        logger.warning("%s", warning)
    if report.faults:
        raise RuntimeError(f"{out} is written, but does not load: " + "; ".join(report.faults))


def open_source(model_path: str) -> Any:
    """The float checkpoint. UserError for one that is quantized already, no model of this release, or not whole."""
    from executor.calibrate.run import Source
    from executor.commands.check_folder import check_folder
    from executor.recipe.settle import read_folder
    from models.registry import family_runner, parse_config

    folder = checkpoint_folder(model_path, "float")
    config, quantization, _ = read_folder(folder, model_path)
    if quantization != "none":
        raise UserError(f"--model_path: {model_path} is quantized already ({quantization}); give the float checkpoint")
    report = check_folder(folder, advice=DOWNLOAD)
    if report.faults:
        raise UserError("--model_path: " + "\n".join(report.faults))
    return Source(folder, config, family_runner(config), parse_config(config).dtype)


def open_device(options: argparse.Namespace, model_dtype: str) -> tuple[Any, str]:
    """The backend, and the type that the calibration is computed in: a CPU's is float32 where nothing is said."""
    from executor.device.table import BACKENDS, DeviceSettings

    name = options.device
    if name == "auto":
        name = "npu" if BACKENDS["npu"].is_installed else "cpu"
    backend = BACKENDS[name]
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if name == "cpu" else model_dtype if model_dtype in backend.dtypes else "bfloat16"
    if dtype not in backend.dtypes:
        raise UserError(f"--dtype: {name} computes in {' or '.join(backend.dtypes)}, got {dtype}")
    if not backend.is_installed:
        raise UserError(f"--device: {name} needs {backend.package} beside torch, and it is not installed here; use cpu")
    return backend.open(DeviceSettings(dtype)), dtype


if __name__ == "__main__":
    terminate_as_interrupt()
    sys.exit(run_tool("quantize", work))
