"""The promise of every transform, tried on data: the model computes the same after it as before."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tersor.core.errors import ModelError

Tensors = dict[nn.Module, tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]
NAMED = 3  # of the layers that a transform rewrote, how many a message names


def apply_unchanged(model: nn.Module, name: str, apply: Callable[[], None], outputs: Callable[[], Tensor]) -> None:
    """Apply a transform, and take it back if `outputs` differ after it by more than rounding in their type can explain.

    Half the digits of the model's type are room enough for rounding in every layer, and far from what a factor on the
    wrong axis does.

    Raises ModelError with the layers that were rewritten; the model is as it was then.
    """
    before, kept = outputs(), tensors_of(model)
    apply()
    after, room = outputs(), room_of(model, before)
    error = distance(before, after)
    if error <= room or not before.isfinite().all():
        return
    rewritten = tensors_of(model)
    put_back(kept)
    if not distance(before, outputs()) <= room:  # it gives something else every time
        put_back(rewritten)
        return
    paths = [path for path, module in model.named_modules() if changed(kept[module], rewritten[module])]
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    raise ModelError(
        f"{name}: changes what {type(model).__name__} computes by {error:.2%} on calibration inputs, where rounding is "
        f"below {room:.2%}; it rewrote {', '.join(paths[:NAMED])}{more}, and was taken back: leave {name} out"
    )


def room_of(model: nn.Module, output: Tensor) -> float:
    """The largest difference that rounding explains: the root of the precision of the least precise type there is."""
    types = {p.dtype for p in (*model.parameters(), *model.buffers(), output) if p.is_floating_point()}
    return float(max((torch.finfo(dtype).eps for dtype in types if dtype.itemsize > 1), default=1e-7) ** 0.5)


def distance(before: Tensor, after: Tensor) -> float:
    """The size of the difference, relative to what it was before."""
    wide, other = before.double(), after.double()
    return ((other - wide).norm() / wide.norm().clamp_min(1e-300)).item()


def tensors_of(model: nn.Module) -> Tensors:
    """The parameters and buffers of every module; transforms replace them and never write to them."""
    return {module: (dict(module._parameters), dict(module._buffers)) for module in model.modules()}


def put_back(tensors: Tensors) -> None:
    """Give every module the parameters and buffers it had."""
    for module, (parameters, buffers) in tensors.items():
        module._parameters.clear()
        module._parameters.update(parameters)  # type: ignore[arg-type]
        module._buffers.clear()
        module._buffers.update(buffers)


def changed(before: tuple[dict[str, Tensor | None], ...], after: tuple[dict[str, Tensor | None], ...]) -> bool:
    """True if any parameter or buffer has been replaced by another."""
    return any(
        one.get(name) is not tensor for one, other in zip(before, after, strict=True) for name, tensor in other.items()
    )
