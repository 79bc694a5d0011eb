"""Turn this process into an emulating one: the real torch_npu and torchair over stub libraries, ops on CPU tensors.

Never imported by anything that runs on a chip. A process that has activated stays so; the chip can be switched.
"""

import atexit
import contextlib
import ctypes
import io
import logging
import signal
import sys
import threading

from emulator import chips, graph, registry, stubs
from emulator.chips import Chip
from emulator.garbage import without_collection
from executor.host.env import set_always

logger = logging.getLogger(__name__)
_core: ctypes.CDLL | None = None


def activate(soc: str, install: bool = False) -> Chip:
    """Emulate the chip `soc` in this process; a second call switches the chip.

    The first call builds the stubs when they are not cached, imports torch_npu and torchair and registers the
    kernels. `install` lets it fetch the wheel with pip. Errors: UserError where the wheel, gcc or the fitting torch
    is missing, or where a real torch_npu is already loaded.
    """
    global _core
    chip = chips.chip_of(soc)
    if _core is None:
        wheel = stubs.require_wheel(install)
        _core = stubs.load(stubs.build(wheel))
        _core.emulator_set_soc(chip.acl_name.encode())
        # No queue of launches to a chip: the thread that empties it polls, a fifth of a core for as long as it lives.
        set_always({"TASK_QUEUE_ENABLE": "0"})
        _import(str(wheel.folder))
        chips.use(chip)
        registry.register()
        graph.install()
        logger.info("emulating %s with torch_npu %s on CPU tensors", chip, wheel.version)
    _core.emulator_set_soc(chip.acl_name.encode())
    chips.use(chip)
    return chip


def active() -> bool:
    """Whether this process emulates a chip."""
    return _core is not None


def available() -> str:
    """Empty where `activate` can work without a download, else the reason why it cannot."""
    try:
        stubs.build(stubs.require_wheel())
    except ValueError as error:
        return str(error)
    return ""


def _import(folder: str) -> None:
    if "torch_npu" in sys.modules:
        raise RuntimeError("torch_npu is already loaded in this process: emulate in a process of its own")
    # At the end of the path: what the environment has is preferred, the folder only adds.
    sys.path.append(folder)
    said = io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # It prints warnings about CANN's missing variables to stdout, and makes so many objects that looking for garbage
    # among them takes a third of the time.
    with contextlib.redirect_stdout(said), without_collection():
        import torch_npu  # noqa: F401

        # torchair defines its forms with lengths as tensors only when these are imported.
        import torchair.ops._npu_fused_infer_attention_score
        import torchair.ops._npu_fused_infer_attention_score_v2  # noqa: F401
        from torchair.core._backend import finalize_graph_engine
    # torchair's handlers would swallow the first SIGTERM, and its exit hook would close an engine that never ran.
    atexit.unregister(finalize_graph_engine)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
    logging.getLogger("torch_npu").setLevel(logging.WARNING)  # it reports every variable that it reads
    for line in said.getvalue().splitlines():
        logger.debug("torch_npu: %s", line)
