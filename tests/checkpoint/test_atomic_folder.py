"""An output folder appears whole or not at all, and nothing of the user's is lost."""

from pathlib import Path

import pytest

from tersor.checkpoint.artifact import MANIFEST, atomic_folder
from tersor.errors import ArtifactError, InputError


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("old")
    return tmp_path / "out"


def test_appears_when_the_block_ends_well(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out/sub/file": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_is_left_when_it_does_not(tmp_path, error, overwrite, request):
    if overwrite:
        request.getfixturevalue("artifact")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_folder(tmp_path / "out", overwrite) as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        raise error
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_an_existing_folder_is_refused(artifact):
    with (
        pytest.raises(InputError, match="out exists; choose another --output, or --overwrite it"),
        atomic_folder(artifact),
    ):
        pytest.fail("went in")
    assert tree(artifact) == {MANIFEST: "old"}


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_what_is_no_artifact_is_never_overwritten(tmp_path, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "thesis").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="not a tersor artifact"), atomic_folder(target, overwrite=True):
        pytest.fail("went in")
    assert tree(tmp_path) == before
    assert target.exists()


def test_an_artifact_is_overwritten_as_a_whole(artifact):
    (artifact / "stale").write_text("old")
    with atomic_folder(artifact, overwrite=True) as folder:
        (folder / MANIFEST).write_text("new")
        assert tree(artifact) == {MANIFEST: "old", "stale": "old"}
    assert tree(artifact.parent) == {f"out/{MANIFEST}": "new"}
    assert [path.name for path in artifact.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("error", "told_as"), [(OSError, ArtifactError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_the_old_artifact_survives_a_failing_rename(artifact, error, told_as, monkeypatch):
    rename, calls = Path.rename, []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(told_as), atomic_folder(artifact, overwrite=True) as folder:
        (folder / MANIFEST).write_text("new")
    assert tree(artifact.parent) == {f"out/{MANIFEST}": "old"}
    assert [path.name for path in artifact.parent.iterdir()] == ["out"]


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"), atomic_folder(tmp_path / "nowhere" / "out"):
        pytest.fail("went in")


def test_relative_names_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path("out")) as folder:
        (folder / "file").write_text("new")
    assert tree(tmp_path) == {"out/file": "new"}


def test_others_may_read_the_folder(tmp_path):
    with atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
