"""The pages that users read: where they are, their code blocks and their links."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
#: Their code runs.
PAGES = (
    *(README, *sorted(DOCS.glob("*.md"))),
    *(ROOT / name for name in ("CONTRIBUTING.md", "api_stub/README.md", "worker/README.md")),
)
FENCE = "```"
_BLOCK = re.compile(
    rf"(?:<!-- not run here: (?P<why>[^>]*) -->\n)?^{FENCE}(?P<language>\w+)\n(?P<code>.*?)^{FENCE}$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page. `why_not_run`: the reason that the page gives for leaving it out."""

    page: Path
    line: int
    language: str
    code: str
    why_not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return a page's blocks in their order."""
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["code"], match["why"])
        for match in _BLOCK.finditer(text)
    ]


def every_page() -> list[Path]:
    """Return all Markdown files of the repository, new ones too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "*.md"]
    listed = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def links_of(page: Path) -> set[str]:
    """Return where a page's links lead, those to other sites left out."""
    return set(re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose_of(page: Path) -> str:
    """Return a page's text without its code blocks."""
    return _BLOCK.sub("", page.read_text("utf-8"))
