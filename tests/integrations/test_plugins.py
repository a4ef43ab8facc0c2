"""Plug-ins are imported with the libraries they extend, and never before."""

import importlib
import sys

import pytest

from tersor import integrations


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of two modules, and a plug-in that extends one of them and writes down that it was imported."""
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "__init__.py").write_text("")
    (tmp_path / "shelf" / "books.py").write_text("BOOKS = []")
    (tmp_path / "shelf_plugin.py").write_text("from shelf.books import BOOKS\nBOOKS.append('atlas')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not is_finder(each)])
    monkeypatch.setattr(integrations, "PLUGINS", {"shelf.books": "shelf_plugin"})
    yield
    for name in ("shelf", "shelf.books", "shelf_plugin"):
        sys.modules.pop(name, None)


def is_finder(each):
    return isinstance(each, integrations.PluginFinder)


def test_a_library_that_comes_later(library):
    integrations.install()
    integrations.install()
    assert sum(map(is_finder, sys.meta_path)) == 1
    importlib.import_module("shelf")
    assert "shelf_plugin" not in sys.modules
    assert importlib.import_module("shelf.books").BOOKS == ["atlas"]


def test_a_library_that_is_there(library):
    books = importlib.import_module("shelf.books")
    integrations.install()
    assert books.BOOKS == ["atlas"]


def test_a_library_that_is_not_there(library):
    sys.path.pop(0)
    integrations.install()
    with pytest.raises(ModuleNotFoundError, match="shelf"):
        importlib.import_module("shelf.books")
