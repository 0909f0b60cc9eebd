"""Makes diffusers know of packed UNets, without importing it.

Diffusers looks for quantization methods in two tables and finds plug-ins in no other way. To
import it takes seconds that not everything in this library needs; so the entries are added when
the tables are there, now or later, and what they stand for is imported when it is used.
"""

__all__ = ["register"]

import importlib.util
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLES = "diffusers.quantizers.auto"
METHOD = "bitsfusion"


def register() -> None:
    """Adds the method to the tables of diffusers, as soon as it is imported."""
    if TABLES in sys.modules:
        _add(sys.modules[TABLES])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets the tables be imported as ever, and then adds to them."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _add(module)

        spec.loader.exec_module = exec_module
        return spec


class _Later:
    """Stands for a class until it is asked for something."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _real(self) -> type:
        import_module("bf_lib.diffusers_quantizer")  # puts the real ones into the tables
        return getattr(import_module(self._module), self._name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._real()(*args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real(), name)


def _add(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _Later(
        "bf_lib.diffusers_quantizer", "BitsFusionQuantizer"
    )
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Later(
        "bf_lib.packed_config", "BitsFusionConfig"
    )
