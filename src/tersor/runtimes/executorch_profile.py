"""ExecuTorch's own profile (ETDump, https://docs.pytorch.org/executorch): the time of every operator, inside XNNPACK
and outside it."""

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from tersor.runtimes.contract import LayerTime, Profile

PRODUCTS = ("Convolution", "Deconvolution", "Fully Connected", "Batch Matrix Multiply")  # XNNPACK's names begin so
OUTSIDE = "native_call_"  # begins the name of an operator of ExecuTorch's own
PRODUCTS_OUTSIDE = ("mm", "addmm", "bmm", "linear", "convolution")
INTEGERS = ("QC8", "QS8", "QD8", "QDU8", "QP8")  # types in XNNPACK's names


def read_profile(events: Iterable[Any], walls: list[float], num_warm: int, busy: float) -> Profile:
    """The layers in the order they ran, without the first `num_warm` runs. XNNPACK counts whole microseconds, so means
    over the runs are taken.

    Args:
        events: events of the runs, as executorch.devtools.Inspector gives them.
        walls: seconds of each run.
        busy: the share of the time in which the process ran, and did not wait for other work of the machine.
    """
    layers, part = [], 1
    for event in events:
        seconds = fmean(event.perf_data.raw[num_warm:]) * 1e-3 * busy
        if event.name == "DELEGATE_CALL":
            part += 1
        elif event.is_delegated_op:
            layers.append(inside(f"part {part}, {event.name}", event.name, seconds))
        elif event.name.startswith(OUTSIDE):
            layers.append(outside(f"{len(layers)}, {event.name}", event.name.removeprefix(OUTSIDE), seconds))
    return Profile(tuple(layers), median(walls[num_warm:]), len(layers))


def inside(name: str, event: str, seconds: float) -> LayerTime:
    """The time of an XNNPACK operator, whose event reads `Convolution (NHWC, QC8) IGEMM #1`."""
    kernel = event.rsplit(" #", 1)[0]
    kind = kernel.split(" (")[0]
    if kind == "Convert":
        return LayerTime(name, kind, "quantize", seconds, kernel)
    if not kernel.startswith(PRODUCTS):
        return LayerTime(name, kind, "other", seconds, kernel)
    is_int8 = any(each in kernel for each in INTEGERS)
    precision = "int8" if is_int8 else "fp16" if "F16" in kernel else "fp32"
    weights = "" if kind.startswith("Batch") else "packed" if is_int8 else "float"
    return LayerTime(name, kind, "product", seconds, kernel, precision, weights)


def outside(name: str, operator: str, seconds: float) -> LayerTime:
    """The time of one of ExecuTorch's own operators, such as `embedding.out`."""
    kind = operator.split(".")[0]
    if kind in PRODUCTS_OUTSIDE:
        return LayerTime(name, kind, "product", seconds, operator, "fp32", "float")
    return LayerTime(name, kind, "other", seconds, operator)
