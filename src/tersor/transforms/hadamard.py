"""Hadamard rotations fused into the weights (QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456; the names
R1 and R2 are SpinQuant's, Liu et al. 2024, https://arxiv.org/abs/2405.16406).

An orthogonal matrix spreads an outlier over all features. RMSNorm commutes with it once its gain is folded into the
layers that read it, so the residual stream can be rotated: what writes to it is multiplied from one side, what reads it
from the other (R1). Attention mixes tokens, not features, so the values of each head can be rotated as well (R2).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tersor.core.errors import ModelError
from tersor.core.threads import threads
from tersor.methods.stats import Stats
from tersor.nn.connections.connection import Connection
from tersor.nn.connections.families import BY_TYPE
from tersor.nn.parameters import matrix, parameter, set_matrix, set_parameter
from tersor.nn.sites import is_linear
from tersor.transforms.scaling import require_connections


@dataclass(frozen=True)
class Hadamard:
    """Rotate the residual stream and the values of every attention head.

    Embedding and head must be two tensors: the final norm's gain is folded into the head alone.

    Attributes:
        seed: of the random signs.
    """

    seed: int = 0

    name = "hadamard"
    needs = frozenset[str]()

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        stream = Stream.of(model)
        rotation = random_hadamard(stream.width, self.seed)
        for norm, offset, readers in stream.norms:
            fold_gain(norm, offset, readers)
            for reader in readers:
                rotate_inputs(reader, rotation)
        set_parameter(stream.embedding, "weight", product(parameter(stream.embedding, "weight"), rotation))
        for writer in stream.writers:
            rotate_outputs(writer, rotation)
        HadamardHeads(self.seed).apply(model, stats)


@dataclass(frozen=True)
class HadamardHeads:
    """Rotate the values of every attention head, and nothing else.

    Attributes:
        seed: of the random signs.
    """

    seed: int = 0

    name = "hadamard-heads"
    needs = frozenset[str]()

    def apply(self, model: nn.Module, stats: Mapping[str, Stats]) -> None:
        connections = [connection for connection in require_connections(model, self.name) if connection.heads > 1]
        if not connections:
            raise ModelError(
                f"hadamard-heads: no attention values of {type(model).__name__} can be rotated; leave it out"
            )
        for connection in connections:
            rotation = random_hadamard(connection.num_features // connection.heads, self.seed)
            first, last = connection.part * connection.num_features, (connection.part + 1) * connection.num_features
            rotate_outputs(model.get_submodule(connection.source), rotation, slice(first, last))
            for reader in readers_of(model, connection):
                rotate_inputs(reader, rotation)


@dataclass(frozen=True)
class Stream:
    """The modules that read and write the residual stream of a model.

    Attributes:
        width: its number of features.
        embedding: what starts it.
        norms: each norm with what it adds to its gain and the linear layers that read it, the head among them.
        writers: the linear layers whose outputs are added to it.
    """

    width: int
    embedding: nn.Module
    norms: list[tuple[nn.Module, float, list[nn.Module]]]
    writers: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> "Stream":
        """Raises ModelError for a model whose stream cannot be rotated."""
        config = getattr(model, "config", None)
        family = BY_TYPE.get(getattr(config, "model_type", ""))
        if family is None or not family.writers or getattr(model, "lm_head", None) is None:
            known = ", ".join(sorted(name for name, known in BY_TYPE.items() if known.writers))
            raise ModelError(
                f"hadamard rotates causal language models with RMSNorm, of model type {known}; {type(model).__name__} "
                f"is none: use hadamard-heads"
            )
        base: nn.Module = model.base_model  # type: ignore[assignment]
        embedding, head = base.get_submodule("embed_tokens"), model.get_submodule("lm_head")
        if parameter(embedding, "weight").data_ptr() == parameter(head, "weight").data_ptr():
            raise ModelError(
                f"hadamard: {type(model).__name__} ties lm_head to embed_tokens, and the final norm's gain can be "
                f"folded into the head alone; use hadamard-heads, or save the model untied first"
            )
        connections = [
            p for p in require_connections(model, "hadamard") if not is_linear(model.get_submodule(p.source))
        ]
        layers = config.num_hidden_layers  # type: ignore[union-attr]
        writers = [m for path, m in model.named_modules() if path.endswith(tuple("." + w for w in family.writers))]
        if (len(connections), len(writers)) != (2 * layers, len(family.writers) * layers):
            raise ModelError(
                f"hadamard: found {len(connections)} norms and {len(writers)} writers of the residual stream in "
                f"{layers} layers of {type(model).__name__}, 2 of each expected; are some already compressed?"
            )
        norms = [(model.get_submodule(p.source), p.norm_offset, readers_of(model, p)) for p in connections]
        norms.append((base.get_submodule("norm"), family.norm_offset, [head]))
        return cls(parameter(embedding, "weight").shape[1], embedding, norms, writers)


def readers_of(model: nn.Module, connection: Connection) -> list[nn.Module]:
    """The modules that read a connection's source."""
    return [model.get_submodule(path) for path in connection.readers]


def fold_gain(norm: nn.Module, offset: float, readers: list[nn.Module]) -> None:
    """Move a norm's gain into the columns of its readers."""
    gain = parameter(norm, "weight").double() + offset
    for reader in readers:
        set_matrix(reader, matrix(reader) * gain)
    set_parameter(norm, "weight", torch.full_like(gain, 1 - offset))


def rotate_inputs(linear: nn.Module, rotation: Float[Tensor, "n n"]) -> None:
    """Have a linear layer take its inputs, every n of them, in the other basis."""
    set_matrix(linear, product(matrix(linear), rotation))


def rotate_outputs(linear: nn.Module, rotation: Float[Tensor, "n n"], rows: slice = slice(None)) -> None:
    """Give the outputs of a linear layer, or some of them, every n of them, the other basis."""
    weight = matrix(linear).clone()
    weight[rows] = product(weight[rows].t(), rotation).t().to(weight.dtype)
    set_matrix(linear, weight)
    if linear.bias is not None:
        bias = parameter(linear, "bias").clone()
        bias[rows] = product(bias[rows], rotation).to(bias.dtype)
        set_parameter(linear, "bias", bias)


def product(x: Float[Tensor, "*rows features"], rotation: Float[Tensor, "n n"]) -> Float[Tensor, "*rows features"]:
    """Every n features in a row times the rotation, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = x.to(dtype).unflatten(-1, (-1, len(rotation)))
    return (blocks @ rotation.to(x.device, dtype)).flatten(-2)


def random_hadamard(size: int, seed: int) -> Float[Tensor, "size size"]:
    """A Hadamard matrix with random signs of its rows, scaled to be orthogonal, float64; a random orthogonal matrix
    for the sizes that none is known for here."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    matrix = hadamard(size)
    if matrix is None:
        with threads(1):
            return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return signs * matrix / size**0.5


def hadamard(size: int) -> Float[Tensor, "size size"] | None:
    """A matrix of signs with orthogonal rows: Paley's constructions and their Kronecker products (Sylvester).

    >>> hadamard(4)
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]], dtype=torch.float64)
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    half = hadamard(size // 2)
    if half is not None:
        return torch.kron(hadamard(2), half)  # type: ignore[arg-type]
    if is_prime(size - 1):  # size - 1 = 3 (mod 4)
        return paley(size - 1) + torch.eye(size, dtype=torch.float64)
    if is_prime(size // 2 - 1) and size % 8 == 4:  # size / 2 - 1 = 1 (mod 4)
        plus, minus = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double(),
        )
        return torch.kron(paley(size // 2 - 1), plus) + torch.kron(torch.eye(size // 2, dtype=torch.float64), minus)
    for factor in range(12, size // 11, 4):
        if size % factor == 0:
            left, right = hadamard(factor), hadamard(size // factor)
            if left is not None and right is not None:
                return torch.kron(left, right)
    return None


def is_prime(number: int) -> bool:
    """True if a number is prime."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def paley(prime: int) -> Float[Tensor, "n n"]:
    """The conference matrix of a prime: quadratic residues of differences, bordered by ones. It is symmetric for
    `prime = 1 (mod 4)`, skew for 3."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime).square() % prime] = 1.0
    residues[0] = 0.0
    index = torch.arange(prime)
    bordered = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    bordered[1:, 1:] = residues[(index[:, None] - index) % prime]
    bordered[0, 0] = 0.0
    if prime % 4 == 3:
        bordered[1:, 0] = -1.0
    return bordered
