"""ONNX files (https://onnx.ai), as ONNX Runtime runs them: `--to onnx`.

The graph comes from `torch.export` (trace.py), the weights from the artifact: every site's own codes and scales, in the
operators that layers.py lists. The file says its opset, and holds any number of rows; texts may have any length.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from tersor.core.errors import FormatError, InputError, MissingExtra
from tersor.exporters.check import DTYPES
from tersor.exporters.contract import Checkpoint, Misfit, PackedSite, Written
from tersor.exporters.onnx.mark import beside, foreign
from tersor.exporters.rescaled import check_cpu


@dataclass(frozen=True)
class Onnx:
    """An `.onnx` file, with its weights beside it where they exceed 2 GB.

    Attributes:
        dtype: what the graph computes in where nothing is quantized, and keeps other tensors in: `fp32` or `fp16`.
        per_token: give every token of an int8-dynamic input its own scale, as the artifact does; without it, one scale
            serves the whole input, which ONNX Runtime has faster kernels for.
        float_outputs: leave what lies between int8 convolutions float, as in the artifact, where nothing quantizes it;
            without it they are rounded to int8 by their range on calibration data (convolutions.py).
        decode: write weights in formats that ONNX has no operators for as fp16, instead of refusing them.
        cache: give a language model its cache of keys and values as inputs and outputs, where it keeps such a one;
            without it, the graph reads whole texts.
        cpu: where the file shall compute the same: on `any` processor, for which weights that overflow are scaled and
            rounded again (rescaled.py), or on those with `vnni` instructions alone, which takes them as they are.
    """

    dtype: str = "fp32"
    per_token: bool = False
    float_outputs: bool = False
    decode: bool = False
    cache: bool = True
    cpu: str = "any"
    name = "onnx"
    suffix = ".onnx"
    readers = "ONNX Runtime, OpenVINO"
    runtime = "onnx"
    extra = "onnx"
    holds = (
        "integer grids of any bits, by row or group, in any layer; int8 with int8-dynamic or int8-static inputs; "
        "16-bit formats; models that are not quantized"
    )

    def foreign(self, output: Path) -> str | None:
        """A sentence if tersor is not the file's producer, or a file beside it is not the one it names; else None."""
        require()
        return foreign(output)

    def beside(self, output: Path) -> tuple[str, ...]:
        return (beside(output).name,)

    def why_not(self, packed: PackedSite) -> Misfit | None:
        from tersor.exporters.onnx.layers import holds

        return None if self.decode or holds(packed) else Misfit(self.holds, nearby(packed))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises InputError for an unknown dtype or cpu, FormatError where fp16 meets int8 inputs, MissingExtra."""
        check_cpu(self.cpu)
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        quantized = next((p for p in checkpoint.sites if p.activation is not None and not self.decode), None)
        if self.dtype == "fp16" and quantized is not None:
            raise FormatError(
                f"--dtype fp16 needs float inputs; {quantized.site.name} is {quantized.scheme}; leave --dtype out"
            )
        require()

    def write(self, checkpoint: Checkpoint, output: Path, scratch: Path) -> Written:
        """Raises ModelError for what ONNX cannot express, with the layer."""
        from tersor.exporters.onnx.convolutions import float_convolutions, measured, quantize_outputs
        from tersor.exporters.onnx.file import describe, save
        from tersor.exporters.onnx.layers import Lowering, inexact
        from tersor.exporters.onnx.model import TracedModel

        traced = TracedModel.of(checkpoint, DTYPES[self.dtype])
        choice = Lowering(DTYPES[self.dtype], self.per_token)
        lowered = traced.lower(choice)
        save(traced.as_float(choice), scratch / "float.onnx")
        notes = [*traced.notes]
        if rounded := inexact(lowered):
            notes.append(rounded)
        if not self.float_outputs:
            ranges = measured(lowered, checkpoint.need_examples(), scratch)
            num_rounded = quantize_outputs(lowered, ranges)
            if num_rounded:
                rounded = (
                    f"{num_rounded} values between convolutions are int8 too, for speed (--float-outputs leaves them)"
                )
                notes.append(rounded)
        if slow := float_convolutions(lowered):
            notes.append(f"{slow} int8 convolutions run in float: give --data to find the range of their outputs")
        save(lowered, output)
        exact = scratch / "exact.onnx" if rounded else None
        if exact:
            save(traced.lower(replace(choice, per_token=True, accuracy_level=0)), exact)
        if checkpoint.need_examples().cached:
            notes.append(CACHED)
        notes.insert(0, describe(lowered))
        return Written(tuple(notes), scratch / "float.onnx", exact)


CACHED = (
    "a language model with its cache: past_key_values in, present out, which may be the same memory; where it reads "
    "several rows at a time, it goes on one token at a time (--no-cache leaves the cache out)"
)


def require() -> None:
    """Raises MissingExtra where a package that writes or runs ONNX is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtra("onnx", "writing ONNX files") from None


def nearby(packed: PackedSite) -> str:
    """A scheme that ONNX could hold for this layer."""
    inputs = packed.activation.format if packed.activation else ""
    return f"int8/{inputs}" if inputs in ("int8-dynamic", "int8-static") else "int8"
