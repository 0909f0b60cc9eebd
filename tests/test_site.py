import re

import nbformat
import pytest

from bf_lib import site

new = nbformat.v4
PIXEL = "iVBORw0KGgo="  # only the first bytes of an image


def notebook(path, title, *cells):
    cells = [new.new_markdown_cell(f"# {title}\n\nAbout *it*.\n\nMore."), *cells]
    nbformat.write(new.new_notebook(cells=cells), path)


@pytest.fixture
def pages(tmp_path):
    rendered = tmp_path / "rendered"
    rendered.mkdir()
    picture = new.new_output("display_data", data={"image/png": PIXEL})
    notebook(
        rendered / "01_first.ipynb",
        "First < things",
        new.new_markdown_cell("See [two](02_second.ipynb#more) or [the model](../../data/x.md)."),
        new.new_code_cell("x = 1", execution_count=1, outputs=[picture]),
    )
    notebook(rendered / "02_second.ipynb", "Second", new.new_markdown_cell("With $x^2$."))
    site.build(rendered, tmp_path / "site")
    return {path.name: path.read_text() for path in (tmp_path / "site").iterdir()}


def test_the_index_lists_all_with_their_first_words(pages):
    index = pages["index.html"]
    assert re.findall(r'<h2><a href="([^"]+)">([^<]+)</a>', index) == [
        ("01_first.html", "First &lt; things"),
        ("02_second.html", "Second"),
    ]
    assert "About <em>it</em>." in index
    assert PIXEL in index


def test_neighbours_are_linked(pages):
    assert pages["01_first.html"].count('<a href="02_second.html">Second&nbsp;→</a>') == 2
    assert (
        pages["02_second.html"].count('<a href="01_first.html">←&nbsp;First &lt; things</a>') == 2
    )
    assert "&nbsp;→</a>" not in pages["02_second.html"]
    assert pages["02_second.html"].count('<a href="index.html">') == 2


def test_links_between_notebooks_lead_to_pages(pages):
    assert 'href="02_second.html#more"' in pages["01_first.html"]
    assert 'href="../../data/x.md"' in pages["01_first.html"]  # the site lies as deep


def test_pages_read_without_a_network(pages):
    for name, page in pages.items():
        fetched = re.findall(r'(?:src|href)="((?:https?:)?//[^"]+)"', page)
        if name == "02_second.html":
            assert len(fetched) == 1 and "mathjax" in fetched[0].lower()  # formulas, when it can
        else:
            assert fetched == [], name
    assert "@import" not in pages["site.css"] and "url(" not in pages["site.css"]


def test_code_and_pictures_are_in_the_page(pages):
    assert f'src="data:image/png;base64,{PIXEL}"' in pages["01_first.html"]
    assert 'class="highlight' in pages["01_first.html"] and ".highlight" in pages["site.css"]
    assert "In [1]" not in pages["01_first.html"]


def test_nothing_rendered_yet(tmp_path, capsys):
    assert site.main(str(tmp_path), str(tmp_path / "site")) == 1
    assert "run `make render`" in capsys.readouterr().err
