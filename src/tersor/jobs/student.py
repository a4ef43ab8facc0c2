"""The job of `tersor student`: a smaller model cut from a larger one, to be taught by it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.checkpoint.container_write import size_of
from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.output import atomic_folder, claimed
from tersor.checkpoint.side_files import copy_side_files
from tersor.core.progress import Events
from tersor.jobs.settings import Output
from tersor.training.architectures import architecture_of
from tersor.training.student import StudentStep, make_student


@dataclass(frozen=True)
class Student:
    """The folder that was written, the name of the teacher, and the sizes of both by the words of their config."""

    output: Path
    teacher: str
    sizes: dict[str, dict[str, int]]


def student(teacher: ModelSpec, output: Output, step: StudentStep, events: Events = Events()) -> Student:
    """Cut a student from a Hugging Face model and write it as one, in the type that the teacher is opened in.

    Raises InputError for an architecture or sizes that cannot be cut.
    """
    with claimed(output.path, output.overwrite):
        source = teacher.open()
        made = make_student(source.model, step)
        with atomic_folder(output.path, output.overwrite) as folder:
            if source.folder is not None:
                copy_side_files(source.folder, folder)
            made.save_pretrained(folder)
        for note in source.notes:
            events.on_note(note)
        return Student(output.path, source.name, {"teacher": sizes_of(source.model), "student": sizes_of(made)})


def sizes_of(model: nn.Module) -> dict[str, int]:
    """The sizes of a model (layers, widths, heads), by the words of its configuration."""
    names = architecture_of(model, "student")
    fields = (names.num_layers, names.hidden, names.num_heads, names.intermediate)
    config: Any = model.config
    known = {name: value for name in fields if (value := getattr(config, name)) is not None}
    return {**known, "parameters": sum(p.numel() for p in model.parameters()), "bytes": size_of(model)}
