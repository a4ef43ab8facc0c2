"""The report on one compressed site."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tersor.activations.quantizers import Activation
from tersor.codecs.file_bytes import file_bytes
from tersor.core.threads import total
from tersor.formats.contract import Encoded
from tersor.nn.sites import Site
from tersor.schemes.scheme import Scheme


@dataclass(frozen=True)
class SiteReport:
    """A packed site in a line of a table; `relative_error` is to the weight that its step was given, or trained. Bytes
    are those in the file; where it is entropy-coded, as the coder estimates them."""

    name: str
    kind: str
    shape: tuple[int, int]
    scheme: str
    activation: str | None
    num_bytes: int
    bits_per_weight: float
    relative_error: float

    @classmethod
    def of(
        cls, site: Site, scheme: Scheme, encoded: Encoded, activation: Activation | None, weight: Tensor
    ) -> "SiteReport":
        """The report of a site whose matrix was `weight`."""
        error = total((encoded.decode() - weight).square()) / total(weight.square()).clamp_min(1e-38)
        num_bytes = file_bytes(encoded)
        return cls(
            name=site.name,
            kind=site.kind,
            shape=site.shape,
            scheme=str(scheme),
            activation=activation.format if activation else None,
            num_bytes=num_bytes,
            bits_per_weight=8 * num_bytes / site.num_weights,
            relative_error=error.sqrt().item(),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
