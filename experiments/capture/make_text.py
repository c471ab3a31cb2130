# SPDX-License-Identifier: Apache-2.0
"""Turn the article "Atomic Commit In SQLite" of the Debian package sqlite3-doc into text.txt."""

import argparse
import html.parser
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from harness import write_text

BLOCKS = {"h1", "h2", "p", "li"}
SKIPPED = {"script", "style", "pre"}
MAX_BYTES = 26_000


class Article(html.parser.HTMLParser):
    """Collects headings, paragraphs and list items as one line each, from the first <h1> on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.parts: list[str] | None = None
        self.skipping = False

    def close_block(self) -> None:
        """Ends the current block, if it holds any text; a leading section number is dropped."""
        text = " ".join("".join(self.parts or []).split())
        text = re.sub(r"^(\d+\. ?)+(\d )?", "", text)
        if text:
            self.blocks.append(text)
        self.parts = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in SKIPPED:
            self.skipping = True
        if tag in BLOCKS and (tag == "h1" or self.parts is not None):
            self.close_block()

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self.skipping = False
        if tag in BLOCKS and self.parts is not None:
            self.close_block()

    def handle_data(self, data: str) -> None:
        if self.parts is not None and not self.skipping:
            self.parts.append(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("html", type=Path, help="atomiccommit.html from sqlite3-doc 3.40.1")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("text.txt"))
    args = parser.parse_args()

    article = Article()
    article.feed(args.html.read_text(encoding="utf-8"))
    text = ""
    for block in article.blocks:
        if len((text + block).encode()) > MAX_BYTES:
            break
        text += block + "\n\n"
    write_text(args.out, text.rstrip() + "\n")


if __name__ == "__main__":
    main()
