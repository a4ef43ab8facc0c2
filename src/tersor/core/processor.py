"""The processor: its name, and the instructions that decide how fast models run on it.

Names are the same on all systems, whatever each of them calls these instructions:

    avx2, fma       eight float products at once (x86)
    avx512          sixteen
    vnni            sums of four products of bytes (x86; AVX-512 or not)
    amx             products of whole tiles of bytes
    neon            four float products at once (ARM)
    dotprod, i8mm   sums of four products of bytes, products of small tiles of them (ARM)
    bf16, fp16      products of bfloat16, of float16; without them a model in such a type runs several times slower than
                    in float32
"""

import platform
import subprocess
from functools import cache

import torch
from llvmlite import binding

KNOWN = {  # by name, what LLVM, Linux and macOS call it
    "avx2": {"avx2"},
    "fma": {"fma"},
    "avx512": {"avx512f"},
    "vnni": {"avx512vnni", "avxvnni", "avxvnniint8"},
    "amx": {"amx-int8"},
    "neon": {"neon", "asimd"},
    "dotprod": {"dotprod", "asimddp", "FEAT_DotProd"},
    "i8mm": {"i8mm", "FEAT_I8MM"},
    "bf16": {"avx512bf16", "amx-bf16", "bf16", "FEAT_BF16"},
    "fp16": {"avx512fp16", "amx-fp16", "fullfp16", "asimdhp", "FEAT_FP16"},
}
BYTE_PRODUCTS = {"vnni", "amx", "dotprod", "i8mm"}  # any of them makes int8 faster than float
FOR_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@cache
def instruction_sets() -> tuple[str, ...]:
    """The names, of those above, of what this processor has."""
    found = features()
    return tuple(name for name, words in KNOWN.items() if words & found)


def features() -> set[str]:
    """The names that LLVM gives to this processor's instructions, and the system's own names on ARM."""
    try:
        found = {name for name, there in binding.get_host_cpu_features().items() if there}
    except RuntimeError:  # not known for this processor
        found = set()
    if platform.machine().lower() in ("arm64", "aarch64"):
        found |= {"neon"} | (features_of_macos() if platform.system() == "Darwin" else features_of_linux())
    return found


def features_of_linux() -> set[str]:
    """The first `Features` line of /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(next(line.partition(":")[2] for line in file if line.startswith("Features")).split())
    except (OSError, StopIteration):
        return set()


def features_of_macos() -> set[str]:
    """The switches of `sysctl hw.optional.arm` that are on; empty where it does not tell."""
    try:
        done = subprocess.run(["sysctl", "hw.optional.arm"], capture_output=True, text=True, check=False)
    except OSError:
        return set()
    pairs = (line.rpartition(":") for line in done.stdout.splitlines())
    return {name.rpartition(".")[2] for name, _, value in pairs if value.strip() == "1"}


def computes(dtype: torch.dtype) -> bool:
    """True if this processor multiplies numbers of this type as fast as float32, or faster."""
    return dtype not in FOR_TYPE or FOR_TYPE[dtype] in instruction_sets()


def multiplies_bytes() -> bool:
    """True if int8 products can be several times as fast as float32 here."""
    return not BYTE_PRODUCTS.isdisjoint(instruction_sets())


def times_float(precision: str) -> float:
    """Products of a precision per float32 product in one instruction of this processor: a bound on the speedup.

    AMX tiles are not counted, since their speed has to be measured.
    """
    found = set(instruction_sets())
    if precision == "int8":
        if "i8mm" in found:
            return 8.0
        return 4.0 if found & {"vnni", "dotprod"} else 2.0 if found & {"avx2", "neon"} else 1.0
    if precision in ("bf16", "fp16"):
        return 2.0 if precision in found else 1.0
    return 1.0


def byte_products() -> str:
    """A sentence on how fast int8 products can be on this processor."""
    found = ", ".join(instruction_sets()) or "none that are known"
    if multiplies_bytes():
        return f"this processor has instructions for int8 products ({found})"
    return (
        f"this processor has no instructions for int8 products ({found}): int8 layers can be about "
        f"{times_float('int8'):g} times as fast as float ones here at best, and 4 times where there is VNNI (Intel "
        f"since 2019, AMD since Zen 4) or ARM's dot product"
    )


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
