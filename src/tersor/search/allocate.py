"""Choose one option per site so that the predicted loss is least and the bytes fit: a multiple-choice knapsack.

Solved by dynamic programming over finely divided bytes (Dudzinski and Walukiewicz 1987,
https://doi.org/10.1016/0377-2217(87)90165-2), then what rounding left over is spent greedily. Costs are rounded up, so
the limit always holds.
"""

from dataclasses import dataclass

import numpy as np

NUM_BINS = 20_000  # the budget is divided into this many steps


@dataclass(frozen=True)
class Option:
    """One way to store one site.

    Attributes:
        scheme: as recipes write it.
        num_bytes: bytes in the file, its entries in the header included.
        loss: the predicted loss.
        num_values: how many values a sparse format keeps; the shape fixes all other sizes.
        num_coded: bytes of an entropy-coded weight, as estimated; None where the file holds tensors as they are.
    """

    scheme: str
    num_bytes: int
    loss: float
    num_values: int = 0
    num_coded: int | None = None


def undominated(options: list[Option]) -> list[Option]:
    """Sorted by bytes, without those that another option beats or equals in both bytes and loss."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.num_bytes, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def allocate(sites: list[list[Option]], limit: int) -> list[Option] | None:
    """One option per site, at most `limit` bytes together, with the least total loss; None when even the smallest
    options do not fit.

    >>> small, large = Option("int4", 4, 1.0), Option("int8", 8, 0.1)
    >>> [o.scheme for o in allocate([[small, large], [small, Option("int8", 8, 0.9)]], limit=12)]
    ['int8', 'int4']
    """
    menus = [undominated(options) for options in sites]
    spare = limit - sum(menu[0].num_bytes for menu in menus)
    if spare < 0:
        return None
    if sum(menu[-1].num_bytes for menu in menus) <= limit:
        return [menu[-1] for menu in menus]
    unit = max(1.0, spare / NUM_BINS)
    num_bins = int(spare / unit)
    best: np.ndarray = np.zeros(num_bins + 1)  # least loss of the sites so far, within b bins
    choices = np.zeros((len(menus), num_bins + 1), dtype=np.uint8)
    for row, menu in zip(choices, menus, strict=True):
        total = best + menu[0].loss
        for index, option in enumerate(menu[1:], start=1):
            cost = int(np.ceil((option.num_bytes - menu[0].num_bytes) / unit))
            if cost > num_bins:
                break
            candidate = best[: num_bins + 1 - cost] + option.loss
            better = candidate < total[cost:]
            total[cost:][better] = candidate[better]
            row[cost:][better] = index
        best = total
    chosen, left = [], num_bins
    for row, menu in zip(choices[::-1], menus[::-1], strict=True):
        index = int(row[left])
        chosen.append(index)
        left -= int(np.ceil((menu[index].num_bytes - menu[0].num_bytes) / unit))
    return spend_rest(menus, chosen[::-1], limit)


def spend_rest(menus: list[list[Option]], chosen: list[int], limit: int) -> list[Option]:
    """Upgrade single sites while any upgrade fits, the most loss saved per byte first."""
    rest = limit - sum(menu[index].num_bytes for menu, index in zip(menus, chosen, strict=True))
    while True:
        upgrades = [
            ((menu[index].loss - option.loss) / (option.num_bytes - menu[index].num_bytes), site, new)
            for site, (menu, index) in enumerate(zip(menus, chosen, strict=True))
            for new, option in enumerate(menu[index + 1 :], start=index + 1)
            if option.num_bytes - menu[index].num_bytes <= rest
        ]
        if not upgrades:
            return [menu[index] for menu, index in zip(menus, chosen, strict=True)]
        _, site, new = max(upgrades)
        rest -= menus[site][new].num_bytes - menus[site][chosen[site]].num_bytes
        chosen[site] = new
