import io
import time

import pytest

from bf_lib import progress as module
from bf_lib.progress import describe, duration, progress, relayed


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_describe():
    assert describe("sweep", 0, 768, None) == "sweep 0/768"
    assert describe("sweep", 120, 768, 3.24) == "sweep 120/768, 3.2/s, 3 min 20 s left"
    assert describe("sweep", 1, 3, 0.1) == "sweep 1/3, 10.0 s each, 20 s left"
    assert describe("sweep", 3, 3, 2.0) == "sweep 3/3, 2.0/s"
    assert describe("rows", 7, None, 2.0) == "rows 7, 2.0/s"


def test_headless_without_a_file_is_silent(monkeypatch, capfd):
    monkeypatch.setenv("BF_HEADLESS", "1")
    assert list(progress(range(3), desc="sweep")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_headless_writes_lines(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("BF_HEADLESS", "1")
    monkeypatch.setenv("BF_PROGRESS", str(tmp_path / "lines"))
    monkeypatch.setattr(module, "WRITE_EVERY", 0.0)
    assert list(progress(iter("abc"), total=3, desc="sweep")) == ["a", "b", "c"]
    lines = (tmp_path / "lines").read_text().splitlines()
    assert lines[0] == "sweep 0/3"
    assert lines[-1].startswith("sweep 3/3, ")
    assert len(lines) == 5
    assert capfd.readouterr() == ("", "")  # nothing in the page


def test_lines_are_few(monkeypatch, tmp_path):
    monkeypatch.setenv("BF_HEADLESS", "1")
    monkeypatch.setenv("BF_PROGRESS", str(tmp_path / "lines"))
    assert sum(1 for _ in progress(range(10_000), desc="quick")) == 10_000
    lines = (tmp_path / "lines").read_text().splitlines()
    assert lines[0] == "quick 0/10000" and lines[-1].startswith("quick 10000/10000")
    assert len(lines) < 10


def test_live_shows_a_bar(capfd):
    assert list(progress(range(3), desc="sweep")) == [0, 1, 2]
    assert "sweep: 100%" in capfd.readouterr().err


def test_relay_shows_the_newest_complete_line(tmp_path):
    path, log = tmp_path / "lines", io.StringIO()
    with relayed(path, log, prefix="[mini] ", every=0.01):
        time.sleep(0.05)  # the file is not there yet
        path.write_text("sweep 0/9\nsweep 1/9\nswe")
        wait_for(lambda: "sweep 1/9" in log.getvalue())
        path.write_text("sweep 0/9\nsweep 1/9\nsweep 5/9\n")
        wait_for(lambda: "sweep 5/9" in log.getvalue())
    assert log.getvalue() == "[mini] sweep 1/9\n[mini] sweep 5/9\n"


def test_relay_is_patient_with_logs():
    assert module.SHOW_EVERY["log"] >= 15


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
