"""The rendered notebooks as web pages: `python -m bf_lib.site RENDERED SITE` (`make site`).

Pages hold their images and styles and read without a network; only formulas stay in TeX then,
because MathJax is fetched when it can be. nbconvert's own page loads three more scripts for
widgets that a rendered notebook does not have, so only its body is used.
"""

__all__ = ["Page", "build", "main"]

import html
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template

from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from bf_lib import nb
from bf_lib.atomic import write_atomically
from bf_lib.paths import ROOT, display_path

TITLE = "BitsFusion, open and reproducible"
LEAD = "1.99-bit weights for the Stable Diffusion UNet, one question a notebook."

SHELL = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="stylesheet" href="site.css">
$scripts</head>
<body>
$top<main>
$body
</main>
$bottom</body>
</html>
""")

MATH = Template("""<script type="text/x-mathjax-config">
MathJax.Hub.Config({tex2jax: {inlineMath: [["$$", "$$"]], processEscapes: true}});
</script>
<script async src="$url"></script>
""")

# Papermill repeats the parameters that the cell above it has just shown.
_WITHOUT_REPEATS = {"enabled": True, "remove_cell_tags": {"injected-parameters"}}
_NOTEBOOK_LINK = re.compile(r'(href="[^":]*)\.ipynb([#"])')


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered notebook as the site shows it."""

    name: str  # without a suffix
    title: str
    summary: str  # the first paragraph, as HTML
    body: str  # HTML
    picture: str | None  # its first image, base64-encoded PNG


def read_page(path: Path) -> Page:
    """Converts a rendered notebook."""
    notebook = nb.read(path)
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        config=Config(TagRemovePreprocessor=_WITHOUT_REPEATS),
    )
    body, _ = exporter.from_notebook_node(notebook)
    body = _NOTEBOOK_LINK.sub(r"\1.html\2", body)
    heading = re.search(r"<h1[^>]*>(.*?)(?:<a class=\"anchor-link\".*?)?</h1>", body, re.DOTALL)
    paragraph = re.search(r"</h1>\s*<p>(.*?)</p>", body, re.DOTALL)
    return Page(
        name=path.stem,
        title=_text(heading[1]) if heading else path.stem,
        summary=paragraph[1] if paragraph else "",
        body=body,
        picture=_first_picture(notebook),
    )


def _text(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup)).strip()


def _first_picture(notebook: NotebookNode) -> str | None:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                return picture.replace("\n", "")
    return None


def _link(page: Page | None, label: str) -> str:
    if page is None:
        return "<span></span>"
    return f'<a href="{page.name}.html">{label.format(html.escape(page.title))}</a>'


def render(page: Page, before: Page | None, after: Page | None) -> str:
    """Returns a notebook's page, with links to its neighbours above and below."""
    links = (
        f"{_link(before, '←&nbsp;{}')}\n"
        f'<span><a href="index.html">All notebooks</a></span>\n'
        f"{_link(after, '{}&nbsp;→')}\n"
    )
    has_math = "$" in page.body
    return SHELL.substitute(
        title=html.escape(page.title),
        scripts=MATH.substitute(url=HTMLExporter().mathjax_url) if has_math else "",
        top=f'<nav class="top">\n{links}</nav>\n',
        body=page.body,
        bottom=f'<nav class="bottom">\n{links}</nav>\n',
    )


def render_index(pages: list[Page]) -> str:
    """Returns the page that lists all notebooks."""
    cards = [
        f'<div class="card"><div>\n<h2>{_link(page, "{}")}</h2>\n<p>{page.summary}</p>\n</div>\n'
        + (f'<img alt="" src="data:image/png;base64,{page.picture}">' if page.picture else "")
        + "</div>"
        for page in pages
    ]
    return SHELL.substitute(
        title=TITLE,
        scripts="",
        top="",
        body="\n".join([f'<h1>{TITLE}</h1>\n<p class="lead">{LEAD}</p>', *cards]),
        bottom="",
    )


def build(rendered: Path, site: Path) -> list[Path]:
    """Writes the site and returns its pages, the index first.

    Arguments:
        rendered: The folder of rendered notebooks, which are put in order of their names.
        site: The folder to write to.
    """
    pages = [read_page(path) for path in sorted(rendered.glob("*.ipynb"))]
    if not pages:
        raise FileNotFoundError(f"no notebooks in {display_path(rendered)}: run `make render`")
    style = (ROOT / "bf_lib" / "site.css").read_text() + HtmlFormatter().get_style_defs(
        ".highlight"
    )
    neighbours = zip([None, *pages[:-1]], pages, [*pages[1:], None], strict=True)
    files = {"index.html": render_index(pages), "site.css": style} | {
        f"{page.name}.html": render(page, before, after) for before, page, after in neighbours
    }
    for name, content in files.items():
        write_atomically(site / name, content.encode())
    return [site / name for name in files if name.endswith(".html")]


def main(rendered: str, site: str) -> int:
    """Builds the site and says where it is; returns the exit status."""
    try:
        pages = build(Path(rendered), Path(site))
    except FileNotFoundError as err:
        print(err, file=sys.stderr)
        return 1
    print(f"{len(pages)} pages; open {pages[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
