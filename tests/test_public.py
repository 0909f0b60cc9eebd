"""What `import bf_lib` offers."""

import subprocess
import sys

import pytest

import bf_lib
from bf_lib.layers import list_layers


def test_public_names_are_those_of_their_modules():
    assert bf_lib.list_layers is list_layers
    assert all(callable(getattr(bf_lib, name)) for name in bf_lib.__all__)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        bf_lib.no_such_name  # noqa: B018


def test_importing_it_imports_nothing_slow():
    program = "import sys, bf_lib; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
