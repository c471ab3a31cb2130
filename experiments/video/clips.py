#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Bring the clips of Debian's opencv-doc into build/video/NAME.npy: frames of 360 x 240, RGB,
uint8.

The package is downloaded with apt-get and not installed; a package, or the clip itself, that lies
in build/video already is taken instead. Every clip has a pinned SHA-256. A clip keeps its
proportions: it is scaled until it covers 360 x 240, and what is too much is cut off on both sides.
Needs dpkg-deb, but no root.
"""
import argparse
import gzip
import hashlib
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parent / "capture")]

from harness import writing  # noqa: E402
from texts import read_member  # noqa: E402

CACHE = HERE.parents[1] / "build" / "video"
PACKAGE, VERSION = "opencv-doc", "4.6.0+dfsg-12"
LICENCE = "Apache-2.0 and BSD-3-Clause, as the package's"
WIDTH, HEIGHT = 360, 240


@dataclass(frozen=True)
class Clip:
    """A file of the package."""

    file: str
    sha256: str  # of the file in the package, packed where it is


CLIPS = {
    "vtest": Clip("usr/share/doc/opencv-doc/examples/data/vtest.avi",
                  "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf"),
    "cup": Clip("usr/share/doc/opencv-doc/opencv4/html/cup.mp4.gz",
                "d63f6bca6b0722c64486672614351d94dcd7d37a8104dc6e55e12f40fa582a9b"),
    "box": Clip("usr/share/doc/opencv-doc/opencv4/html/box.mp4.gz",
                "2c38968ca5216a9d9d152913b583c501333f30578f9eedebe6e6d88768754737"),
}


def fail(message):
    sys.exit(f"clips: {message}")


def find_package(folder):
    """The package in folder, downloaded unless it is there."""
    if not list(folder.glob(f"{PACKAGE}_*.deb")):
        print(f"Downloading {PACKAGE}, 95 MB, with apt-get", file=sys.stderr)
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True,
                           capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            fail(
                f"cannot download {PACKAGE} with apt-get (offline, not Debian, or 'apt-get update' "
                "was never run?); "
                f"put the package into {folder} by hand")
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def content(name, folder):
    """The bytes of a clip, unpacked."""
    clip = CLIPS[name]
    alone = folder / Path(clip.file).name
    source = alone if alone.exists() else find_package(folder)
    data = source.read_bytes() if source == alone else read_member(source, clip.file)
    if data is None or hashlib.sha256(data).hexdigest() != clip.sha256:
        fail(f"{source} does not hold {alone.name} as version {VERSION} of {PACKAGE} has it")
    return gzip.decompress(data) if alone.suffix == ".gz" else data


def decode(data):
    """All frames of a clip: [frames, 240, 360, 3]."""
    frames = []
    with av.open(io.BytesIO(data)) as file:
        for frame in file.decode(video=0):
            scale = max(WIDTH / frame.width, HEIGHT / frame.height)
            width, height = round(frame.width * scale), round(frame.height * scale)
            image = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
            top, left = (height - HEIGHT) // 2, (width - WIDTH) // 2
            frames.append(image[top:top + HEIGHT, left:left + WIDTH])
    return np.stack(frames)


def load(name, folder=CACHE):
    """The frames of a clip, mapped from NAME.npy, which is made first unless it is there."""
    path = folder / f"{name}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with writing(path, "wb") as file:
            np.save(file, decode(content(name, folder)))
    return np.load(path, mmap_mode="r")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", metavar="NAME",
                        help=f"default: all of {', '.join(CLIPS)}")
    args = parser.parse_args()
    for name in args.clips or CLIPS:
        if name not in CLIPS:
            fail(f"there is no clip '{name}'; there are {', '.join(CLIPS)}")
        frames = load(name)
        print(f"{CACHE / name}.npy: {len(frames)} frames of {frames.shape[2]} x {frames.shape[1]}")


if __name__ == "__main__":
    main()
