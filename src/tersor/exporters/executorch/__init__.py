"""ExecuTorch files for phones (https://docs.pytorch.org/executorch): `--to executorch` writes OUT.pte, run by XNNPACK.

The graph comes from `torch.export` (trace.py), the weights from the artifact: every site's own codes and scales, in the
operators that layers.py lists. Nothing is quantized by ExecuTorch's tools, but for what codes.py says.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path

from tersor.exporters.contract import UNMARKED, Checkpoint, Misfit, PackedSite, Written
from tersor.runtimes.executorch import SIGNATURE


@dataclass(frozen=True)
class ExecuTorch:
    """A `.pte` file.

    Attributes:
        decode: write weights in formats that it has no operators for as floats, instead of refusing them.
    """

    decode: bool = False
    name = "executorch"
    suffix = ".pte"
    readers = "ExecuTorch (XNNPACK)"
    runtime = "executorch"
    extra = "executorch"
    holds = (
        "symmetric integers by row in linear layers, int8-static ones in convolutions, any integers in embeddings; "
        "16-bit formats as fp32; models that are not quantized"
    )

    def foreign(self, output: Path) -> str | None:
        """A sentence if the file lacks the list of inputs and outputs that tersor writes into every one; else None."""
        if output.stat().st_size == 0:
            return UNMARKED
        with output.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return None if data.find(SIGNATURE.encode()) >= 0 else UNMARKED

    def beside(self, output: Path) -> tuple[str, ...]:
        return ()

    def why_not(self, packed: PackedSite) -> Misfit | None:
        from tersor.exporters.executorch.layers import holds, nearby

        return None if self.decode or holds(packed) else Misfit(self.holds, nearby(packed))

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MissingExtra if executorch is not installed."""
        from tersor.exporters.executorch.program import lowering
        from tersor.runtimes.executorch import library

        library()
        lowering()

    def write(self, checkpoint: Checkpoint, output: Path, scratch: Path) -> Written:
        """Raises ModelError for what ExecuTorch cannot express, with the layer."""
        from tersor.exporters.executorch.codes import chain_int8
        from tersor.exporters.executorch.images import suit_images
        from tersor.exporters.executorch.layers import Rounding, rounded
        from tersor.exporters.executorch.program import save
        from tersor.exporters.executorch.trace import largest, trace

        model, examples = checkpoint.model.float(), checkpoint.need_examples()
        traced = trace(model, examples, checkpoint.sites, Rounding.KERNELS)
        suit_images(traced)
        num_rounded, num_float = chain_int8(traced, examples)
        placed = save(traced, model, examples, output)
        sizes = ", ".join(f"{axis} up to {size}" for axis, size in largest(model, examples).items())
        notes = [f"ExecuTorch file, {sizes or 'of one size'}", placed.describe()]
        if num_rounded:
            notes.append(f"{num_rounded} results of convolutions and sums are int8 too")
        if num_float:
            notes.append(f"{num_float} int8 convolutions run in float: give --data to find the range of their outputs")
        own = rounded(traced)
        if own:
            notes.append(f"XNNPACK rounds the inputs of {own} linear layers to int8, with a scale per token")
        as_float = output
        if checkpoint.sites:
            as_float = scratch / "float.pte"
            plain = trace(model, examples, checkpoint.sites, Rounding.NONE)
            suit_images(plain)
            save(plain, model, examples, as_float)
        exact = None
        if num_rounded or own:
            exact = scratch / "exact.pte"
            save(trace(model, examples, checkpoint.sites, Rounding.ARTIFACT), model, examples, exact)
        return Written(tuple(notes), as_float, exact)
