"""The memory that training takes: weights, gradients, optimizer, activations.

What does not depend on the data is a formula per parameter (ZeRO, Rajbhandari et al. 2019,
https://arxiv.org/abs/1910.02054): Adam in mixed precision keeps 2 + 2 bytes of 16-bit weight and gradient and 12 of the
32-bit weight and two moments, 16 in all; in float32, as tersor trains, it is 4 + 4 + 8, which is 16, too. Only what is
trained has gradients and moments: of LoRA the adapters, so that 4 or 2 bytes per parameter are left, and of QLoRA half
a byte.

Activations depend on the code that runs. For a transformer block in 16 bits they are about `s b h (34 + 5 a s / h)`
bytes (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198), but attention that keeps no matrix, a gated MLP,
float32 or frozen weights change that. So one step of the model itself is run on tensors without data, which takes no
memory, and a ledger notes what would be alive at each moment.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tersor.core.errors import InputError
from tersor.core.messages import first_line
from tersor.formats.contract import CHUNK, Encoded, Format, Layout
from tersor.nn.packed import PackedWeight, Stored
from tersor.schemes.scheme import KEEP, parse_rule
from tersor.tasks.contract import Output, Split, Task, TrainableTask
from tersor.tasks.inputs import Batch, device_of
from tersor.tasks.scores import Scores
from tersor.training.finetune import task_loss
from tersor.training.lora import LoraStep, adapt, block_sites
from tersor.training.settings import TrainingStep, check_trainable
from tersor.training.setup import checkpoint_activations

STATE_BYTES = {"adamw": 8.0, "adamw-8bit": 2 + 2 * 4 / 256, "sgd": 4.0}  # per parameter; of 8 bits a scale for 256
DECODING = 4  # float32 numbers per weight that decoding holds, for a few rows at a time
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training run on one device.

    Attributes:
        num_parameters: number of parameters of the model and the adapters; packed weights count by their number.
        num_trained: number of the parameters that are trained.
        weights: parameters and buffers, packed ones as they lie in memory.
        gradients: bytes of the gradients.
        optimizer: its states.
        activations: what the forward pass keeps for the backward pass.
        copies: the last good weights, which the training loop keeps in the host's memory.
        peak: the most that is alive at once, host copies left out: less than the sum where activations are gone before
            the last gradients come, more where one operation needs much room.
        batch_size, length: of the step that was looked at; `length` is None where an example has no tokens.
        block_formula: activations of all blocks by `block_activations`; None where the model is no transformer.
    """

    num_parameters: int
    num_trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    copies: int
    peak: int
    batch_size: int
    length: int | None = None
    block_formula: int | None = None

    @property
    def sum(self) -> int:
        """Bytes of weights, gradients, optimizer and activations together."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sum": self.sum}


def training_memory(
    model: nn.Module, task: Task | None, step: TrainingStep, *, dtype: torch.dtype | None = None
) -> TrainingMemory:
    """Predict the memory of `step` on a model, which is neither changed nor run.

    Args:
        task: its first train batch is the one looked at.
        step: batch size, optimizer, precision and checkpointing count; of a `LoraStep`, base and adapters, too.
            `accumulate` does not: batches come one after another.
        dtype: type of the float weights; None: as they are.

    Raises:
        DataError: the task has no train split.
        InputError: the model's code depends on the data in a way that cannot be followed without any.
    """
    trainable = check_trainable(task, step.step if isinstance(step, LoraStep) else "training memory")
    device = device_of(model)
    base = parse_rule(step.base) if isinstance(step, LoraStep) else None
    shadow = shadow_of(model, dtype)
    if base is not None:
        pack_shadow(shadow, base.format)
    if isinstance(step, LoraStep):
        adapt(shadow, step.model_copy(update={"base": KEEP, "init": "zero", "runs_on": "tersor"}))
    batch = next(trainable.epoch(0, step.batch_size))
    with FakeTensorMode(allow_non_fake_inputs=True):
        place(shadow, device)
        try:
            activations, step_peak = walk_step(shadow, trainable, step, batch)
        except (RuntimeError, InputError) as error:  # arrays translate what their model raises
            raise InputError(
                f"training memory: {type(model).__name__} cannot be run without data ({first_line(error)}); "
                f"train a few steps and watch the process instead"
            ) from None
    trained = [parameter for parameter in shadow.parameters() if parameter.requires_grad]
    tensors = [*shadow.parameters(), *shadow.buffers()]
    weights, gradients = total(tensors), total(trained)
    states = STATE_BYTES[step.optimizer] if step.optimizer != "sgd" or step.momentum else 0.0
    optimizer = round(states * sum(p.numel() * min(4, p.itemsize) / 4 for p in trained))
    largest = max((p.nbytes for p in trained), default=0)
    update = gradients if device.type == "cuda" else 2 * largest  # AdamW's temporaries: of all tensors, or of one
    ids = getattr(batch, "inputs", {}).get("input_ids")
    length = None if ids is None else ids.shape[-1]
    return TrainingMemory(
        num_parameters=num_weights(shadow),
        num_trained=sum(parameter.numel() for parameter in trained),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        copies=gradients,
        peak=weights + optimizer + max(step_peak, gradients + update),
        batch_size=step.batch_size,
        length=length,
        block_formula=None if length is None else block_activations(model, step.batch_size, length),
    )


def walk_step(shadow: nn.Module, task: TrainableTask, step: TrainingStep, batch: Any) -> tuple[int, int]:
    """One forward and backward pass: bytes alive between the two, and the most that ever are, beside the model's."""
    if step.gradient_checkpointing:
        checkpoint_activations(shadow)
    shadow.train()
    kind = device_of(shadow).type
    half = torch.autocast(kind, AUTOCAST[step.precision]) if step.precision in AUTOCAST else nullcontext()
    with Ledger((*shadow.parameters(), *shadow.buffers())) as ledger:
        with half:
            loss = task_loss(task)(shadow, batch)
        activations = ledger.alive
        loss.backward()
    return activations, ledger.peak


class Ledger(TorchDispatchMode):
    """Counts the bytes of what operations inside the `with` block make, as long as it is alive.

    >>> with Ledger() as ledger:
    ...     x = torch.zeros(1000) + 1
    ...     del x
    ...     y = torch.zeros(10)
    >>> ledger.alive, ledger.peak
    (40, 8000)
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        """A storage that an operation gave; a view's is known already."""
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.alive += num_bytes
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.forget, key, num_bytes)

    def forget(self, key: int, num_bytes: int) -> None:
        """Count a tensor as freed."""
        self.seen.discard(key)
        self.alive -= num_bytes


class Tokens:
    """A task of nothing but windows of tokens, to ask for the memory of a model without having data."""

    name, fingerprint, num_train = "tokens", "", 1
    output: Output = "logits"

    def __init__(self, length: int):
        self.length, self.description = length, f"windows of {length} tokens"

    def prepare(self, original: nn.Module) -> None:
        """Do nothing: no data is read."""

    def batches(self, split: Split, batch_size: int | None = None) -> Iterator[Batch]:
        """Yields shape-only batches in the same order as `epoch`."""
        return self.epoch(0, batch_size)

    def epoch(self, seed: int, batch_size: int | None = None) -> Iterator[Batch]:
        """Yields one batch that has shapes only."""
        num = batch_size or 1
        yield Batch(np.arange(num), {"input_ids": torch.zeros(num, self.length, dtype=torch.long)})

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits, or else the first output of the model."""
        ids = batch.inputs["input_ids"].to(device_of(model))
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"{type(model).__name__} may not take tokens; add --task, --data and --train")
        output = model(input_ids=ids)
        return output.logits if "logits" in output else output[0]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """The loss of the next token if there are logits for each, else that of the first class."""
        logits = output[:, :-1].flatten(0, 1) if output.ndim == 3 else output
        return cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long, device=logits.device))

    def score(self, model: nn.Module, split: Split = "eval") -> Scores:
        raise InputError("tokens without data have no score")


# A model without data.


class Shadow(PackedWeight):
    """A packed weight without data: decoding gives a tensor of the right size, and takes the room that it takes."""

    def matrix(self) -> Tensor:
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        torch.empty(DECODING * min(CHUNK, weight.numel()), device=self.device)
        return weight

    def forward(self) -> Tensor:
        return self.fold.unfold(self.matrix())

    def rows(self, index: Tensor) -> Tensor:
        return torch.empty(len(index), self.shape[1], dtype=self.dtype, device=self.device)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def shadow_of(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model on the device `meta`, where tensors have shapes and no data."""
    stored = {id(t) for module in model.modules() if isinstance(module, Stored) for t in module.tensors.values()}
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        cast = dtype is not None and tensor.is_floating_point() and id(tensor) not in stored
        empty = torch.empty_like(tensor, dtype=dtype if cast else tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    shadows: dict[int, Shadow] = {}
    for module in list(shadow.modules()):
        for name, child in module._modules.items():
            if isinstance(child, PackedWeight):
                made = Shadow(child.encoded, child.fold, dtype or child.dtype)
                module._modules[name] = shadows.setdefault(id(child), made)
    return shadow


def pack_shadow(shadow: nn.Module, format: Format) -> None:
    """Let the float linear layers of the blocks be packed."""
    for site in block_sites(shadow):
        if isinstance(site.weight(shadow), nn.Parameter):
            layout = format.layout(site.shape)
            if any(None in shape for _, shape in layout.values()):
                layout = drawn_layout(format, site.shape)
            parts = {n: torch.empty(shape, dtype=kind, device="meta") for n, (kind, shape) in layout.items()}  # type: ignore[arg-type]
            encoded = Encoded(format, site.shape, parts)
            site.replace(shadow, encoded)
            shadow.get_submodule(site.owners[0].module).packed = Shadow(encoded, site.fold, site.dtype)


def drawn_layout(format: Format, shape: tuple[int, int]) -> Layout:
    """The layout of a format whose sizes depend on the data: that of normal weights."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = format.encode(weight, format.fit(weight)).parts
    return {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}


def place(shadow: nn.Module, device: torch.device) -> None:
    """Move what is on `meta` to a device, inside a FakeTensorMode: operations then are those of the device."""
    moved: dict[int, Any] = {}
    for module in shadow.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    fake = torch.empty_like(tensor, device=device)
                    trained = tensor.requires_grad
                    moved[id(tensor)] = nn.Parameter(fake, trained) if isinstance(tensor, nn.Parameter) else fake
                tensors[name] = moved[id(tensor)]


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors, tied ones counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def num_weights(model: nn.Module) -> int:
    """Number of weights, with packed ones counted as weights, not bytes."""
    packed = {id(module): module.shape for module in model.modules() if isinstance(module, PackedWeight)}
    return sum(p.numel() for p in model.parameters()) + sum(rows * columns for rows, columns in packed.values())


def block_activations(model: nn.Module, batch_size: int, length: int) -> int | None:
    """`s b h (34 + 5 a s / h)` bytes for each block: 16 bits, a plain MLP, dropout, attention that keeps its matrix."""
    config = getattr(model, "config", None)
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    sizes: list[Any] = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) for size in sizes):
        return None
    hidden, heads, layers = sizes
    return round(layers * length * batch_size * hidden * (34 + 5 * heads * length / hidden))
