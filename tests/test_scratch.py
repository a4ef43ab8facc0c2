"""A system without room: for temporary files, or in memory."""

import errno
import tempfile

import pytest
import torch

from cli_runner import tersor as run
from tersor import cli
from tersor.calibration.offload import ActivationCache
from tersor.checkpoint.container_write import size_of
from tersor.core.errors import InputError
from tersor.core.scratch import scratch_folder


@pytest.fixture
def no_place(monkeypatch, tmp_path):
    """As on a disk that may only be read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))


def test_a_folder_comes_and_goes():
    with scratch_folder() as folder:
        (folder / "file").touch()
    assert not folder.exists()


def test_no_place_is_one_message(no_place):
    message = r"no temporary file can be written \(No such file or directory\); set TMPDIR to a folder with room"
    with pytest.raises(InputError, match=message), scratch_folder():
        pytest.fail("went in")
    with pytest.raises(InputError, match=message):
        ActivationCache(limit=0).keep(torch.ones(3))


def test_what_needs_no_file_needs_no_place(no_place):
    assert size_of(torch.nn.Linear(2, 2)) > 24
    assert ActivationCache(limit=100).keep(torch.ones(3)).sum() == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"
        ),
        RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        PermissionError(errno.EACCES, "Permission denied", "folder/config.json"),
    ],
)
def test_what_the_system_refuses_is_one_message(error, capsys, monkeypatch):
    def fails():
        raise error

    monkeypatch.setattr(cli, "app", fails)
    done = run(capsys, "inspect", "model")
    assert done.status == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    expected = "folder/config.json: Permission denied" if isinstance(error, PermissionError) else "memory"
    assert expected in done.stderr


def test_other_errors_are_shown_whole(capsys, monkeypatch):
    def fails():
        raise RuntimeError("a mistake in tersor")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(RuntimeError, match="a mistake"):
        run(capsys, "inspect", "model")
