"""Plans a recipe for a size limit: measures the cost of every candidate format at every site, then chooses.

The loss of a candidate is predicted from the error it really makes: the site is compressed with it (a sample of rows,
which are independent), and the squared error is weighed by the loss's curvature there (`Stats.loss`). Without data the
error relative to the weights stands in.

Losses are measured with a coarse `mse`, which needs little time. Where the walk can show a site's inputs, and a
candidate names no method, the recipe then names the one that reads them (`gptq`): the same format and the same bytes,
with less error.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

from tersor.calibration.curvature import estimate_fisher
from tersor.calibration.moments import shows_inputs
from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.layout import other_tensors
from tersor.codecs.file_bytes import file_bytes
from tersor.core.errors import BudgetError, InputError
from tersor.core.progress import Progress, silent
from tersor.core.threads import mean
from tersor.core.weights_file import METADATA, file_size
from tersor.methods.mse import Mse
from tersor.methods.stats import Stats
from tersor.nn.sites import Site, check_finite, check_has_sites, escape, find_sites, matches
from tersor.pipeline import Compressed, run
from tersor.recipe import Recipe
from tersor.schemes.assignment import one_or_more
from tersor.schemes.scheme import KEEP, Scheme, as_written, in_full, parse_rule
from tersor.search.allocate import Option, allocate
from tersor.search.limit import Limit
from tersor.steps.weights import WeightsStep, preflight
from tersor.tasks.contract import Task

CANDIDATES = [
    KEEP,
    "bf16",
    *(f"int{bits}{group}" for bits in (8, 6, 5) for group in ("", "-g128", "-g32")),
    *(f"int4{group}" for group in ("", "-g128", "-g64", "-g32", "-asym", "-g128-asym", "-g64-asym", "-g32-asym")),
    *(f"int3{group}" for group in ("", "-g128", "-g64", "-g32", "-asym", "-g64-asym", "-g32-asym")),
    *(f"int2{group}" for group in ("", "-g64", "-g32", "-asym", "-g64-asym", "-g32-asym")),
]
SAMPLED_ROWS = 64  # the rows that matter most, and as many at random from the rest
QUICK = Mse(num_steps=8)  # measures losses 1 % larger than the usual search, in half the time
NUM_PLANS = 5  # made at most where what a weight takes is known only when it is coded
UNREACHED = 0.01  # a site the data never reaches counts as much as this fraction of the median site
Tensors = list[tuple[str, torch.dtype, tuple[int, ...]]]  # name, dtype and shape of each


@dataclass(frozen=True)
class Menu:
    """One site and the options for it; a single option where the user's rules fixed it."""

    site: Site
    options: list[Option]


def measure_menus(
    model: nn.Module,
    stats: Mapping[str, Stats],
    step: WeightsStep,
    candidates: str | Iterable[str] = CANDIDATES,
    progress: Progress = silent,
) -> list[Menu]:
    """Options and predicted losses for every site. Rules and excludes of `step` fix their sites.

    Where there are statistics, there is calibration data: schemes that name no method are then filled by the one that
    reads inputs at the sites whose inputs it can see.
    """
    candidates = [as_written(text) for text in one_or_more(candidates)]
    sites = find_sites(model)
    assigned = {site.name: text for site, text in step.texts(sites)}
    floor = UNREACHED * median_curvature(stats)
    menus = []
    for done, site in enumerate(sites):
        progress("measuring formats", done, len(sites))
        weight = site.matrix(model)
        check_finite(site, weight)
        texts = candidates_for(step, site, assigned[site.name], candidates)
        rows, scale = sample_rows(site, stats.get(site.name, Stats()))
        site_stats = site_curvature(site, stats.get(site.name, Stats()), weight, floor)
        sampled = weight[rows]
        sampled_stats = Stats(site_stats.row_weight[rows] * scale, site_stats.column_weight)  # type: ignore[index]
        sees_inputs = bool(stats) and shows_inputs(model, site)
        options = [
            replace(
                measured_option(site, parse_rule(text), weight, sampled, sampled_stats),
                scheme=in_full(text, sees_inputs),
            )
            for text in texts
        ]
        menus.append(Menu(site, options))
    progress("measuring formats", len(sites), len(sites))
    return menus


def candidates_for(step: WeightsStep, site: Site, assigned: str, candidates: list[str]) -> list[str]:
    """The scheme that a rule or exclude fixed, or the candidates that fit the site's shape.

    Raises FormatError when nothing fits.
    """
    texts = [assigned] if is_fixed(step, site) else candidates
    schemes = {text: parse_rule(text) for text in texts}
    fitting = [text for text, scheme in schemes.items() if scheme is None or not scheme.format.why_not(site.shape)]
    if not fitting:
        preflight([(site, scheme) for scheme in schemes.values() if scheme is not None])
    return fitting


def is_fixed(step: WeightsStep, site: Site) -> bool:
    """True if a rule or an exclude pattern decides on a site."""
    return any(matches(pattern, site.name) for pattern in (*step.rules, *step.exclude))


def measured_option(site: Site, scheme: Scheme | None, weight: Tensor, sampled: Tensor, stats: Stats) -> Option:
    """Bytes and predicted loss of one scheme at one site; `sampled` are some rows of `weight`, `stats` is theirs."""
    if scheme is None:
        return option_of(site, None)
    columns = Stats(column_weight=stats.column_weight)
    method = QUICK if scheme.method == Mse() else scheme.method
    encoded = method.compress(sampled, scheme.format, columns)
    num_values = 0
    if scheme.format.entropy_coded:
        num_coded = file_bytes(method.compress(weight, scheme.format, columns))
        return option_of(site, scheme, stats.loss(encoded.decode() - sampled), num_coded=num_coded)
    if is_sparse(scheme, site):
        parts = scheme.method.compress(weight, scheme.format, columns).parts
        layout = scheme.format.layout(site.shape)
        num_values = next(parts[part].shape[shape.index(None)] for part, (_, shape) in layout.items() if None in shape)
    return option_of(site, scheme, stats.loss(encoded.decode() - sampled), num_values)


def option_of(site: Site, scheme: Scheme | None, loss: float = 0.0, num_values: int = 0, num_coded: int = 0) -> Option:
    """Bytes and predicted loss of one scheme at one site. What depends on the weights is the least where it is not
    given."""
    if scheme is not None and scheme.format.entropy_coded:
        return Option(str(scheme), num_coded, loss, num_coded=num_coded)
    num_bytes = file_size(stored_tensors(site, scheme, num_values), {}) - file_size([], {})
    return Option(str(scheme or KEEP), num_bytes, loss, num_values)


def is_sparse(scheme: Scheme, site: Site) -> bool:
    """True if the bytes depend on the weights, not only on the shape."""
    return any(None in shape for _, shape in scheme.format.layout(site.shape).values())


def sample_rows(site: Site, stats: Stats) -> tuple[Tensor, Tensor]:
    """Row indices to measure on, and how many rows each stands for."""
    num_rows = site.shape[0]
    if num_rows <= 2 * SAMPLED_ROWS:
        return torch.arange(num_rows), torch.ones(num_rows)
    weight = stats.row_weight if stats.row_weight is not None else torch.zeros(num_rows)
    order = weight.argsort(descending=True, stable=True)
    rest = order[SAMPLED_ROWS:]
    picked = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:SAMPLED_ROWS]]
    scale = torch.cat([torch.ones(SAMPLED_ROWS), torch.full((SAMPLED_ROWS,), len(rest) / SAMPLED_ROWS)])
    return torch.cat([order[:SAMPLED_ROWS], picked]), scale


def site_curvature(site: Site, stats: Stats, weight: Tensor, floor: float) -> Stats:
    """The measured curvature with a floor; without data, what makes the loss relative to the weights."""
    if stats.row_weight is None or stats.column_weight is None:
        relative = 1 / mean(weight.square()).clamp_min(1e-30).item()
        return Stats(torch.full((site.shape[0],), relative), torch.ones(site.shape[1]))
    return Stats(stats.row_weight + floor, stats.column_weight)


def median_curvature(stats: Mapping[str, Stats]) -> float:
    """The median of the sites' mean curvatures, over the sites that affect the loss on the data."""
    means = [mean(s.row_weight).item() for s in stats.values() if s.row_weight is not None]
    reached = sorted(value for value in means if value > 0)
    return reached[len(reached) // 2] if reached else 0.0


def plan_size(model: nn.Module, menus: list[Menu], limit: Limit, seed: int = 0) -> Recipe:
    """The recipe with the least predicted loss whose file fits `limit`, by the exact size of the file; where weights
    are entropy-coded, by an estimate, which `plan_and_make` checks.

    Raises BudgetError naming the smallest reachable size and what binds.
    """
    kept = kept_layout(model, menus)
    for_sites = limit.num_bytes - planned_size(kept, menus, [])
    while (chosen := allocate([menu.options for menu in menus], for_sites)) is not None:
        over = planned_size(kept, menus, chosen) - limit.num_bytes
        if over <= 0:
            return recipe_of(menus, chosen, seed)
        for_sites = sum(option.num_bytes for option in chosen) - over  # the file's header is larger by this much
    smallest = smallest_options(menus)
    if are_coded(menus) or planned_size(kept, menus, smallest) <= limit.num_bytes:
        return recipe_of(menus, smallest, seed)
    raise BudgetError(why_infeasible(kept, menus, limit))


def plan_and_make(
    model: nn.Module, menus: list[Menu], limit: Limit, make: Callable[[Recipe], Compressed], seed: int = 0
) -> Compressed:
    """The model of `plan_size`, whose file fits. What entropy coding takes off is known when a file is made, so with
    coded weights the plan is made again for what the last file left over, a few times, and the largest that fits is
    the answer.

    Raises BudgetError naming the nearest file.
    """
    best, nearest, aim, tried = None, inf, limit.num_bytes, set[str]()
    for _ in range(NUM_PLANS):
        recipe = plan_size(model, menus, Limit(max(1, aim), limit.text), seed)
        if recipe.to_yaml() in tried:
            break
        tried.add(recipe.to_yaml())
        made = make(recipe)
        if not are_coded(menus):
            return made
        num_bytes = size_of(made.model)
        nearest = min(nearest, num_bytes)
        if num_bytes <= limit.num_bytes and (best is None or num_bytes > best[0]):
            best = (num_bytes, made)
        aim += limit.num_bytes - num_bytes
    if best is None:
        raise BudgetError(
            f"{limit.text} ({limit.num_bytes:,} bytes) is below what the candidates reach beside the sites that a rule "
            f"codes: the nearest file is {nearest:,} bytes, --size {-(-int(nearest) // 1000)}KB"
        )
    return best[1]


def are_coded(menus: list[Menu]) -> bool:
    """True if the file of these menus is entropy-coded."""
    return any(option.num_coded is not None for menu in menus for option in menu.options)


def check_reachable(model: nn.Module, step: WeightsStep, candidates: str | Iterable[str], limit: Limit | None) -> None:
    """Before anything is measured: raises BudgetError if even the smallest formats exceed the limit."""
    candidates = list(one_or_more(candidates))
    menus = []
    for site, assigned in step.texts(find_sites(model)):
        texts = candidates_for(step, site, assigned, candidates)
        menus.append(Menu(site, [option_of(site, parse_rule(text)) for text in texts]))
    if limit is not None and smallest_size(model, menus) > limit.num_bytes:
        raise BudgetError(why_infeasible(kept_layout(model, menus), menus, limit))


def smallest_options(menus: list[Menu]) -> list[Option]:
    """Each site's option with the fewest bytes."""
    return [min(menu.options, key=lambda o: o.num_bytes) for menu in menus]


def smallest_size(model: nn.Module, menus: list[Menu]) -> int:
    """Bytes of the smallest file that the menus' options can give."""
    return planned_size(kept_layout(model, menus), menus, smallest_options(menus))


def largest_size(model: nn.Module, menus: list[Menu]) -> int:
    """Bytes of the largest file that the menus' options can give."""
    return planned_size(kept_layout(model, menus), menus, [max(m.options, key=lambda o: o.num_bytes) for m in menus])


def why_infeasible(kept: Tensors, menus: list[Menu], limit: Limit) -> str:
    """The message of a limit that no candidate meets: the nearest reachable size, and what binds."""
    smallest = smallest_options(menus)
    reachable = planned_size(kept, menus, smallest)
    floats = planned_size(kept, menus, [])
    largest, its_option = max(zip(menus, smallest, strict=True), key=lambda pair: pair[1].num_bytes)
    pinned = sum(len(menu.options) == 1 for menu in menus)
    hint = f"; rules and excludes fix {pinned} sites" if pinned else ""
    return (
        f"{limit.text} ({limit.num_bytes:,} bytes) is below what any candidate format reaches: the nearest reachable "
        f"file is {reachable:,} bytes, --size {-(-reachable // 1000)}KB. Of these, {floats:,} bytes are stored as "
        f"they are, and {largest.site.name} alone takes {its_option.num_bytes:,} at {its_option.scheme}{hint}"
    )


def kept_layout(model: nn.Module, menus: list[Menu]) -> Tensors:
    """Name, dtype and shape of every tensor that is stored as it is."""
    kept = other_tensors(model, [menu.site for menu in menus])
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()]


def planned_size(kept: Tensors, menus: list[Menu], chosen: list[Option]) -> int:
    """Bytes of the weights file; with nothing chosen, of what is kept. Exact but for entropy-coded weights."""
    tensors, num_coded = list(kept), 0
    for menu, option in zip(menus, chosen, strict=False):
        if option.num_coded is None:
            tensors += stored_tensors(menu.site, parse_rule(option.scheme), option.num_values)
        else:
            num_coded += option.num_coded
    return file_size(tensors, METADATA) + num_coded


def stored_tensors(site: Site, scheme: Scheme | None, num_values: int = 0) -> Tensors:
    """The tensors that the file holds for one site."""
    if scheme is None:
        return [(site.parameter, site.dtype, site.fold.weight_shape)]
    return [
        (f"{site.parameter}.{part}", dtype, tuple(num_values if side is None else side for side in shape))
        for part, (dtype, shape) in scheme.format.layout(site.shape).items()
    ]


def recipe_of(menus: list[Menu], chosen: list[Option], seed: int) -> Recipe:
    """Spelled out site by site: the recipe says exactly what was done. The most common scheme is the default."""
    schemes = {menu.site.name: option.scheme for menu, option in zip(menus, chosen, strict=True)}
    common = max(set(schemes.values()), key=lambda s: (sum(v == s for v in schemes.values()), s))
    rules = {escape(name): scheme for name, scheme in schemes.items() if scheme != common}
    return Recipe.of(common, rules, seed=seed)


def plan(
    model: nn.Module,
    task: Task | None = None,
    *,
    size: str | None = None,
    ratio: str | None = None,
    bits: float | None = None,
    rules: dict[str, str] | None = None,
    exclude: str | Iterable[str] = (),
    candidates: str | Iterable[str] = CANDIDATES,
    seed: int = 0,
) -> Recipe:
    """The recipe with the least predicted loss under one limit on the weights file, for `tersor.compress`.

    Args:
        task: its calibration split tells where errors hurt; without it errors count relative to each site's weights.
        size, ratio, bits: the limit, as on the command line: `"8MB"`, `"4x"`, `4.2`.
        rules, exclude: sites whose scheme is fixed.
        candidates: the schemes to choose from.

    Raises:
        BudgetError: no candidate reaches the limit; the message names the nearest reachable size.
    """
    original = size_of(model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    limit = Limit.of(original_bytes=original, num_parameters=num_parameters, size=size, ratio=ratio, bits=bits)
    if limit is None:
        raise InputError("plan needs a limit: size='8MB', ratio='4x' or bits=4.2")
    check_has_sites(model)
    stats = estimate_fisher(model, task, seed=seed) if task is not None else {}
    step = Recipe.of(KEEP, rules, exclude).weights[0]
    menus = measure_menus(model, stats, step, candidates)
    if not are_coded(menus):
        return plan_size(model, menus, limit, seed)
    return plan_and_make(model, menus, limit, lambda recipe: run(recipe, model, task, stats=stats), seed).recipe
