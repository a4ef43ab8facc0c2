"""tersor from inside other libraries. Each plug-in is imported as soon as the library's module that it extends is, and
no sooner: `import tersor` loads none of these libraries, and their users need to import nothing but tersor, before the
library or after it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PLUGINS = {"transformers.quantizers.auto": "tersor.integrations.transformers"}  # module extended: module that does it


class PluginFinder(MetaPathFinder):
    """Finds a module of `PLUGINS` as Python would without it, and has it import the plug-in when it has been run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in PLUGINS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            import_module(PLUGINS[name])

        loader.exec_module = exec_module
        return spec


def install() -> None:
    """Import the plug-ins whose libraries are there, and wait for the others. Doing so again changes nothing."""
    for extended, plugin in PLUGINS.items():
        if extended in sys.modules:
            import_module(plugin)
    if not any(isinstance(finder, PluginFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PluginFinder())
