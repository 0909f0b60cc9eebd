"""What compiled code prints can be dropped, and nothing else."""

import ctypes

from bf_lib.output import without_output


def test_what_compiled_code_prints_is_dropped_and_nothing_else(capfd):
    libc = ctypes.CDLL(None)
    print("before")
    libc.printf(b"C before\n")
    with without_output():
        libc.printf(b"C within\n")
    libc.printf(b"C after\n")
    libc.fflush(None)
    print("after")
    said = capfd.readouterr().out
    assert all(text in said for text in ("before", "C before", "C after", "after"))
    assert "within" not in said


def test_output_is_back_after_an_error(capfd):
    try:
        with without_output():
            raise KeyError("x")
    except KeyError:
        print("back")
    assert "back" in capfd.readouterr().out
