"""The stand-in of CANN's compressor as an executable, for tests that compress."""

import sys
from pathlib import Path

from executor.quant.compressor import NAME


def stand_in(folder: Path) -> Path:
    """An executable in `folder`, started without site-packages: dozens of weights are compressed one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    source = Path(__file__).with_name("stand_in_compressor.py").read_text()
    path.write_text(f"#!{Path(sys.executable).resolve()} -IS\n{source}")
    path.chmod(0o700)
    return path
