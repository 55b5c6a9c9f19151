"""Builds the documentation: the guides of docs/ and the API from its docstrings, links checked.

Guides become modules of a throwaway package, so that pdoc renders them beside the API and turns
names such as `jaxsys.train.Trainer` in them into links.
"""

import argparse
import importlib
import importlib.util
import pkgutil
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pdoc  # pyright: ignore[reportMissingImports]
import pdoc.render  # pyright: ignore[reportMissingImports]

import jaxsys

ROOT = Path(__file__).resolve().parent.parent
GUIDE = "guide"
STYLE = """
@media (min-width: 770px) { main { width: calc(64rem + var(--sidebar-width)); } }
.pdoc table { display: block; overflow-x: auto; max-width: 100%; }
.pdoc img { max-width: 100%; }
"""
"""Room for lines of 100 characters; wide tables scroll by themselves."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def guides() -> dict[Path, str]:
    """The Markdown files and the modules they become; README.md is the package itself."""
    pages = {ROOT / "README.md": GUIDE}
    for path in sorted((ROOT / "docs").glob("*.md")):
        pages[path] = f"{GUIDE}.{re.sub(r'[^a-z0-9]', '_', path.stem.lower())}"
    return pages


def write_guides(folder: Path) -> None:
    """Writes the package into a folder."""
    pages = guides()
    for path, module in pages.items():
        text = LINK.sub(lambda link, path=path: rewritten(link, path, pages), path.read_text())
        if module == GUIDE:
            text += "\n## API\n\n" + "\n".join(f"- `{name}`" for name in modules())
        *parents, name = module.split(".")
        target = folder.joinpath(*parents, f"{name}.py") if parents else folder / GUIDE
        target = target if parents else target / "__init__.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"__docformat__ = 'markdown'\n__doc__ = {text!r}\n")


def rewritten(link: re.Match[str], page: Path, pages: dict[Path, str]) -> str:
    """A guide's link as the site needs it: to a page, to a picture's file, or its words alone."""
    picture, words, address = link.groups()
    if "://" in address or address.startswith("#"):
        return link[0]
    file, _, fragment = address.partition("#")
    target = (page.parent / file).resolve()
    if picture:
        return f"![{words}]({target})"  # pdoc puts the file's contents into the page
    up = "../" if "." in pages[page] else ""
    if target.parent == ROOT / "results":
        return f"[{words}]({up}results/{target.name})"
    if target not in pages:
        return words
    where = up + pages[target].replace(".", "/") + ".html"
    return f"[{words}]({where}{'#' + fragment if fragment else ''})"


def modules() -> list[str]:
    """jaxsys and what is directly in it."""
    return ["jaxsys", *(f"jaxsys.{found.name}" for found in pkgutil.iter_modules(jaxsys.__path__))]


def hidden_modules(package: str) -> list[str]:
    """Modules that pdoc leaves out, as their package's `__all__` names objects only."""
    module = importlib.import_module(package)
    public = getattr(module, "__all__", None)
    for name in public or ():
        getattr(module, name)  # pdoc does not ask for what is imported when asked for
    found = []
    for inner in pkgutil.iter_modules(getattr(module, "__path__", ()), f"{package}."):
        if public is not None and inner.name.removeprefix(f"{package}.") not in public:
            found.append(inner.name)
        if inner.ispkg:
            found += hidden_modules(inner.name)
    return found


def mended(html: str, *, guide: bool) -> str:
    """A page of pdoc without what does not fit here."""
    # What is inherited from private classes is linked, but has no entry.
    html = re.sub(r'<a href="[^"]*#_[^"]*">(.*?)</a>', r"\1", html)
    if guide:  # has a title of its own, and nothing to list
        html = re.sub(r'<h1 class="modulename">.*?</h1>', "", html, flags=re.DOTALL)
        html = html.replace("<h2>API Documentation</h2>", "")
    return html


class Page(HTMLParser):
    """The fragments of a page and the addresses it leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.names.add(value)
            elif value and name in ("href", "src"):
                self.addresses.append(value)


def dead_links(folder: Path) -> list[str]:
    """Links between the site's pages that lead nowhere."""
    pages: dict[Path, Page] = {}
    for path in folder.rglob("*.html"):
        pages[path] = Page()
        pages[path].feed(path.read_text())
    dead = []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].names if target in pages else None
            if not target.exists() or (parts.fragment and known is not None
                                       and unquote(parts.fragment) not in known):  # fmt: skip
                dead.append(f"{path.relative_to(folder)}: {address}")
    return sorted(set(dead))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/docs", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out/docs")
    out = parser.parse_args().out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    package = out.with_name(out.name + "-guide")
    shutil.rmtree(package, ignore_errors=True)
    write_guides(package)
    sys.path.insert(0, str(package))
    (package / "custom.css").write_text(STYLE)
    version = f"jaxsys {jaxsys.__version__}"
    pdoc.render.configure(docformat="google", footer_text=version, template_directory=package)
    left_out = []
    if importlib.util.find_spec("ray") is None:
        print("without jaxsys.serve.processes.cluster, as ray is not installed", file=sys.stderr)
        left_out = ["!jaxsys.serve.processes.cluster"]
        warnings.filterwarnings("ignore", "Couldn't import jaxsys.serve.processes.cluster")
    pdoc.pdoc(GUIDE, "jaxsys", *hidden_modules("jaxsys"), *left_out, output_directory=out)
    (out / "index.html").write_text(
        f'<!doctype html><meta http-equiv="refresh" content="0; url={GUIDE}.html">\n'
    )
    shutil.copytree(ROOT / "results", out / "results", ignore=shutil.ignore_patterns("*.png"))
    for path in out.rglob("*.html"):
        path.write_text(mended(path.read_text(), guide=GUIDE in (path.stem, path.parent.name)))
    dead = dead_links(out)
    for line in dead:
        print(f"dead link in {line}", file=sys.stderr)
    print(f"{len(list(out.rglob('*.html')))} pages, {len(dead)} dead links: {out / 'index.html'}")
    return 1 if dead else 0


if __name__ == "__main__":
    raise SystemExit(main())
