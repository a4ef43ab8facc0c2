"""Example inputs: what a model is traced and checked with, and which of their axes may have any size."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoint.source import Source
from tersor.core.errors import InputError, ModelError
from tersor.core.messages import first_line
from tersor.exporters.decoder import NUM_NEW, Decoded, axes_of, cached_inputs, call_cached
from tersor.tasks.contract import Task
from tersor.tasks.inputs import float_type_of, scoring

ROWS = 4  # examples in a batch
CALIBRATION_ROWS, NUM_CALIBRATION = 16, 8  # rows and number of the calibration batches
TEXT = {0: "batch", 1: "sequence"}  # axes of what a Hugging Face model reads as text
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Examples:
    """A batch of inputs.

    Attributes:
        inputs: by name, each `[row, ...]`, two rows or more.
        axes: of each input, the axes of any size, by position; all others have the examples' size for good.
        keywords: True if the model takes the inputs by name; else by position.
        calibration: more such inputs, real ones; none where the examples are random numbers or texts.
        texts: whole texts, tokens and mask `[row, token]`, padded on the left, where the inputs are the last tokens of
            them together with the cache of those before (decoder.py); None for all other inputs.
    """

    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    keywords: bool
    calibration: tuple[dict[str, Tensor], ...] = ()
    texts: tuple[Tensor, Tensor] | None = None

    @property
    def cached(self) -> bool:
        """True if a language model's cache is among the inputs."""
        return self.texts is not None

    def call(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for these inputs, the examples' own unless others are given."""
        given = self.inputs if inputs is None else inputs
        if self.cached:
            return call_cached(model, given)
        return model(**given) if self.keywords else model(*given.values())

    def run(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's outputs by name, float32. Raises ModelError for a model that these inputs do not suit."""
        with scoring(model):
            try:
                made = self.call(model)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.inputs.items())
                raise ModelError(
                    f"{type(model).__name__} cannot take {given}: {first_line(error)}; give inputs that it takes by "
                    f"--data or --shape"
                ) from error
            return {name: tensor.float() for name, tensor in outputs_of(made).items()}

    def cast(self, dtype: torch.dtype) -> "Examples":
        """The same examples with floating-point inputs in this type."""
        return replace(self, inputs={n: t.to(dtype) if t.is_floating_point() else t for n, t in self.inputs.items()})

    def fixed(self, names: Sequence[str]) -> "Examples":
        """The same examples, with the sizes of these axes fixed to theirs."""
        known = sorted({axis for axes in self.axes.values() for axis in axes.values()})
        for name in names:
            if name not in known:
                raise InputError(f"no axis '{name}' to fix; the inputs have {', '.join(known)}")
        axes = {n: {i: axis for i, axis in axes.items() if axis not in names} for n, axes in self.axes.items()}
        return replace(self, axes=axes)


def outputs_of(made: Any) -> dict[str, Tensor]:
    """The tensors of a model's output that are exported, by name: logits or last hidden states, or else all.

    >>> list(outputs_of((torch.zeros(1), torch.ones(1))))
    ['output_0', 'output_1']
    """
    if isinstance(made, Decoded):
        return made.outputs
    if isinstance(made, Tensor):
        return {"output": made}
    if isinstance(made, Mapping):
        tensors = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        main = next((name for name in ("logits", "last_hidden_state") if name in tensors), None)
        return {main: tensors[main]} if main else tensors
    if isinstance(made, tuple | list) and made and isinstance(made[0], Tensor):
        return {f"output_{i}": value for i, value in enumerate(made) if isinstance(value, Tensor)}
    raise InputError(
        f"the model returned {type(made).__name__}, which holds no tensors; wrap it so that it returns one"
    )


def examples_of(source: Source, task: Task | None, shape: Sequence[int] | None) -> Examples:
    """Example inputs: from a task's data, random in `shape` (one example, without the batch), or by the config."""
    if shape is not None:
        x = torch.randn(ROWS, *shape, dtype=float_type_of(source.model))
        return Examples({"x": x}, {"x": {0: "batch"}}, keywords=False)
    if task is not None:
        return from_task(source, task)
    examples = from_config(source.model)
    if examples is None:
        raise InputError(f"{source.name}: give example inputs: --data FILE, or --shape 3,32,32 for one example's sizes")
    return examples


def from_config(model: nn.Module, longest: int = 16) -> Examples | None:
    """Random texts, of `longest` tokens at most, or images of the size that the model's config says; None where it
    says none."""
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    if getattr(config, "vocab_size", None):
        length = min(longest, getattr(config, "max_position_embeddings", None) or longest)
        ids = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 3 * length // 4 :] = 0
        texts = {"input_ids": ids, "attention_mask": mask}
        return as_text({name: texts[name] for name in accepted(model, texts)})
    if getattr(config, "image_size", None) and isinstance(config.image_size, int):
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        pixels = torch.randn(ROWS, channels, size, size, generator=generator, dtype=torch.float32)
        inputs = {"pixel_values": pixels.to(float_type_of(model))}
        return Examples(inputs, {"pixel_values": {0: "batch"}}, keywords=True)
    return None


def from_task(source: Source, task: Task) -> Examples:
    """The first batch of the task's eval split, as the task calls the model."""
    inputs = {name: tensor[:ROWS] for name, tensor in next(iter(task.batches("eval", ROWS))).inputs.items()}
    if len(next(iter(inputs.values()))) < 2:  # a batch of one would be taken for a fixed size
        inputs = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in inputs.items()}
    if "input_ids" in inputs and hasattr(source.model, "config"):
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return as_text({name: inputs[name] for name in accepted(source.model, inputs)})
    dtype = float_type_of(source.model)

    def cast(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}

    calibration = tuple(cast(b.inputs) for b in islice(task.batches("calibration", CALIBRATION_ROWS), NUM_CALIBRATION))
    return Examples(cast(inputs), {name: {0: "batch"} for name in inputs}, keywords=False, calibration=calibration)


def with_cache(model: nn.Module, examples: Examples) -> Examples:
    """Texts as a language model reads them when it writes: their last tokens, with the cache of those before. They are
    padded on the left instead of the right, by turning each row's tokens round its padding."""
    ids, mask = examples.inputs["input_ids"], examples.inputs["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order)[:, -LONGEST:], mask.gather(1, order)[:, -LONGEST:]
    if ids.shape[1] < NUM_NEW + 2:
        raise InputError(f"the examples have {ids.shape[1]} tokens; a model with a cache is traced with {NUM_NEW + 2}")
    inputs = cached_inputs(model, ids, mask)
    return Examples(inputs, axes_of(inputs), keywords=True, texts=(ids, mask))


LONGEST = 64  # tokens of a text that a language model is traced and checked with


def accepted(model: nn.Module, names: Mapping[str, Tensor]) -> list[str]:
    """The inputs that the model's forward names, in a fixed order."""
    known = inspect.signature(model.forward).parameters
    return [name for name in dict.fromkeys((*TEXT_INPUTS, *names)) if name in names and name in known]


def as_text(inputs: dict[str, Tensor]) -> Examples:
    """Examples of tokens, with texts of any number and length."""
    return Examples(inputs, {name: dict(TEXT) for name in inputs}, keywords=True)
