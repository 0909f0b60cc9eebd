import hashlib
import subprocess

import pandas as pd
import pytest

from bf_lib import artifacts, verify
from bf_lib.artifacts import Origin
from bf_lib.verify import BY_NAME, DEFAULT, Tolerance, compare

ORIGIN = Origin(made_by="03_toy", preset="mini", seed=0)
ROWS = pd.DataFrame(
    {"layer": ["a", "b"], "mse": [100.0, 200.0], "share": [0.5, 0.25], "seconds": [1.0, 2.0]}
)
WRITTEN = [f"data/runs/mini/03_toy/{name}" for name in ("rows.csv", "claims.json")]


def git(root, *arguments):
    settings = ["-c", "user.name=toy", "-c", "user.email=toy@localhost"]
    subprocess.run(["git", *settings, *arguments], cwd=root, check=True, capture_output=True)


def save(root, rows, claims, written=WRITTEN):
    folder = root / "data/runs/mini/03_toy"
    artifacts.save_table(rows, folder / "rows.csv", ORIGIN)
    artifacts.save_json(claims, folder / "claims.json", ORIGIN)
    artifacts.write_json({"artifacts": written, "wall_s": 1.0}, folder / "render.json")
    stamp = root / "build/mini/03_toy.done"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text("".join(f"{digest(root / name)} {name}\n" for name in written))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


CLAIMS = [{"name": "share", "value": 0.5, "status": "reproduced", "interval": [0.4, 0.6]}]


@pytest.fixture
def root(tmp_path):
    """A repository with one committed run."""
    git(tmp_path, "init")
    save(tmp_path, ROWS, CLAIMS)
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--message", "run")
    return tmp_path


def test_the_same_run_agrees(root, capsys):
    assert verify.main("mini", root) == 0
    said = capsys.readouterr().out
    assert "all agree" in said and "4 committed files" in said


def test_small_differences_and_other_times_agree(root):
    rows = ROWS.assign(share=ROWS.share * (1 + 1e-5), seconds=[7.0, 8.0])
    save(root, rows, [CLAIMS[0] | {"value": 0.50001}])
    assert verify.main("mini", root) == 0


def test_differences_are_reported_by_place_the_largest_first(root, capsys):
    rows = ROWS.assign(layer=["a", "c"], share=[0.5, 0.5], mse=[110.0, 200.0])
    save(root, rows, [CLAIMS[0] | {"status": "differs"}])
    assert verify.main("mini", root) == 1
    said = capsys.readouterr().out
    assert "rows.csv row 2/layer: committed b, now c" in said
    assert "claims.json 0/status: committed reproduced, now differs" in said
    assert said.index("row 2/share: committed 0.25, now 0.5") < said.index("row 1/mse")
    assert "4 values differ" in said


def test_more_and_fewer_rows_differ(root, capsys):
    save(root, ROWS.iloc[:1], CLAIMS)
    assert verify.main("mini", root) == 1
    assert "row 2/mse: committed 200.0, now None" in capsys.readouterr().out


def test_what_no_notebook_wrote_here_does_not_count_as_fresh(root, capsys):
    rows = root / "data/runs/mini/03_toy/rows.csv"
    save(root, ROWS.assign(mse=[1.0, 2.0]), CLAIMS)
    git(root, "checkout", "--", str(rows))  # the committed file, and nothing that was run
    assert verify.main("mini", root) == 1
    assert "rows.csv: not what its notebook wrote here" in capsys.readouterr().out
    rows.unlink()
    assert verify.main("mini", root) == 1
    assert "rows.csv: not what its notebook wrote here" in capsys.readouterr().out
    (root / "build/mini/03_toy.done").unlink()
    assert verify.main("mini", root) == 1
    assert "no notebook was run here" in capsys.readouterr().err


def test_notebooks_that_were_not_run_are_named_and_not_compared(root, capsys):
    other = root / "data/runs/mini/90_other/rows.csv"
    artifacts.save_table(ROWS, other, ORIGIN)
    git(root, "add", "--all")
    git(root, "commit", "--message", "another")
    artifacts.save_table(ROWS.assign(mse=[1.0, 2.0]), other, ORIGIN)
    assert verify.main("mini", root) == 0
    said = capsys.readouterr().out
    assert "not run here, so not compared: 90_other" in said and "4 committed files" in said


def test_a_run_that_recomputed_nothing_committed_does_not_pass(root, capsys):
    (stamp,) = (root / "build" / "mini").glob("*.done")
    stamp.rename(stamp.with_name("00_other.done"))
    assert verify.main("mini", root) == 1
    said = capsys.readouterr()
    assert "none of the committed values" in said.err and "all agree" not in said.out


def test_claims_are_as_tolerant_as_what_they_are_computed_from():
    old, new = b'[{"value": 2.0, "guidance": 1.0}]', b'[{"value": 2.01, "guidance": 1.01}]'
    assert [d.place for d in compare("claims.json", old, new)[1]] == ["claims.json 0/guidance"]


def test_what_is_no_longer_written_is_said(root, capsys):
    save(root, ROWS, CLAIMS, written=WRITTEN[1:])
    assert verify.main("mini", root) == 1
    assert "rows.csv: no notebook writes it any more" in capsys.readouterr().out


def test_what_was_forgotten_in_a_commit_is_said(root, capsys):
    folder = root / "data/runs/mini/03_toy"
    figure = root / "figures/mini/03_toy-bars.png"
    artifacts.save_table(ROWS, folder / "more.csv", ORIGIN)
    artifacts.save_tensors({}, folder / "weights.safetensors", ORIGIN)
    figure.parent.mkdir(parents=True)
    figure.write_bytes(b"")
    new = [folder / "more.csv", folder / "weights.safetensors", figure]
    save(root, ROWS, CLAIMS, WRITTEN + [path.relative_to(root).as_posix() for path in new])
    assert verify.main("mini", root) == 1
    said = capsys.readouterr().out
    assert "03_toy/more.csv: written here, not committed" in said
    assert "03_toy-bars.json: written here, not committed" in said
    assert "2 files are not comparable" in said


def test_nothing_to_compare_with_is_a_failure(root, tmp_path_factory, capsys):
    assert verify.main("smoke", root) == 1
    assert "nothing is committed for preset smoke" in capsys.readouterr().err
    assert verify.main("mini", tmp_path_factory.mktemp("plain")) == 1
    assert "not a git checkout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("committed", "fresh", "agree"),
    [(1.0, 1.0009, True), (1.0, 1.002, False), (0.0, 1e-7, True), (0.0, 1e-3, False)]
    + [(float("inf"), float("inf"), True), (float("nan"), float("nan"), True)]
    + [(float("inf"), 1.0, False), (1.0, float("nan"), False)],
)
def test_default_tolerance(committed, fresh, agree):
    assert DEFAULT.allows(committed, fresh) is agree


def test_columns_have_their_own_tolerance():
    assert BY_NAME["psnr"] == Tolerance(rtol=1e-2, atol=0.05)
    count, differences = compare("t.csv", b"psnr,share\n30,30\n", b"psnr,share\n30.34,30.34\n")
    assert (count, [d.place for d in differences]) == (2, ["t.csv row 1/share"])
    assert compare("t.csv", b"psnr\n30\n", b"psnr\n30.36\n")[1]


def test_digests_and_captions_of_figures_may_differ():
    old = b'{"caption": "r = 0.91", "content": {"png": "a"}, "drawing": {"function": "f"}}'
    new = b'{"caption": "r = 0.90", "content": {"png": "b"}, "drawing": {"function": "g"}}'
    _, differences = compare("f.json", old, new)
    assert [d.place for d in differences] == ["f.json drawing/function"]
