"""Modules that run on packed weights and stay the modules that they were.

The module itself is kept: its hooks, the attributes on it, a `forward` of its own, its place in the model and whoever
else holds it. Only its class changes, to a subclass of the old one (so that `isinstance` holds) in which the packed
parameters are properties that decode. A module's own forward decodes each of them once; read from elsewhere (by a
parent, by iterating over a ParameterList, by a hook) they are decoded for that read, as a `DecodedWeight`, which
refuses to be written to: what is written to a decoded copy would be lost.
"""

import copyreg
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from tersor.core.errors import FormatError

DECODED = "_decoded"  # what a module's forward has decoded so far, while it runs
RUNNING = threading.local()  # how many forwards of packed modules this thread is in: PyTorch's fused ones want tensors
HARMLESS = {"requires_grad_", "retain_grad", "share_memory_", "detach_", "rename_"}  # of the names that end with "_"


class DecodedWeight(Tensor):
    """A packed weight as a float tensor, to be read. It counts as a parameter, so that code which looks for one finds
    it; what is computed with it is a plain tensor, and its views cannot be written to either."""

    packed: Any
    _is_param = True

    @staticmethod
    def of(weight: Tensor, packed: Any) -> "DecodedWeight":
        """A decoded weight, with what it was decoded from."""
        decoded = weight.as_subclass(DecodedWeight)
        decoded.packed = packed
        return decoded

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        written = kwargs.get("out") if "out" in kwargs else next(iter((*args, *kwargs.values())), None)
        if isinstance(written, DecodedWeight) and (writes(func) or "out" in kwargs or kwargs.get("inplace")):
            refuse_writing(written.packed)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            return views_of(written, result) if isinstance(written, DecodedWeight) else result

    def plain(self) -> Tensor:
        """A copy as an ordinary tensor, which can be written to."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().as_subclass(Tensor).clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)


def writes(func: Any) -> bool:
    """True if a function of PyTorch changes its first argument."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(getattr(func, "__self__", None), "__name__", "") == "data"
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in ("__int__", "__index__", "__invert__", "__iter__")
    return (in_place or operator or name in ("__setitem__", "set_")) and name not in HARMLESS


def views_of(decoded: DecodedWeight, result: Any) -> Any:
    """The result of an operation on a decoded weight; what shares its memory is a decoded weight as well."""
    if isinstance(result, tuple | list) and type(result) in (tuple, list):
        return type(result)(views_of(decoded, each) for each in result)
    if type(result) is Tensor and result.layout is torch.strided:
        same = result.untyped_storage()._cdata == decoded.untyped_storage()._cdata
        return DecodedWeight.of(result, decoded.packed) if same else result
    return result


def refuse_writing(packed: Any) -> NoReturn:
    """Raise FormatError: a packed weight is not changed by writing to what it decodes to."""
    raise FormatError(
        f"a weight packed as {packed.format.name} cannot be written to: it is decoded whenever it is read, so that the "
        f"change would be lost; change a clone() of it, or the float model before it is compressed (load: packed=False)"
    )


class Packed(nn.Module):
    """Mixed into the class of every module that runs on packed weights.

    Attributes:
        children_of: the packed parameters, each with the name of the child that it is decoded from.
        turned_from: the module's own class.
        kind: which of the classes that are mixed in.
    """

    children_of: ClassVar[dict[str, str]] = {}
    turned_from: ClassVar[type[nn.Module]]
    kind: ClassVar[type["Packed"]]

    def __setattr__(self, name: str, value: Any) -> None:
        child = self.children_of.get(name)
        if child is None:
            super().__setattr__(name, value)
        elif isinstance(value, DecodedWeight):  # tied from now on, as a shared parameter would be
            self._modules[child] = value.packed
        else:
            refuse_writing(self._modules[child])

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        made, arguments, *state = reduced
        if made is copyreg.__newobj__ and arguments == (type(self),):  # type: ignore[attr-defined]
            return new_packed, (self.kind, self.turned_from, tuple(self.children_of.items())), *state
        return made, arguments, *state


class PackedModule(Packed):
    """A module of any class: its own forward runs, on weights that are decoded once for it."""


class FlatWeights(nn.Module):
    """The list that an LSTM, a GRU or an RNN keeps beside its weights, decoded when it is read."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """The list is made anew whenever it is read."""

    def flatten_parameters(self) -> None:
        """Packed weights have no memory in which they could lie one after another."""

    def _init_flat_weights(self) -> None:
        pass

    def _update_flat_weights(self) -> None:
        pass


def turn(module: nn.Module, kind: type[Packed], children: Mapping[str, str]) -> None:
    """Make a module one of class `kind` and of its own class, whose parameters are decoded from these children."""
    for name in children:
        module._parameters.pop(name, None)
        module.__dict__.pop(name, None)
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)
        module.__dict__["_flat_weight_refs"] = []
    module.__class__ = packed_class(kind, own_class(module), tuple(children.items()))  # type: ignore[arg-type]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before its weights were packed."""
    return module.turned_from if isinstance(module, Packed) else type(module)


@cache
def packed_class(kind: type[Packed], own: type[nn.Module], children: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """The subclass of `own` that runs as `kind` does."""
    bases: tuple[type, ...] = (kind, FlatWeights, own) if issubclass(own, nn.RNNBase) else (kind, own)
    members: dict[str, Any] = {name: property(reader(name, child)) for name, child in children}
    if kind is PackedModule:
        members["forward"] = decoding_once(own.forward)
    named = own.__name__ if kind is PackedModule else f"Packed{own.__name__}"
    members |= {"children_of": dict(children), "turned_from": own, "kind": kind}
    return type(named, bases, members | {"__module__": own.__module__, "__qualname__": named})


def new_packed(kind: type[Packed], own: type[nn.Module], children: tuple[tuple[str, str], ...]) -> nn.Module:
    """A module to be filled from a pickle or a deep copy."""
    made = packed_class(kind, own, children)  # type: ignore[arg-type]
    return made.__new__(made)


def reader(name: str, child: str) -> Callable[[nn.Module], Tensor]:
    """The getter of a packed parameter."""

    def read(module: nn.Module) -> Tensor:
        packed: Any = module._modules[child]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return packed()
        decoded = module.__dict__.get(DECODED)
        if decoded is None:
            inside = getattr(RUNNING, "depth", 0) > 0
            return packed() if inside else DecodedWeight.of(packed(), packed)
        if name not in decoded:
            decoded[name] = packed()
        return decoded[name]

    return read


def decoding_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's own forward, with each packed weight decoded no more than once and dropped in the end."""

    @wraps(forward)
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or DECODED in module.__dict__:
            return forward(module, *args, **kwargs)
        module.__dict__[DECODED] = {}
        RUNNING.depth = getattr(RUNNING, "depth", 0) + 1
        try:
            return forward(module, *args, **kwargs)
        finally:
            RUNNING.depth -= 1
            module.__dict__.pop(DECODED, None)

    return run
