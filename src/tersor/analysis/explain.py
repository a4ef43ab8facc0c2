"""Explains speed: the time of each kind of work, the bound of each layer, and the most that a change could gain.

Measured times are the runtime's own; bounds are the roofline's (roofline.py). What a change could give at most is
Amdahl's law on the measured share (Amdahl 1967, https://doi.org/10.1145/1465482.1465560): a part that takes a share `p`
of the time and becomes `s` times faster makes the whole `1 / (1 - p + p / s)` times faster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tersor.analysis.roofline import Bound, Peaks, bound_of
from tersor.runtimes.contract import LayerTime, Profile, Session

SECONDS = 2.0  # of profiling, about
KINDS = {  # in the order they are shown
    "int8 products": "matrix products of int8 inputs and weights",
    "float products, packed weights": "packed weights multiplied with float inputs",
    "layers left in float": "float inputs and float weights",
    "products without weights": "attention, and products of two inputs",
    "decode": "packed weights made float",
    "quantize": "inputs made integers, and sums made float",
    "other layers": "norms, activations, sums, copies",
    "between layers": "starting operators: the run's time beyond its layers",
}
ELSEWHERE = {  # where else a model may run, by where it runs now
    "torch": "a runtime that compiles the whole graph (tersor export --to onnx or openvino)",
    "onnx": "OpenVINO, which fuses other things (tersor bench FILE FILE --runtime onnx --runtime openvino)",
    "openvino": "ONNX Runtime, which fuses other things (tersor bench FILE FILE --runtime openvino --runtime onnx)",
}
INSTEAD = {  # of decoding at every call
    "torch": "int8-dynamic or int8-static instead of a weight-only format",
    "onnx": "ONNX Runtime has kernels that do not for unsigned inputs and for MatMulNBits (tersor exports both)",
}
ABOVE = 1.03  # a change that could give less is not worth a line
MOST = 2  # changes that are named


@dataclass(frozen=True)
class Layer:
    """A layer as it was measured, and its roofline; `bound` is None where it has no products."""

    time: LayerTime
    kind: str
    bound: Bound | None


@dataclass(frozen=True)
class Advice:
    """A change, the share of the run it is about, and what it could give at most: a factor on the whole run."""

    change: str
    share: float
    at_most: float


@dataclass(frozen=True)
class Explanation:
    """The time of one run by layers and kinds of work.

    Attributes:
        seconds: time of a run; on one thread, CPU time.
        kinds: seconds by kind of work (`KINDS`), which add up to the run.
        num_calls: operators started in a run.
        working_set: bytes that a run goes through: weights as stored, inputs and outputs of products.
        advice: sentences, the most promising first.
    """

    seconds: float
    kinds: dict[str, float]
    layers: tuple[Layer, ...]
    num_calls: int
    working_set: int
    advice: tuple[Advice, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(
    session: Session,
    feeds: Mapping[str, np.ndarray],
    peaks: Peaks,
    *,
    runtime: str = "torch",
    seconds: float = SECONDS,
) -> Explanation:
    """Profile a session of `runtime` for about `seconds` and say where its time goes."""
    once = session.profile(feeds, 1).seconds
    return account(session.profile(feeds, int(min(200, max(5, seconds / max(once, 1e-6))))), peaks, runtime)


def account(profile: Profile, peaks: Peaks, runtime: str = "torch") -> Explanation:
    """A profile as an explanation; `runtime` is the one it is from, for the advice."""
    working_set = sum(layer.num_bytes for layer in profile.layers if layer.part == "product")
    layers = []
    kinds = dict.fromkeys(KINDS, 0.0)
    for time in profile.layers:
        bound = None
        if time.part == "product" and time.macs:
            bound = bound_of(time.macs, time.num_bytes, time.precision, working_set, peaks)
        layers.append(Layer(time, kind_of(time), bound))
        kinds[kind_of(time)] += time.seconds
    kinds["between layers"] = max(0.0, profile.seconds - sum(kinds.values()))
    whole = sum(kinds.values())
    return Explanation(
        whole, kinds, tuple(layers), profile.num_calls, working_set, advice(kinds, layers, peaks, runtime)
    )


def kind_of(time: LayerTime) -> str:
    """The kind of work, a key of `KINDS`."""
    if time.part != "product":
        return {"decode": "decode", "quantize": "quantize"}.get(time.part, "other layers")
    if time.precision == "int8":
        return "int8 products"
    if not time.weights:
        return "products without weights"
    return "float products, packed weights" if time.weights == "packed" else "layers left in float"


def advice(
    kinds: Mapping[str, float], layers: Sequence[Layer], peaks: Peaks, runtime: str = "torch"
) -> tuple[Advice, ...]:
    """The changes most likely to help, each with what it could give at most."""
    whole = sum(kinds.values())
    int8 = [layer for layer in layers if layer.kind == "int8 products"]
    signed = [layer for layer in int8 if layer.time.kernel.endswith(" int8 x int8")]
    in_float = [layer for layer in layers if layer.kind == "float products, packed weights"]
    elsewhere = ELSEWHERE.get(runtime, ELSEWHERE["openvino"])
    left = [layer for layer in layers if layer.kind == "layers left in float"]
    found = [
        Advice(
            f"do not decode packed weights at every call: {INSTEAD.get(runtime, INSTEAD['torch'])}, or {elsewhere}",
            *gain(kinds["decode"], 0.0, whole),
        ),
        Advice(
            f"spend less on quantizing inputs: static scales (int8-static), or {elsewhere}",
            *gain(kinds["quantize"], 0.0, whole),
        ),
        Advice(
            f"start fewer operators: a larger batch, or {elsewhere}",
            *gain(kinds["between layers"], 0.0, whole),
        ),
        Advice(
            f"quantize the layers left in float, first {most(left)}",
            *gain(kinds["layers left in float"], in_int8(left, peaks), whole),
        ),
        Advice(
            "multiply in int8: the weights are packed, and their products run in float; int8-dynamic or int8-static "
            f"where the inputs are float, else {elsewhere}",
            *gain(kinds["float products, packed weights"], in_int8(in_float, peaks), whole),
        ),
        Advice(
            "take unsigned inputs: the kernels for signed ones are slow here (tersor exports uint8 inputs)",
            *gain(sum(layer.time.seconds for layer in signed), at_bound(signed), whole),
        ),
        Advice(
            f"fuse norms, activations and copies, which no quantization makes faster: {elsewhere}",
            *gain(kinds["other layers"], 0.0, whole),
        ),
        Advice(
            "a faster kernel for the int8 products: they run below this machine's roofline",
            *gain(0.0 if signed else kinds["int8 products"], at_bound(int8), whole),
        ),
    ]
    return tuple(sorted((a for a in found if a.at_most >= ABOVE), key=lambda a: -a.at_most)[:MOST])


def gain(seconds: float, instead: float, whole: float) -> tuple[float, float]:
    """The share of a part, and Amdahl's limit if it took `instead`.

    >>> gain(6.0, 1.0, 10.0)
    (0.6, 2.0)
    """
    return (seconds / whole, whole / (whole - max(0.0, seconds - instead))) if whole else (0.0, 1.0)


def in_int8(layers: Sequence[Layer], peaks: Peaks) -> float:
    """Seconds that layers would take if int8 made each as much faster as the peaks allow."""
    ratio = {layer.time.precision: peaks.peak_of(layer.time.precision) / peaks.peak_of("int8") for layer in layers}
    return sum(layer.time.seconds * min(1.0, ratio[layer.time.precision]) for layer in layers)


def at_bound(layers: Sequence[Layer]) -> float:
    """Seconds of layers that ran as fast as their roofline allows; those without one stay as they are."""
    return sum(min(each.time.seconds, each.bound.seconds) if each.bound else each.time.seconds for each in layers)


def most(layers: Sequence[Layer], num: int = 3) -> str:
    """The names of the slowest."""
    slowest = sorted(layers, key=lambda layer: -layer.time.seconds)
    return ", ".join(layer.time.name for layer in slowest[:num]) + (" ..." if len(layers) > num else "")


def growth(other: Explanation, found: Explanation) -> list[tuple[str, float]]:
    """Seconds that each kind of work has in `found` beyond those in `other`, the largest growth first. All products
    with weights are one kind here: that they moved from one to another is the purpose."""
    grown = {
        kind: found.kinds[kind] - other.kinds[kind]
        for kind in KINDS
        if kind not in ("int8 products", "float products, packed weights", "layers left in float")
    }
    grown["products with weights"] = with_weights(found) - with_weights(other)
    return sorted(grown.items(), key=lambda each: -each[1])


def with_weights(found: Explanation) -> float:
    """Seconds of all products that have weights."""
    return sum(
        found.kinds[kind] for kind in ("int8 products", "float products, packed weights", "layers left in float")
    )
