"""The doctor's line about the CPU, by what Linux lists of it."""

import pytest

from executor.commands import doctor
from executor.host.cpu import parse_cpuinfo
from tests.doctor import fake

XEON = "model name\t: Intel(R) Xeon(R)\nflags\t\t: sse2 avx2 f16c fma avx512f avx512_bf16 avx512_vnni amx_bf16\n"
RYZEN = "processor\t: 0\nmodel name\t: AMD Ryzen 5\nflags\t\t: sse2 f16c avx2 fma\n"
SKYLAKE = "model name\t: Xeon Gold 61\nflags\t\t: sse2 f16c avx2 fma avx512f avx512bw\n"
ATOM = "model name\t: Atom\nflags\t\t: sse2 ssse3\n"
KUNPENG = "processor\t: 0\nBogoMIPS\t: 200.00\nFeatures\t: fp asimd asimdhp\n"


@pytest.mark.parametrize(
    "text, status, words",
    [
        (
            XEON,
            "ok",
            (
                "Intel(R) Xeon(R): avx2, f16c, avx512f, avx512_bf16, avx512_vnni, amx_bf16;",
                "cpu_isa avx512",
                "int8 in one product",
            ),
        ),
        (RYZEN, "ok", ("AMD Ryzen 5: avx2, f16c;", "computes in float32 (cpu_isa avx2)", "int8 by digits")),
        (SKYLAKE, "ok", ("avx512f;", "cpu_isa avx2")),
        (ATOM, "warning", ("Atom: no vector instructions", "plain products only")),
        (KUNPENG, "note", ("a CPU without a name: asimd, asimdhp;", "tries")),
        ("", "unknown", ("asks torch",)),
    ],
    ids=["xeon", "ryzen", "skylake", "atom", "kunpeng", "nothing"],
)
def test_the_cpu_is_named_with_what_the_cpu_device_makes_of_it(text, status, words):
    machine = fake.laptop()
    machine.files["/proc/cpuinfo"] = text
    (row,) = [row for row in doctor.examine(machine, fake.ROOT)["findings"] if row["id"] == "cpu"]
    assert row["status"] == status
    assert all(word in row["found"] for word in words), row["found"]


def test_only_the_first_processor_counts():
    assert parse_cpuinfo(XEON + "\n" + RYZEN).name == "Intel(R) Xeon(R)"
    assert parse_cpuinfo("model name : x\n") is None
