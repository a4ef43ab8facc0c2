"""Copies of models, with what hangs on their modules.

`copy.deepcopy` takes functions for constants. A hook or a `forward` that somebody gave to one module often holds that
module, or a bound method of it; in the copy it must hold the copy. And a model may keep what has no copy: tensors of a
graph that autograd still follows (old weight norm, outputs that were put aside) and locks.
"""

import copy
import functools
import threading
import types
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.core.messages import first_line
from tersor.nn.computed import computed_weights
from tersor.nn.sites import find_sites

LOCKS = (type(threading.Lock()), type(threading.RLock()))
KNOWN_LEAVES = (str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType)


def copy_but_sites(model: nn.Module) -> nn.Module:
    """A deep copy that shares the site weights, which are replaced and never written to.

    Raises ModelError for an attribute that cannot be copied.
    """
    weights = [site.weight(model) for site in find_sites(model)]
    return Copying(model, {id(weight): weight for weight in weights if isinstance(weight, nn.Parameter)}).run()


def materialized(model: nn.Module) -> nn.Module:
    """The model, or a copy, in which no site's weight is computed from others."""
    if not any(computed_weights(module) for module in model.modules()):
        return model
    made = copy_but_sites(model)
    for site in find_sites(made):
        site.materialize(made)
    return made


def own_shared_weights(model: nn.Module, original: nn.Module) -> None:
    """Copy the site weights that were kept, so that casting or training `model` leaves the original alone."""
    shared = {id(parameter) for parameter in original.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in shared:
                setattr(module, name, copies.setdefault(id(parameter), copy.deepcopy(parameter)))


class Copying:
    """One copy of a model.

    Attributes:
        memo: what stands for which object in the copy, by the object's id, as `copy.deepcopy` keeps it.
        held: for each object seen, whether it holds a module of the model.
        functions: those that hold one, each with the function that stands for it.
    """

    def __init__(self, model: nn.Module, shared: Mapping[int, Any]):
        self.model, self.memo = model, dict(shared)
        self.held: dict[int, bool] = {id(module): True for module in model.modules()}
        self.functions: list[tuple[types.FunctionType, types.FunctionType]] = []

    def run(self) -> nn.Module:
        for module in self.model.modules():
            for attribute in attributes_of(module).values():
                self.holds_module(attribute)
            self.holds_module(module._buffers)
        try:
            made = copy.deepcopy(self.model, self.memo)
            for function, stand_in in self.functions:
                self.fill(function, stand_in)
        except ModelError:
            raise
        except Exception as problem:  # whatever the __deepcopy__ of some class raises
            raise self.explained(problem) from problem
        return made

    def holds_module(self, thing: Any) -> bool:
        """True if a module of the model can be reached from here. Notes on the way what `copy.deepcopy` is told."""
        if isinstance(thing, KNOWN_LEAVES) or thing is None:
            return False
        if id(thing) in self.held:
            return self.held[id(thing)]
        self.held[id(thing)] = False  # until it is known; things may hold themselves
        if isinstance(thing, LOCKS):
            self.memo[id(thing)] = thing
        elif isinstance(thing, Tensor):
            if thing.grad_fn is not None and id(thing) not in self.memo:
                self.memo[id(thing)] = thing.detach()
        else:
            reached = [self.holds_module(each) for each in parts_of(thing)]  # all of them, for what is noted
            self.held[id(thing)] = any(reached)
            if self.held[id(thing)] and isinstance(thing, types.FunctionType):
                closure = tuple(types.CellType() for _ in thing.__closure__ or ())
                code = (thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, closure)
                stand_in = types.FunctionType(*code)
                functools.update_wrapper(stand_in, thing)
                del stand_in.__wrapped__  # type: ignore[attr-defined]
                self.memo[id(thing)] = stand_in
                self.functions.append((thing, stand_in))
        return self.held[id(thing)]

    def fill(self, function: types.FunctionType, stand_in: types.FunctionType) -> None:
        """Have a function hold the copies of what its original holds, where that holds a module."""
        for cell, new in zip(function.__closure__ or (), stand_in.__closure__ or (), strict=True):
            if held := content_of(cell):
                new.cell_contents = self.copied(held[0])
        stand_in.__defaults__ = self.copied(function.__defaults__)
        stand_in.__kwdefaults__ = self.copied(function.__kwdefaults__)
        stand_in.__dict__.update({name: self.copied(value) for name, value in function.__dict__.items()})

    def copied(self, thing: Any) -> Any:
        return copy.deepcopy(thing, self.memo) if self.holds_module(thing) else thing

    def explained(self, problem: Exception) -> ModelError:
        """The error that names what could not be copied, and where it is."""
        modules = {id(module): module for module in self.model.modules()}
        for path, module in self.model.named_modules():
            for name, value in attributes_of(module).items():
                try:
                    copy.deepcopy(value, dict(self.memo) | modules)
                except Exception as reason:
                    place = f"{path}.{name}" if path else name
                    return ModelError(
                        f"{type(self.model).__name__}: the attribute {place} ({type(value).__name__}) cannot be copied "
                        f"({first_line(reason)}), and tersor works on a copy of the model; set it to None "
                        f"before, or give its class a __deepcopy__"
                    )
        return ModelError(
            f"{type(self.model).__name__} cannot be copied ({first_line(problem)}), and tersor works on a "
            f"copy of the model; let copy.deepcopy(model) work first"
        )


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """The attributes and hooks of a module beside its parameters, buffers and children."""
    return {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}


def parts_of(thing: Any) -> list[Any]:
    """The objects that an object of any kind holds."""
    if isinstance(thing, types.FunctionType):
        cells = [content for cell in thing.__closure__ or () for content in content_of(cell)]
        return [*cells, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    parts: list[Any] = []
    if isinstance(thing, Mapping):
        parts += [*thing.keys(), *thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        parts += thing
    return parts + list(getattr(thing, "__dict__", {}).values())


def content_of(cell: types.CellType) -> list[Any]:
    """The object that a closure's variable holds; nothing before it was assigned."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []
