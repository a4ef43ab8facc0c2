"""`tersor finetune MODEL --task T --data EVAL --train FILE -o OUT`: train a model, or adapters beside its weights."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.checkpoint.open import ModelSpec
from tersor.cli import options
from tersor.cli.console import events, leave, out, print_json
from tersor.core.errors import InputError
from tersor.jobs.finetune import Finetuned, Training, step_named
from tersor.jobs.finetune import finetune as finetune_model
from tersor.jobs.settings import Output
from tersor.training import FinetuneStep, LoraStep

KEYS = {"r": "rank", "lora_alpha": "alpha", "use_dora": "dora", "target_modules": "targets"}  # peft's words for ours

Lora = Annotated[
    list[str] | None,
    typer.Option(
        help="Train adapters: r=16,alpha=32,dropout=0.05,dora=true,init=pissa,targets=q_proj+v_proj. Repeatable."
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Pack the weights beside the adapters (QLoRA): a scheme such as nf4, nf4-dq, int4-g64."),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Examples of one forward pass (default 32).")]
Optimizer = Annotated[str | None, typer.Option(help="adamw, sgd, or on a GPU adamw-8bit.")]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice rather than keep them.")
]


def finetune(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or for --lora an artifact.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to create.")],
    lora: Lora = None,
    base: Base = None,
    save_base: Annotated[
        Path | None, typer.Option("--save-base", help="Also write the packed base, as an artifact for tersor merge.")
    ] = None,
    weights: options.Weights = None,
    task: options.TaskName = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    train: options.Train = None,
    task_option: options.TaskOption = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data (default 3).")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --epochs.")] = None,
    batch_size: BatchSize = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes to one optimizer step (default 1).")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate (default 5e-5; adapters 2e-4).")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Fraction of steps of rising rate (default 0.1).")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="How the rate falls: cosine (default), linear, constant.")
    ] = None,
    optimizer: Optimizer = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="For matrices (default 0.01).")] = None,
    precision: Annotated[str | None, typer.Option(help="Forward pass: float32 (default), bf16, fp16.")] = None,
    gradient_checkpointing: Checkpointing = False,
    evaluations: Annotated[
        int | None, typer.Option(help="How often the held-out part of the training data is scored (default 5).")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many evaluations without a better score; keep the best.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16, to compute in; auto: float32, with --lora what the model came in."
        ),
    ] = "auto",
    drop: options.Drop = "1%",
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    exit_code: options.ExitCode = False,
    json: options.Json = False,
) -> None:
    """Train a model on a task, whole or by adapters (LoRA, QLoRA, DoRA)."""
    fields = {
        "epochs": epochs,
        "num_steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "schedule": schedule,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "precision": precision,
        "gradient_checkpointing": gradient_checkpointing,
        "num_evaluations": evaluations,
        "patience": patience,
    }
    training = Training(step_of(lora, base, fields), drop, save_base, seed)
    kind = None if dtype == "auto" else options.dtype_named(dtype)
    chosen = options.task_data(task, data, calibration, task_option, train)
    with events(json) as listener:
        made = finetune_model(ModelSpec(model, weights, kind), Output(output, overwrite), training, chosen, listener)
    if json:
        print_json({"output": str(output), **made.to_dict()})
    else:
        show(made, save_base)
    leave(made.verdict.outcome, exit_code)


def step_of(lora: list[str] | None, base: str | None, fields: dict[str, Any]) -> FinetuneStep | LoraStep:
    """The recipe step that the flags describe. Raises InputError for a field or a value that it does not take."""
    if lora is not None:
        return step_named("lora", {**fields, **lora_fields(lora), "base": base})
    if base is not None:
        raise InputError(f"--base {base} packs the weights beside adapters; add --lora r=16,alpha=32")
    return step_named("finetune", fields)


def lora_fields(texts: list[str]) -> dict[str, Any]:
    """Parse `r=16,alpha=32` into fields of the step.

    >>> lora_fields(["r=8,dora=true", "targets=q_proj+v_proj"])
    {'rank': 8, 'dora': True, 'targets': ['q_proj', 'v_proj']}
    """
    found: dict[str, Any] = {}
    for text in ",".join(texts).split(","):
        key, value = options.key_value(text, "--lora")
        key = KEYS.get(key, key)
        if value in ("true", "false"):
            value = value == "true"
        if key in ("targets", "modules_to_save") and value not in ("blocks", "usual"):
            value = str(value).split("+")
        found[key] = value
    return found


def show(made: Finetuned, save_base: Path | None) -> None:
    """Print the scores before and after, the verdict, and the next command to run."""
    losses = made.curve.losses
    tail = losses[-max(1, len(losses) // 10) :]
    out.print(
        f"trained: {len(losses)} steps in {made.curve.seconds:.0f} s, loss {losses[0]:.4f} -> "
        f"{sum(tail) / len(tail):.4f}",
        highlight=False,
    )
    out.print(
        f"{made.before.metric.name}: {made.before.value:.4f} before, {made.after.value:.4f} after", highlight=False
    )
    out.print(f"measured on: {made.task}", markup=False, highlight=False)
    out.print(f"verdict: {made.verdict.sentence()}", style="bold", markup=False, highlight=False)
    if isinstance(made.step, LoraStep):
        out.print(
            f"adapter: {made.output}  (load it with peft, or put it into its base: tersor merge "
            f"{save_base or 'BASE'} {made.output} -o OUT)",
            markup=False,
            highlight=False,
        )
    else:
        out.print(f"model: {made.output}", markup=False, highlight=False)
