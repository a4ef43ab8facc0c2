"""The cost of one format over a whole model: bytes, and the sites that it can hold."""

from tersor.codecs.file_bytes import file_bytes, file_bytes_of_shape
from tersor.core.threads import total
from tersor.methods.stats import Stats
from tersor.schemes.scheme import Scheme

SAMPLED_ROWS = 64  # on which the error is measured
COUNTED_ROWS = 1024  # where the bytes depend on the values


def cost_of(name: str, sites: list, kept_bytes: int, model: object) -> dict:
    """Bytes over all sites (those that do not fit stay as they are), and the error on a sample of rows."""
    scheme = Scheme.parse(name)
    num_bytes, bits, num_weights, squared, energy, misfits = kept_bytes, 0.0, 0, 0.0, 0.0, 0
    for site in sites:
        if scheme.format.why_not(site.shape):
            misfits += 1
            num_bytes += site.num_weights * site.dtype.itemsize
            continue
        exact = file_bytes_of_shape(scheme.format, site.shape)
        wanted = SAMPLED_ROWS if exact is not None else COUNTED_ROWS
        rows = site.matrix(model)[:: max(1, site.shape[0] // wanted)]
        encoded = scheme.method.compress(rows, scheme.format, Stats())
        scale = site.shape[0] / rows.shape[0]
        squared += float(total((encoded.decode() - rows).square())) * scale
        energy += float(total(rows.square())) * scale
        taken = file_bytes(encoded) * scale if exact is None else exact
        bits += 8 * taken
        num_bytes += round(taken)
        num_weights += site.num_weights
    return {
        "format": str(scheme),
        "bytes": num_bytes,
        "bits_per_weight": bits / max(1, num_weights),
        "relative_error": (squared / energy) ** 0.5 if energy else None,
        "misfits": misfits,
    }
