"""The laws of writing, on clients of the table and a small Llama: twice the same bytes, nothing changed, read back."""

import pytest

from tersor.exporters import EXPORTS
from tersor.jobs.export import open_checkpoint
from tersor.testing import LawBroken
from tersor.testing.exporters import what_is_written_is_the_artifact


@pytest.mark.parametrize("name", ["gguf", "gptq", "compressed-tensors"])
def test_written_twice_and_read_back(name, artifact):
    what_is_written_is_the_artifact(EXPORTS[name], open_checkpoint(artifact("int4-g32")))


class Salted(type(EXPORTS["gptq"])):
    """Writes where it stands into its folder."""

    def write(self, checkpoint, output):
        notes = super().write(checkpoint, output)
        (output / "salt").write_text(str(output))
        return notes


def test_other_bytes_are_said_by_file(artifact):
    with pytest.raises(LawBroken, match="written twice, salt has other bytes the second time"):
        what_is_written_is_the_artifact(Salted(), open_checkpoint(artifact("int4-g32")))
