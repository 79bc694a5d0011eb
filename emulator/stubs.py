"""CANN's libraries as stubs, so that the real torch_npu wheel can be imported where no NPU and no CANN is.

The wheel lives in a cache folder of its own, never in the environment: beside a torch without CANN it would break
plain `import torch` (its backend entry point) and everything that probes for it. `find_wheel` and `install_wheel`
give that folder, `build` reads the undefined symbols of its libraries and compiles one stub that defines them,
with a thin library per soname that the wheel asks for; `load` puts them into this process. Knows no op.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from executor.errors import UserError
from executor.host.env import REPO_ROOT

logger = logging.getLogger(__name__)

WHEEL_VERSION = "2.13.0"
# torchair needs these three; they go beside the wheel where the environment lacks them.
_PYTHON_NEEDS = {"google.protobuf": "protobuf", "packaging": "packaging", "sympy": "sympy"}
_SONAMES = (
    "libhccl.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libascend_protobuf.so",
    "libfmk_parser.so",
    "libatb.so",
    "libmsprofiler.so",
    "libascend_hal.so",
)
# Looked up by name at run time (dlsym), so they stand in the wheel as strings and not as undefined symbols.
_RUNTIME_NAMES = re.compile(rb"(?<![A-Za-z0-9_])(?:acl(?!nn)[A-Za-z]\w*|Hccl[A-Za-z]\w*|Hcom\w*|hal[A-Z]\w*)(?=\x00)")
_C_NAME = re.compile(r"^[A-Za-z_]\w*$")
_TEMPLATE = Path(__file__).with_name("stub.c.in")


@dataclass(frozen=True)
class Wheel:
    """An unpacked torch_npu wheel: the folder that goes on `sys.path`, and the wheel's version."""

    folder: Path
    version: str

    @property
    def libraries(self) -> list[Path]:
        return sorted((self.folder / "torch_npu").rglob("*.so"))


def cache_folder() -> Path:
    """Where the wheel and the stubs are kept: `.cache` in the repository, which version control ignores."""
    return REPO_ROOT / ".cache"


def find_wheel(folder: Path | None = None) -> Wheel | None:
    """The wheel in `folder` (default: the cache), or None."""
    folder = folder or cache_folder() / "torch_npu"
    found = sorted(folder.glob("torch_npu-*.dist-info"))
    if not found or not (folder / "torch_npu" / "lib" / "libtorch_npu.so").exists():
        return None
    return Wheel(folder, found[0].name.removeprefix("torch_npu-").removesuffix(".dist-info"))


def install_command(folder: Path | None = None) -> list[str]:
    """pip's arguments that put the wheel into the cache folder."""
    folder = folder or cache_folder() / "torch_npu"
    missing = [package for module, package in _PYTHON_NEEDS.items() if not _importable(module)]
    return ["install", "--no-deps", "--target", str(folder), f"torch_npu=={WHEEL_VERSION}", *missing]


def install_wheel(folder: Path | None = None) -> Wheel:
    """Fetch the wheel with pip into the cache folder. UserError where pip cannot."""
    command = install_command(folder)
    logger.info("fetching the torch_npu wheel (40 MB) for the emulator: pip %s", " ".join(command))
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    wheel = find_wheel(folder)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel appeared").splitlines()[-1]
        raise UserError(
            f"the emulator needs the torch_npu {WHEEL_VERSION} wheel and pip could not fetch it: {reason}. "
            f"Run `pip {' '.join(command)}` where the package index can be reached, or use device: cpu."
        )
    return wheel


def require_wheel(install: bool = False) -> Wheel:
    """The cached wheel; with `install` fetched when it is not there. UserError says what to do otherwise."""
    wheel = find_wheel()
    if wheel is None:
        if not install:
            raise UserError(
                f"device npu_emulated needs the torch_npu {WHEEL_VERSION} wheel in {cache_folder() / 'torch_npu'}, and "
                f"it is not there. Fetch it (40 MB, outside the environment): `pip {' '.join(install_command())}`."
            )
        wheel = install_wheel()
    _check_torch(wheel)
    # torch would otherwise load the backend in any process that has the folder on its path.
    (wheel.folder / f"torch_npu-{wheel.version}.dist-info" / "entry_points.txt").unlink(missing_ok=True)
    return wheel


def build(wheel: Wheel) -> Path:
    """The folder with the stub libraries for `wheel`, compiled on first use (seconds), then cached."""
    key = hashlib.sha256(_TEMPLATE.read_bytes() + wheel.version.encode() + " ".join(_SONAMES).encode()).hexdigest()[:12]
    target = cache_folder() / "cann_stubs" / f"{wheel.version}-{key}"
    if target.exists():
        return target
    gcc, nm = _tool("gcc"), _tool("nm")
    names = _missing_symbols(wheel, nm)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        work = Path(scratch) / "stubs"
        work.mkdir()
        (work / "stub.c").write_text(_source(names))
        _compile(gcc, ["-O1", "-w", "-Wl,-soname,libcann_stub.so", "-o", "libcann_stub.so", "stub.c"], work)
        for soname in _SONAMES:
            link = [f"-Wl,-soname,{soname}", "-Wl,--no-as-needed", "-L.", "-lcann_stub", "-Wl,-rpath,$ORIGIN"]
            _compile(gcc, ["-o", soname, "-x", "c", "/dev/null", *link], work)
        with contextlib.suppress(OSError):  # another process may have been faster; its result is as good as ours
            work.rename(target)
    if not target.exists():
        raise RuntimeError(f"the emulator's stubs could not be moved to {target}")
    logger.info("built stubs for %d CANN functions in %s", len(names), target)
    return target


def load(stubs: Path) -> ctypes.CDLL:
    """Load the stubs for all later libraries of this process to find; gives the one that knows the chip's name."""
    core = ctypes.CDLL(str(stubs / "libcann_stub.so"), mode=ctypes.RTLD_GLOBAL)
    for soname in _SONAMES:
        ctypes.CDLL(str(stubs / soname), mode=ctypes.RTLD_GLOBAL)
    return core


def _check_torch(wheel: Wheel) -> None:
    import torch

    want, have = wheel.version.split(".")[:2], torch.__version__.split(".")[:2]
    if want != have:
        raise UserError(
            f"the emulator's torch_npu {wheel.version} needs torch {'.'.join(want)}, this environment has "
            f"{torch.__version__}. Install torch {'.'.join(want)}, or run on device: cpu."
        )


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise UserError(
            f"the emulator builds its stub libraries with gcc and nm, and {name} is not on this machine. Install gcc "
            "and binutils (Debian/Ubuntu: apt-get install gcc binutils; openEuler: yum install gcc binutils)."
        )
    return path


def _compile(gcc: str, arguments: list[str], work: Path) -> None:
    done = subprocess.run([gcc, "-shared", "-fPIC", *arguments], cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gcc could not build the emulator's stubs: {done.stderr.strip()[:2000]}")


def _missing_symbols(wheel: Wheel, nm: str) -> list[str]:
    """What the wheel's libraries want and nobody else in this process defines."""
    wanted, defined = set(), set()
    for library in wheel.libraries:
        wanted |= set(_nm(nm, library, "--undefined-only"))
        defined |= set(_nm(nm, library, "--defined-only"))
    core = wheel.folder / "torch_npu" / "lib" / "libtorch_npu.so"
    wanted |= {name.decode() for name in _RUNTIME_NAMES.findall(core.read_bytes())}
    elsewhere = _libraries_of_torch()
    return sorted(n for n in wanted - defined if _C_NAME.match(n) and not any(_has(lib, n) for lib in elsewhere))


def _nm(nm: str, library: Path, which: str) -> list[str]:
    """Dynamic symbols without a version: versioned ones belong to libc and the C++ runtime."""
    text = subprocess.run([nm, "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return [fields[-1] for fields in map(str.split, text.splitlines()) if fields and "@" not in fields[-1]]


def _libraries_of_torch() -> list[ctypes.CDLL]:
    """This program, and torch's libraries with all they depend on (a lookup searches the dependencies too)."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    system = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1")
    found = [ctypes.CDLL(None), ctypes.CDLL(str(folder / "libtorch_python.so"))]
    for name in system:
        with contextlib.suppress(OSError):  # newer C libraries have all of it in one
            found.append(ctypes.CDLL(name))
    return found


def _has(library: ctypes.CDLL, name: str) -> bool:
    try:
        library[name]
    except AttributeError:
        return False
    return True


def _source(names: list[str]) -> str:
    template = _TEMPLATE.read_text()
    written = set(re.findall(r"^(?:int|size_t|void|const char \*) ?\*?(\w+)\(", template, re.MULTILINE))
    rest = (f"long {name}() {{ return 0; }}" for name in names if name not in written)
    return template + "\n".join(rest) + "\n"
