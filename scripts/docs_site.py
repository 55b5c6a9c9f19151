"""Builds the documentation: the guides of docs/ and the API from its docstrings, links checked.

Guides become modules of a throwaway package, so that pdoc renders them beside the API and turns
names such as `jaxsys.train.Trainer` in them into links.
"""

import argparse
import pkgutil
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pdoc
import pdoc.render

import jaxsys

ROOT = Path(__file__).resolve().parent.parent
GUIDE = "guide"
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
    if target not in pages:
        return words
    up = "../" if "." in pages[page] else ""
    where = up + pages[target].replace(".", "/") + ".html"
    return f"[{words}]({where}{'#' + fragment if fragment else ''})"


def modules() -> list[str]:
    """jaxsys and what is directly in it."""
    return ["jaxsys", *(f"jaxsys.{found.name}" for found in pkgutil.iter_modules(jaxsys.__path__))]


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
    pdoc.render.configure(docformat="google", footer_text=f"jaxsys {jaxsys.__version__}")
    pdoc.pdoc(GUIDE, *modules(), output_directory=out)
    (out / "index.html").write_text(
        f'<!doctype html><meta http-equiv="refresh" content="0; url={GUIDE}.html">\n'
    )
    for path in out.rglob("*.html"):
        # pdoc links what is inherited from private classes, which have no entry.
        path.write_text(re.sub(r'<a href="[^"]*#_[^"]*">(.*?)</a>', r"\1", path.read_text()))
    dead = dead_links(out)
    for line in dead:
        print(f"dead link in {line}", file=sys.stderr)
    print(f"{len(list(out.rglob('*.html')))} pages, {len(dead)} dead links: {out / 'index.html'}")
    return 1 if dead else 0


if __name__ == "__main__":
    raise SystemExit(main())
