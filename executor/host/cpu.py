"""The CPU's name and instructions, as /proc/cpuinfo lists them. Standard library only, like all the doctor needs.

What torch makes of them is asked by executor/device/cpu/capability.py, with calls that are tried.
"""

from __future__ import annotations

from dataclasses import dataclass

_BFLOAT16 = ("avx512_bf16", "amx_bf16")
_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")


@dataclass(frozen=True)
class CpuInfo:
    """`flags` as Linux names them: on x86 its "flags", on ARM its "Features"."""

    name: str
    flags: frozenset[str]

    @property
    def is_x86(self) -> bool:
        return "sse2" in self.flags

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the cpu device takes its avx512 path here."""
        return any(flag in self.flags for flag in _BFLOAT16)

    @property
    def sums_int8_in_32_bits(self) -> bool:
        """Whether products of int8 pairs are added without saturation, so that libraries' int8 products are exact."""
        return any(flag in self.flags for flag in _INT8)

    @property
    def vectors(self) -> str:
        """The vector instructions that matter, for people."""
        names = ("avx2", "f16c", "avx512f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_bf16", "amx_int8")
        arm = ("asimd", "asimdhp", "bf16", "i8mm", "sve")
        return ", ".join(name for name in (names if self.is_x86 else arm) if name in self.flags)


def parse_cpuinfo(text: str) -> CpuInfo | None:
    """The first processor of /proc/cpuinfo; None where it lists no instructions."""
    name, flags = "", frozenset()
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not name:
            name = value
        elif key in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return CpuInfo(name or "a CPU without a name", flags) if flags else None
