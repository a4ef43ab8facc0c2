"""The verbs for use in Python: plain keyword arguments, passed on to the functions that the command line calls.

Each function takes as a keyword every field of the groups of arguments that its job takes: `size` of `Budget`,
`formats` of `Choices`, `dtype` of `ModelSpec`, `batch_sizes` of `Timing`, `on_progress` of `Events`.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from tersor.checkpoint.open import ModelSpec, dtype_named
from tersor.checkpoint.pack import PackedFolder
from tersor.core.arguments import PATH, TASK, Rule, checked, has
from tersor.core.errors import UnknownName
from tersor.core.progress import Events
from tersor.jobs import bench as benching
from tersor.jobs import compare as comparing
from tersor.jobs import compress as compressing
from tersor.jobs import evaluate as evaluating
from tersor.jobs import export as exporting
from tersor.jobs import finetune as finetuning
from tersor.jobs import inspect as inspecting
from tersor.jobs import pack as packing
from tersor.jobs.settings import Output, Timing
from tersor.pipeline import run
from tersor.recipe import Recipe
from tersor.schemes.assignment import one_or_more
from tersor.search.choices import Budget, Choices
from tersor.tasks.contract import Task
from tersor.tasks.data import Data

Model = str | Path | nn.Module
IN_MEMORY = {"stats", "journal", "progress", "on_progress", "on_step"}  # the keywords of a call that judges nothing

# A module is compressed in memory with a task, or with what only has batches to calibrate with.
IN_MEMORY_TASK = Rule(TASK.wanted, lambda value: TASK.holds(value) or has("batches")(value))


def numbers(given: int | Sequence[int]) -> tuple[int, ...]:
    """The numbers as a tuple, of one number or of several."""
    return (given,) if isinstance(given, int) else tuple(given)


# How a keyword becomes the field of a group.
COERCED: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("weights", "calibration", "train", "save_base"), Path),
    **dict.fromkeys(("formats", "exclude", "transforms"), lambda given: tuple(one_or_more(given))),
    **dict.fromkeys(("batch_sizes", "threads"), numbers),
    **dict.fromkeys(("size", "ratio", "drop"), str),
    "dtype": dtype_named,
}


def fields_of(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that are fields of a group of arguments."""
    names = [field.name for field in fields(kind)]
    values = {name: given[name] for name in names if name in given}
    return {name: COERCED[name](v) if name in COERCED and v is not None else v for name, v in values.items()}


def check_known(given: Mapping[str, Any], *kinds: Any) -> None:
    """Raises UnknownName for a keyword that is a field of none of the groups."""
    known = [field.name for kind in kinds for field in fields(kind)]
    for name in given:
        if name not in known:
            raise UnknownName("argument", name, known)


def data_of(task: str | Task | None, data: str | Path | Data | None, given: Mapping[str, Any]) -> Data:
    """The task and its data; a `Data` says all of it."""
    if isinstance(data, Data):
        return data
    return Data(task, None if data is None else Path(data), **fields_of(Data, given))


@checked(task=IN_MEMORY_TASK)
def compress(
    model: Model,
    recipe: Recipe | str | Path | None = None,
    task: str | Task | None = None,
    *,
    data: str | Path | Data | None = None,
    output: str | Path | None = None,
    **more: Any,
) -> compressing.Result:
    """Make a model smaller, and judge what it cost.

    >>> import tersor
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> [(site.name, site.bits_per_weight) for site in tersor.compress(model, "int4-g32").sites]
    [('0', 4.5), ('2', 4.5)]

    Args:
        model: Hugging Face folder or hub id, `package.module:factory`, or a module in memory, which stays as it is.
        recipe: a recipe, its YAML file, or the scheme of every site (`"int4-g64"`), where no budget decides.
        task: a name in `TASKS`, your own `package.module:factory`, or a task itself; None: fidelity.
        data: the task's file or folder.
        output: the folder to write; without it the result is kept in a temporary folder until `save`.
        more: `size`, `ratio`, `bits`, `drop` (the budget), `formats`, `rules`, `exclude`, and every other field of
            `Budget`, `Choices`, `Data`, `ModelSpec`, `Timing` and `Events`; `overwrite`.

    A module with a recipe, and none of data, output and budget, is compressed in memory by `run`, and nothing is
    measured: there is no verdict. Name a `drop`, or the data, to have it judged.

    Raises a TersorError with the way out.
    """
    in_memory = isinstance(model, nn.Module) and recipe is not None and not isinstance(task, str | Data)
    if in_memory and data is output is None and more.keys() <= IN_MEMORY:
        return compressed_in_memory(recipe, model, task, more)
    overwrite = more.pop("overwrite", False)
    check_known(more, Budget, Choices, Data, ModelSpec, Timing, Events)
    choices = Choices(Budget(**fields_of(Budget, more)), read_recipe(recipe), **fields_of(Choices, more))
    place = None if output is not None else tempfile.TemporaryDirectory(prefix="tersor-")
    result = compressing.compress(
        ModelSpec(model, **fields_of(ModelSpec, more)),
        Output(Path(output) if place is None else Path(place.name) / "model", overwrite),  # type: ignore[arg-type]
        data_of(task, data, more),
        choices,
        Timing(**fields_of(Timing, more)),
        Events(**fields_of(Events, more)),
    )
    result.kept.append(place)
    return result


def compressed_in_memory(recipe: Any, model: Any, task: Any, more: Mapping[str, Any]) -> compressing.Result:
    """The result of `run`, which measures nothing."""
    on_progress = more.get("progress") or more.get("on_progress") or Events().on_progress
    events = Events(on_progress, on_step=more.get("on_step", Events().on_step))
    known = {name: more[name] for name in ("stats", "journal") if name in more}
    made = run(read_recipe(recipe) or recipe, model, task, events=events, **known)
    return compressing.Result(**vars(made))


def read_recipe(recipe: Recipe | str | Path | None) -> Recipe | None:
    """A recipe: the given one, one read from a file, or one that applies a single scheme."""
    if isinstance(recipe, Path) or (isinstance(recipe, str) and Path(recipe).suffix in (".yaml", ".yml")):
        return Recipe.from_file(Path(recipe))
    return Recipe.of(recipe) if isinstance(recipe, str) else recipe


@checked()
def evaluate(
    model: Model, task: str | Task | None = None, data: str | Path | Data | None = None, **more: Any
) -> evaluating.Evaluated:
    """The scorecard of a model or artifact. `more` are fields of `Data`, `ModelSpec`, `Timing` and `Events`."""
    check_known(more, Data, ModelSpec, Timing, Events)
    return evaluating.evaluate(
        ModelSpec(model, **fields_of(ModelSpec, more)),
        data_of(task, data, more),
        Timing(**fields_of(Timing, more)),
        Events(**fields_of(Events, more)),
    )


@checked()
def compare(
    *models: Model,
    task: str | Task | None = None,
    data: str | Path | Data | None = None,
    drop: str | float = compressing.DEFAULT_DROP,
    seed: int = 0,
    **more: Any,
) -> comparing.Compared:
    """Scorecards of several models, and the verdict of each against the first, which may be better by `drop`.

    `more` are fields of `Data`, `Timing` and `Events`, and the `dtype` of all models.
    """
    check_known(more, Data, ModelSpec, Timing, Events)
    return comparing.compare(
        [ModelSpec(model, **fields_of(ModelSpec, more)) for model in models],
        data_of(task, data, more),
        str(drop),
        seed,
        Timing(**fields_of(Timing, more)),
        Events(**fields_of(Events, more)),
    )


@checked()
def finetune(
    model: Model,
    output: str | Path,
    task: str | Task,
    data: str | Path | Data | None = None,
    lora: Mapping[str, Any] | None = None,
    **more: Any,
) -> finetuning.Finetuned:
    """Train a model on a task, or adapters beside its weights, and write the folder `output`.

    Args:
        lora: fields of the adapters, such as `{"rank": 16}`; None: the whole model is trained.
        more: fields of the step that trains (`epochs`, `learning_rate`, ...), of `Data` (`train`), `ModelSpec` and
            `Events`; `drop`, `save_base`, `seed`, `overwrite`.
    """
    overwrite = more.pop("overwrite", False)
    groups = (Data, ModelSpec, Events, finetuning.Training)
    known = {field.name for kind in groups for field in fields(kind)}
    settings = {name: value for name, value in more.items() if name not in known}
    step = finetuning.step_named("finetune" if lora is None else "lora", {**settings, **(lora or {})})
    return finetuning.finetune(
        ModelSpec(model, **fields_of(ModelSpec, more)),
        Output(Path(output), overwrite),
        finetuning.Training(step, **fields_of(finetuning.Training, more)),
        data_of(task, data, more),
        Events(**fields_of(Events, more)),
    )


@checked()
def export(
    model: Model,
    output: str | Path,
    to: str | None = None,
    *,
    task: str | Task | None = None,
    data: str | Path | Data | None = None,
    shape: Sequence[int] | None = None,
    options: Mapping[str, Any] = {},
    **more: Any,
) -> exporting.Exported:
    """Write a model for another runtime: `tersor.export("smaller", "small.onnx")`.

    Args:
        to: a name in `EXPORTS`; None: the one that writes files of that suffix.
        task, data, shape: where example inputs come from.
        options: options of the client, such as `{"decode": True}`.
        more: fields of `ModelSpec`, `Data` (`task_options` are its `options`) and `Events`; `fixed`, `num_threads`,
            `overwrite`.
    """
    overwrite, num_threads = more.pop("overwrite", False), more.pop("num_threads", 1)
    fixed = more.pop("fixed", ())
    more |= {"options": more.pop("task_options", {})}
    check_known(more, Data, ModelSpec, Events)
    return exporting.export(
        ModelSpec(model, **fields_of(ModelSpec, more)),
        Output(Path(output), overwrite),
        to or exporting.client_for(Path(output)),
        options,
        exporting.ExampleInputs(data_of(task, data, more), shape, tuple(one_or_more(fixed))),
        num_threads,
        Events(**fields_of(Events, more)),
    )


@checked()
def bench(
    *models: str | Path,
    runtime: str | Sequence[str] = (),
    task: str | Task | None = None,
    data: str | Path | Data | None = None,
    seed: int = 0,
    **more: Any,
) -> benching.Bench:
    """Time models in their runtimes side by side, on made-up inputs or a task's examples.

    `more` are fields of `MadeUp` (`length`, `shape`), `Timing`, `Data` and `Events`, and the `dtype` of all models.
    """
    check_known(more, benching.MadeUp, ModelSpec, Timing, Data, Events)
    specs = [ModelSpec(str(model), **fields_of(ModelSpec, more)) for model in models]
    made_up = benching.MadeUp(**fields_of(benching.MadeUp, more))
    return benching.bench(
        benching.candidates_of(specs, list(one_or_more(runtime))),
        benching.inputs_of(made_up, data_of(task, data, more)),
        Timing(**fields_of(Timing, more)),
        seed,
        Events(**fields_of(Events, more)),
    )


@checked()
def inspect(model: Model, formats: str | Sequence[str] = (), **more: Any) -> inspecting.Inspected:
    """The sites of a model, and what each format would make of them; `more` are fields of `ModelSpec` and `Events`."""
    check_known(more, ModelSpec, Events)
    spec = ModelSpec(model, **fields_of(ModelSpec, more))
    return inspecting.inspect(spec, list(one_or_more(formats)), Events(**fields_of(Events, more)))


@checked(model=PATH)
def pack(model: str | Path, output: str | Path, overwrite: bool = False) -> PackedFolder:
    """Write a checkpoint or an artifact smaller without changing a bit."""
    return packing.pack(Path(model), Output(Path(output), overwrite))


@checked(packed=PATH)
def unpack(packed: str | Path, output: str | Path, overwrite: bool = False) -> PackedFolder:
    """Write plain safetensors again; an artifact's packed weights are decoded."""
    return packing.unpack(Path(packed), Output(Path(output), overwrite))


@checked()
def verify(artifact: str | Path) -> packing.Verified:
    """Read all of an artifact, and raise ArtifactError where it is not what was written."""
    return packing.verify(Path(artifact))
