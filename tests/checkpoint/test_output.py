"""Outputs appear whole or not at all, nothing of the user's is lost, and what killed runs leave goes away."""

import json
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tersor.checkpoint import output
from tersor.checkpoint.output import NEW, OLD, atomic_file, atomic_folder, check_output, claimed
from tersor.checkpoint.seal import MANIFEST, SEAL, first_foreign, listed_in
from tersor.core.errors import ArtifactError, InputError
from tersor.core.files import sha256
from tersor.core.lock import held


def tree(folder: Path) -> dict[str, str]:
    """Every file but the lists, with its text."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SEAL]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def written(tmp_path):
    """A folder that tersor wrote."""
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("old")
    return tmp_path / "out"


def test_appears_when_the_block_ends_well(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == {"out/sub/file": "new"}
    assert names(tmp_path) == ["out"]
    assert listed_in(tmp_path / "out") == {
        "sub/file": {"sha256": sha256(tmp_path / "out" / "sub" / "file"), "bytes": len("new")}
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_is_left_when_it_does_not(tmp_path, error, overwrite, request):
    if overwrite:
        request.getfixturevalue("written")
    before = tree(tmp_path)
    with pytest.raises(error), atomic_folder(tmp_path / "out", overwrite) as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        raise error
    assert tree(tmp_path) == before
    assert names(tmp_path) == (["out"] if overwrite else [])


def test_an_existing_folder_is_refused(written):
    with pytest.raises(InputError, match="out exists; choose another --output, or --overwrite it"):
        check_output(written, overwrite=False)
    assert tree(written) == {"sub/file": "old"}


def add(name, text="mine"):
    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return change


def forget_the_list(folder):
    (folder / SEAL).unlink()


def as_old_artifact(folder):
    """Whose manifest lists the weights alone."""
    (folder / SEAL).unlink()
    (folder / "model.safetensors").write_text("weights")
    files = {"model.safetensors": {"sha256": sha256(folder / "model.safetensors"), "bytes": 7}}
    (folder / MANIFEST).write_text(json.dumps({"tersor": 1, "files": files}))


def empty_manifest(folder):
    (folder / SEAL).unlink()
    (folder / MANIFEST).write_text("{}")


def list_by_hand(folder):
    """The user's own file, entered into tersor's list."""
    add("mine")(folder)
    content = json.loads((folder / SEAL).read_text())
    content["files"]["mine"] = {"sha256": sha256(folder / "mine"), "bytes": 4}
    (folder / SEAL).write_text(json.dumps(content))


FOREIGN = {
    "a note": (add("zz notes.txt"), "zz notes.txt, which tersor did not write"),
    "a note in a subfolder": (add("sub/notes.txt"), "sub/notes.txt, which"),
    "a hidden file": (add(".git/HEAD"), ".git/HEAD, which"),
    "an empty folder": (lambda folder: (folder / "runs").mkdir(), "runs, which"),
    "a link": (lambda folder: (folder / "data").symlink_to("/"), "data, which"),
    "a changed file": (add("sub/file", "new"), "sub/file in it was changed since tersor wrote it"),
    "no list": (forget_the_list, "holds sub/file, and no list of files"),
    "a manifest that says nothing": (empty_manifest, "holds sub/file, and no list"),
    "a list that is none": (add(SEAL, '{"files": {"sub/file": 3}}'), "and no list"),
    "a list of the user's beside tersor's": (add(MANIFEST, "mine"), "tersor.json, which"),
    "a list changed by hand": (list_by_hand, "tersor-files.json in it was changed since"),
    "an older artifact": (as_old_artifact, "sub/file, which"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_tersor_did_not_write_is_never_replaced(written, what):
    change, named = FOREIGN[what]
    change(written)
    before = tree(written)
    message = re.escape(named) + ".*so --overwrite does not touch it; choose another --output, or delete it yourself"
    with pytest.raises(InputError, match=message):
        check_output(written, overwrite=True)
    assert tree(written) == before
    assert names(written.parent) == ["out"]
    with pytest.raises(InputError, match=re.escape(named)), atomic_folder(written, overwrite=True):
        pass
    assert tree(written) == before


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "thesis").write_text("precious")
    with pytest.raises(InputError, match="it is no folder, so --overwrite does not touch it"):
        check_output(tmp_path / "thesis", overwrite=True)


def test_a_written_folder_is_replaced_as_a_whole(written):
    with atomic_folder(written, overwrite=True) as folder:
        (folder / "file").write_text("new")
        assert tree(written) == {"sub/file": "old"}
    assert tree(written.parent) == {"out/file": "new"}
    assert names(written.parent) == ["out"]
    assert first_foreign(written) is None


def test_a_link_to_a_written_folder_stays_one(written, tmp_path):
    (tmp_path / "link").symlink_to("out")
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert tree(written) == {"file": "new"}


@pytest.mark.parametrize(("error", "told_as"), [(OSError, ArtifactError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_the_old_folder_survives_a_failing_rename(written, error, told_as, monkeypatch):
    rename, calls = Path.rename, []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(told_as), atomic_folder(written, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert tree(written.parent) == {"out/sub/file": "old"}
    assert names(written.parent) == ["out"]


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        check_output(tmp_path / "nowhere" / "out", overwrite=False)
    with pytest.raises(ArtifactError, match="cannot be written: No such"), atomic_folder(tmp_path / "nowhere" / "out"):
        pytest.fail("went in")


def test_relative_and_very_long_names_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out", "x" * 255, "ü" * 127):
        check_output(Path(name), overwrite=False)
        with atomic_folder(Path(name)) as folder:
            (folder / "file").write_text("new")
        assert tree(tmp_path / name) == {"file": "new"}
    with pytest.raises(InputError, match=r"cannot write in .*: File name too long"):
        check_output(Path("x" * 256), overwrite=False)


@pytest.mark.parametrize("place", ["/", "/..", "//"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_place_without_a_name_is_refused(place, overwrite):
    with pytest.raises(InputError, match="no name for an output; choose another --output"):
        check_output(Path(place), overwrite)


def test_others_may_read_the_folder(tmp_path):
    with atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_all_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Or a power cut leaves the new name with nothing in it."""
    flushed, fsync = [], os.fsync

    def flush(handle):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        assert not (tmp_path / "out").exists()
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")
        expected = {folder, folder / "sub", folder / "sub" / "file", folder / SEAL}
    assert set(flushed) == expected


# What appears while a run is at work.


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_appears_meanwhile_is_left_alone_and_the_work_is_kept(tmp_path, what):
    with (  # noqa: PT012
        pytest.raises(InputError, match=r"out appeared while the command ran.*finished work is in") as refused,
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "file").write_text("new")
        match what:
            case "folder":
                add("out/thesis.txt")(tmp_path)
            case "file":
                (tmp_path / "out").write_text("mine")
            case "link":
                (tmp_path / "out").symlink_to("elsewhere")
    assert os.path.lexists(tmp_path / "out")
    assert "mine" in tree(tmp_path).values() or what == "link"
    kept = Path(str(refused.value).split("is in ")[1].split(": move")[0])
    assert tree(kept) == {"out/file": "new"}
    with pytest.raises(InputError, match="exists"):
        check_output(tmp_path / "out", overwrite=False)
    assert tree(kept) == {"out/file": "new"}  # the next run does not clean it away


def test_what_is_put_into_the_old_folder_meanwhile_is_not_lost(written):
    with (  # noqa: PT012
        pytest.raises(InputError, match=r"changed while the command ran \(it holds thesis.txt.*finished work is in"),
        atomic_folder(written, overwrite=True) as folder,
    ):
        (folder / "file").write_text("new")
        add("thesis.txt")(written)
    assert tree(written) == {"sub/file": "old", "thesis.txt": "mine"}


# Runs that were killed.


def kill(folder, when):
    """Have a process of its own replace the folder, and die inside the block or when the new one is to appear."""

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            if when == "between":
                output.appear = die
            with atomic_folder(folder, overwrite=True) as working:
                (working / "file").write_text("new")
                if when == "inside":
                    die()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("when", ["inside", "between"])
def test_the_next_run_removes_what_a_killed_one_left_and_puts_back_what_it_set_aside(written, when):
    kill(written, when)
    left = [name for name in names(written.parent) if name.startswith(".out.")]
    assert len(left) == 1
    assert written.exists() == (when == "inside")
    with pytest.raises(InputError, match="out exists"):
        check_output(written, overwrite=False)
    assert tree(written.parent) == {"out/sub/file": "old"}
    assert names(written.parent) == ["out"]


def test_a_run_that_lives_is_never_cleaned_away(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        with pytest.raises(InputError, match=f"process {os.getpid()} on .* is writing it; wait for its end"):
            check_output(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out/file": "new"}


@pytest.mark.parametrize("about", [{"output": "out", "host": "elsewhere"}, {"output": "out.b"}, {"output": None}, None])
def test_what_is_not_known_to_be_of_a_dead_run_is_left_alone(tmp_path, about):
    place = tmp_path / ".out.12345678"
    (place / NEW).mkdir(parents=True)
    if about is not None:
        with held(place / "lock", **about):
            pass
    told = about is not None and "host" in about
    with pytest.warns(UserWarning, match="is left of process .* on elsewhere") if told else nullcontext():
        check_output(tmp_path / "out", overwrite=False)
    assert place.exists()


# Single files.


def not_ours(path):
    return None if path.read_text().startswith("ours") else "it does not say that tersor wrote it"


def write_pair(output, text, overwrite=False, data=True):
    check_output(output, overwrite, not_ours, [f"{output.name}.data"])
    with atomic_file(output, overwrite, not_ours, [f"{output.name}.data"]) as path:
        path.write_text(f"ours {text}")
        if data:
            path.with_name(f"{path.name}.data").write_text(text)


def test_files_appear_together_and_are_replaced_together(tmp_path):
    output = tmp_path / "model.onnx"
    write_pair(output, "one")
    assert tree(tmp_path) == {"model.onnx": "ours one", "model.onnx.data": "one"}
    with pytest.raises(InputError, match=r"model.onnx exists; choose another --output, or --overwrite it"):
        write_pair(output, "two")
    write_pair(output, "two", overwrite=True)
    assert tree(tmp_path) == {"model.onnx": "ours two", "model.onnx.data": "two"}
    write_pair(output, "three", overwrite=True, data=False)
    assert tree(tmp_path) == {"model.onnx": "ours three"}
    assert output.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_file_that_tersor_did_not_write_is_never_replaced(tmp_path, name, overwrite):
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=rf"{name}( exists|: it does not say that tersor wrote it)"):
        write_pair(tmp_path / "model.onnx", "new", overwrite)
    assert tree(tmp_path) == {name: "precious"}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path, name):
    with (  # noqa: PT012
        pytest.raises(InputError, match=f"{name} appeared while the command ran"),
        atomic_file(tmp_path / "model.onnx", False, not_ours, ["model.onnx.data"]) as path,
    ):
        path.write_text("ours")
        path.with_name("model.onnx.data").write_text("data")
        (tmp_path / name).write_text("precious")
    assert (tmp_path / name).read_text() == "precious"
    assert [each for each in names(tmp_path) if not each.startswith(".")] == [name]


def test_files_on_a_disk_without_links(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    write_pair(tmp_path / "model.onnx", "one")
    write_pair(tmp_path / "model.onnx", "two", overwrite=True)
    assert tree(tmp_path) == {"model.onnx": "ours two", "model.onnx.data": "two"}


@pytest.mark.parametrize("placed", [[], ["model.onnx.data"]])
def test_files_are_put_back_after_a_kill_between_renames(tmp_path, placed):
    place = tmp_path / ".model.onnx.12345678"
    for folder, text in ((place / NEW, "new"), (place / OLD, "old")):
        folder.mkdir(parents=True)
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_text(text)
    with held(place / "lock", output="model.onnx"):
        pass
    for name in placed:
        os.link(place / NEW / name, tmp_path / name)
    with pytest.raises(InputError, match="exists"):
        check_output(tmp_path / "model.onnx", False, not_ours, ["model.onnx.data"])
    assert tree(tmp_path) == {"model.onnx": "old", "model.onnx.data": "old"}


def test_a_disk_that_refuses_others_writers_is_one_message(tmp_path):
    """`save_pretrained` of transformers and peft raise an error of their own for a full disk."""
    with (
        pytest.raises(ArtifactError, match=r"out: cannot be written: .*No such file"),
        atomic_folder(tmp_path / "out") as folder,
    ):
        save_file({"weight": torch.ones(2)}, folder / "gone" / "model.safetensors")
    assert names(tmp_path) == []


def test_a_claim_holds_the_output_from_the_start(tmp_path):
    """A second run is refused before its work, the first writes as ever, and nothing stays beside the output."""
    with claimed(tmp_path / "out", False):
        with pytest.raises(InputError, match="is writing it; wait for its end"), claimed(tmp_path / "out", False):
            pass
        with pytest.raises(InputError, match="is writing it"):
            check_output(tmp_path / "out", False)
        with claimed(tmp_path / "other", False), atomic_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("new")
    assert names(tmp_path) == ["out"]
    with pytest.raises(InputError, match="exists"), claimed(tmp_path / "out", False):
        pass
    with pytest.raises(KeyError), claimed(tmp_path / "out", True):
        raise KeyError
    assert names(tmp_path) == ["out"]
