"""A job whose output another run is writing is refused before it opens anything."""

from functools import partial
from pathlib import Path

import pytest

from tersor.checkpoint.open import ModelSpec
from tersor.checkpoint.output import claimed
from tersor.core.errors import InputError
from tersor.jobs.compress import compress
from tersor.jobs.export import export
from tersor.jobs.merge import merge
from tersor.jobs.pack import pack
from tersor.jobs.settings import Output
from tersor.jobs.stream import stream
from tersor.jobs.student import student
from tersor.recipe import Recipe
from tersor.search.choices import Choices
from tersor.training.student import StudentStep

NOWHERE = ModelSpec("no-such-model")
EIGHT_BITS = Choices(recipe=Recipe.of("int8"))
JOBS = {
    "compress": partial(compress, NOWHERE, choices=EIGHT_BITS),
    "stream": partial(stream, NOWHERE, choices=EIGHT_BITS),
    "export": partial(export, NOWHERE, to="compressed-tensors"),
    "merge": partial(merge, NOWHERE, Path("no-such-adapter")),
    "student": partial(student, NOWHERE, step=StudentStep(layers=1)),
    "pack": partial(pack, Path("no-such-model")),
}


@pytest.mark.parametrize("job", JOBS)
def test_an_output_that_another_run_writes_is_refused_at_once(job, tmp_path):
    with claimed(tmp_path / "out", False), pytest.raises(InputError, match="is writing it; wait for its end"):
        JOBS[job](output=Output(tmp_path / "out"))
