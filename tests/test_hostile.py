"""Names, numbers and files that nobody meant: each is one message, or is taken for what it is."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tersor
from cli_runner import tersor as run
from tersor.checkpoint.open import open_model
from tersor.checkpoint.source import call_factory, import_object
from tersor.cli import console
from tersor.cli import main as tersor_main
from tersor.core.errors import DataError, InputError, ModelError
from tersor.core.weights_file import write_weights
from tersor.tasks.arrays import read_npz
from tersor.tasks.images import open_images
from tersor.tasks.source import DataSource

# Names.


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody_of_this_name/model"])
def test_names_that_no_file_can_have(name, tmp_path):
    for door in (open_model, tersor.load):
        with pytest.raises((InputError, tersor.TersorError)) as caught:
            door(name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    result = run(capsys, "inspect", str(tmp_path))
    assert result.status == 2
    assert result.stderr.strip() == f"error: '{tmp_path}': cannot be opened: Permission denied"


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    real = type(tmp_path).open

    def refuse(self, *args, **options):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ModelError, match=r"a\.safetensors: cannot be read \(Permission denied\)"):
        open_model(f"{__name__}:linear", weights=tmp_path / "a.safetensors")


def test_any_other_refusal_of_the_system_is_one_line(monkeypatch, capsys):
    def refuse(*_):
        raise OSError(36, "File name too long", "x" * 5000)

    monkeypatch.setattr("tersor.cli.app", refuse)
    with pytest.raises(SystemExit, match="2"):
        tersor_main()
    printed = capsys.readouterr().err
    assert printed.startswith("error: xxx")
    assert printed.endswith("File name too long\n")
    assert len(printed) < 300


def linear() -> nn.Module:
    return nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize("name", ["builtins:exit", "os:abort", "os:_exit", "posix:abort", "sys:exit", "subprocess:run"])
def test_pythons_own_functions_make_no_model(name):
    for door in (call_factory, open_model, lambda n: import_object(n, "task")):
        with pytest.raises(InputError, match="is a part of Python, which makes no model"):
            door(name)


def test_a_name_of_ones_own_that_leads_to_python(tmp_path, monkeypatch):
    code = "from os import abort\nfrom torch import nn\ndef net(): return nn.Linear(2, 2)"
    (tmp_path / "mine_alone.py").write_text(code)
    (tmp_path / "antigravity.py").write_text("from mine_alone import net")  # the user's, not Python's
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match="is a part of Python"):
        call_factory("mine_alone:abort")
    assert isinstance(call_factory("mine_alone:net"), nn.Linear)
    assert isinstance(call_factory("antigravity:net"), nn.Linear)
    sys.modules.pop("antigravity")


# What a terminal shows.


def test_names_are_shown_as_they_are(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(console.out, "_file", shown)
    console.out.print("wn:new", "a:b:c", "[red]x[/red]", "\x1b[31mred\x1b[0m", "\u202egnp.exe")
    assert shown.getvalue() == "wn:new a:b:c [red]x[/red] \\x1b[31mred\\x1b[0m \\u202egnp.exe\n"


def test_tables_show_names_as_they_are(capsys):
    console.print_table("a:b:c [bold]", ["site", "bits:new"], [["wn:new[/]", "4"], ["\x1b[2J:bug:", "8"]])
    printed = capsys.readouterr().out
    for text in ("a:b:c [bold]", "bits:new", "wn:new[/]", "\\x1b[2J:bug:"):
        assert text in printed
    assert "\x1b" not in printed


def test_progress_and_errors_show_names_as_they_are(capsys):
    with console.progress_bars() as report:
        report("compressing a:b:c [red] \x1b[31m", 1, 1)
    with pytest.raises(SystemExit):
        console.fail("no site [red]a:b:c\x1b[31m", as_json=False)
    printed = capsys.readouterr().err
    assert "error: no site [red]a:b:c\\x1b[31m" in printed
    assert "compressing a:b:c [red] \\x1b[31m" in printed


# Numbers.


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))
        self.register_buffer("lowest", torch.tensor(torch.inf))

    def forward(self, x):
        return (self.layer(x) @ x.T + self.mask[: len(x), : len(x)]).softmax(-1)


def test_infinities_in_buffers_are_meant(tmp_path):
    model = Masked()
    write_weights(model.state_dict(), tmp_path / "model.safetensors")
    opened = open_model(f"{__name__}:Masked", weights=tmp_path / "model.safetensors").model
    assert torch.equal(opened.mask, model.mask)
    for bad, name in ((torch.nan, "mask"), (torch.nan, "layer.weight"), (-torch.inf, "layer.weight")):
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state[name][0, 0] = bad
        write_weights(state, tmp_path / "bad.safetensors")
        with pytest.raises(ModelError, match=f"{name}: 1 of 64 values are NaN"):
            open_model(f"{__name__}:Masked", weights=tmp_path / "bad.safetensors")


# Data.


def test_members_of_an_archive_that_are_no_arrays(tmp_path):
    np.savez(tmp_path / "objects.npz", x=np.array([{}, "a"], dtype=object), y=np.zeros(2))
    np.savez(tmp_path / "bytes.npz", x=np.zeros((2, 3)))
    with zipfile.ZipFile(tmp_path / "bytes.npz", "a") as archive:
        archive.writestr("y", b"raw bytes")
        archive.writestr("z.npy", b"not an array")
    with pytest.raises(DataError, match="no array holds Python objects"):
        read_npz(tmp_path / "objects.npz")
    with pytest.raises(DataError, match=r"bytes\.npz: '(y|z)' is no array"):
        read_npz(tmp_path / "bytes.npz")


def test_a_image_of_too_many_pixels(tmp_path, monkeypatch):
    pil = pytest.importorskip("PIL.Image")
    pil.new("L", (40, 40)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png: not a readable image .*decompression bomb"):
        open_images([tmp_path / "bomb.png"], DataSource())
