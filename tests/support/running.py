# SPDX-License-Identifier: Apache-2.0
"""For tests that run a program as its users do: what must work, what must fail and how, and the
files for it."""
import hashlib
import json
import math
import os
import re
import select
import signal
import stat
import struct
import subprocess
import time

import numpy as np

from counted import check

# A shell's background jobs ignore it, and so would the programs that are interrupted here.
signal.signal(signal.SIGINT, signal.default_int_handler)

FINE, DIFFERENT, USAGE, FILE, UNSUPPORTED, MACHINE, UNFINISHED = range(7)


def listing():
    return sorted(os.path.join(folder, name) for folder, folders, names in os.walk(".")
                  for name in names + folders)


# What sparge says where a reason beside tau and topk keeps more than half of the visible blocks.
HINT = "of the visible block pairs are kept whatever tau, topk and min_mass are, since"
HINTS = {
    "dissimilar_q": "their queries", "dissimilar_k": "their keys", "overflow": "not finite",
    "diagonal": "diagonal", "sink": "sink"
}


def hinted(x):
    """The words of every such line that goes with what sparge run printed; tuned thresholds are as
    they were tuned."""
    words = []
    for row in x["files"] if isinstance(x.get("files"), list) else [x]:
        kept = row.get("kept_by") or {}
        most = max(HINTS, key=lambda reason: kept.get(reason, 0))
        if 2 * kept.get(most, 0) > row.get("pairs", 0) and "file" not in (row["params"] or ()):
            words.append((f"{100 * kept[most] / row['pairs']:.0f} % {HINT}", HINTS[most]))
    return words


def keys_of(x):
    """All keys of an object, and of those in it."""
    if isinstance(x, list):
        return {key for part in x for key in keys_of(part)}
    return {key for name, part in x.items()
            for key in {name} | keys_of(part)} if isinstance(x, dict) else set()


def explained(command, x):
    """Is every key of what a command prints in its section of tools/json.md?"""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)),
                           "../../tools/json.md")) as file:
        sections = [
            part for part in file.read().split("\n## ") if f"`{command}" in part.split("\n")[0]
        ]
    check(len(sections) == 1, command, "a section of its own", sections)
    check(not (missing := keys_of(x) - set(re.findall("`([a-z0-9_]+)`", sections[0]))), command,
          "keys explained", missing)


def commands_of(program, called):
    """run, fine, wrong and keeps for a program; it is `called` so where it says what went wrong."""
    def run(*args, **how):
        done = subprocess.run([program, *(a if isinstance(a, bytes) else str(a) for a in args)],
                              stdout=how.pop("stdout", subprocess.PIPE),
                              stderr=how.pop("stderr", subprocess.PIPE), timeout=600, **how)
        return done.returncode, (done.stdout or b"").decode(), (done.stderr or
                                                                b"").decode(errors="replace")

    def fine(*args, code=FINE, says=(), **how):
        """Runs what must work; its one JSON object. What it says beside that is nothing, or a line
        with these words; and the hints that belong to the object."""
        got, out, err = run(*args, **how)
        check(got == code, f"{args}: exit {code}", got, err)
        try:
            check(out.endswith("}\n") and out.count("\n") == 1, f"{args}: one line", out[-60:])
            x = json.loads(out)
        except ValueError:
            check(False, f"{args}: JSON", out[:200])
            x = {}
        lines = err.splitlines(keepends=True)
        hints, want = [line for line in lines if HINT in line], hinted(x)
        check(
            len(hints) == len(want) and all(word in line for line, words in zip(hints, want)
                                            for word in words), f"{args}: hints", hints, want)
        err = "".join(line for line in lines if HINT not in line)
        check(
            err.startswith(f"{called}: ") and err.count("\n") == 1 and all(w in err for w in says)
            if says else err == "", f"{args}: says {says or 'nothing'}", repr(err))
        return x

    def wrong(code, words, *args, **how):
        """Runs what must fail: the code, one line with these words, nothing printed, no file
        left."""
        before = listing()
        got, out, err = run(*args, **how)
        check(got == code, f"{args}: exit {code}", got, err)
        check(err.startswith(f"{called}: ") and err.endswith("\n") and err.count("\n") == 1 and
              len(err) > len(called) + 14, f"{args}: one line", repr(err))
        words = [words] if isinstance(words, str) else words
        check(all(w in err for w in words), f"{args}: says {words}", repr(err))
        check(out == "", f"{args}: nothing on stdout", out[:100])
        check(listing() == before, f"{args}: no file left", set(listing()) ^ set(before))

    def keeps(name, code, words, *args, **how):
        """Must fail, and leave this file as it is."""
        before = read(name, "rb")
        wrong(code, words, *args, **how)
        check(os.path.isfile(name) and read(name, "rb") == before, f"{args}: {name} as before")

    return run, fine, wrong, keeps


def at_work(args, begun, **how):
    """Starts a program, and waits until begun(child) says that it is at work, or it has ended by
    itself. How long that takes is no matter, if the work is long enough."""
    child = subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             **how)
    while child.poll() is None and not begun(child):
        time.sleep(0.002)
    return child


def ended(child):
    """Its code, and what it said."""
    out, err = child.communicate()
    return child.returncode, out.decode(), err.decode()


def stopped(args, number, begun, **how):
    """Sends it this signal when it is at work."""
    child = at_work(args, begun, **how)
    child.send_signal(number)
    return ended(child)


def watched(args):
    """Runs on a terminal what takes minutes, until it says how long, and interrupts it: its code,
    what it said until then and after how many seconds, and what it said last."""
    terminal, other = os.openpty()
    started, said = time.monotonic(), [b"", b""]
    child = subprocess.Popen([str(a) for a in args], stderr=other, stdout=subprocess.PIPE)
    os.close(other)
    try:
        while b"s left" not in said[0] and select.select([terminal], [], [], 60)[0]:
            said[0] += os.read(terminal, 4096)
        after = time.monotonic() - started
        child.send_signal(signal.SIGINT)
        while more := os.read(terminal, 4096):
            said[1] += more
    except OSError:  # the other end is closed
        pass
    child.communicate()
    os.close(terminal)
    return child.returncode, said[0].decode(), after, said[1].decode()


def ignored(child):
    """Which of the two signals that interrupt it ignores."""
    mask = int(re.search(r"SigIgn:\s*(\w+)", read(f"/proc/{child.pid}/status"))[1], 16)
    return [number for number in (signal.SIGINT, signal.SIGTERM) if mask >> number - 1 & 1]


# ---- Files -----------------------------------------------------------------------------------

def write(name, text):
    with open(name, "w" if isinstance(text, str) else "wb") as f:
        f.write(text)
    return name


def read(name, mode="r"):
    with open(name, mode) as f:
        return f.read()


def sha256(name):
    return hashlib.sha256(read(name, "rb")).hexdigest()


def save(name, x):
    np.save(name, x)
    return name


SAFETENSORS = {"F16": "<f2", "F32": "<f4", "U8": "u1", "BOOL": "?", "I64": "<i8"}


def load_safetensors(name):
    data = read(name, "rb")
    at = 8 + struct.unpack("<Q", data[:8])[0]
    return {
        key: np.frombuffer(data[at:], SAFETENSORS[x["dtype"]], math.prod(x["shape"]),
                           x["data_offsets"][0]).reshape(x["shape"])
        for key, x in json.loads(data[8:at]).items()
    }


def save_safetensors(name, **tensors):
    """Each a type of the format and an array; or, already in bytes, (type, shape, bytes)."""
    header, data = {}, b""
    for key, (dtype, x, *raw) in tensors.items():
        shape = x if raw else x.shape
        if raw:
            raw, = raw
        elif dtype == "BF16":
            bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
            raw = (bits >> 16).astype("<u2").tobytes()
        else:
            raw = x.astype(SAFETENSORS[dtype]).tobytes()
        header[key] = {"dtype": dtype, "shape": list(shape),
                       "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write(name, struct.pack("<Q", len(text)) + text + data)


def full_device():
    """A device without space, our own: a buggy program, run by root, could replace /dev/full."""
    try:
        os.mknod("full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
        open("full", "w").close()
        return "./full"
    except OSError:
        if os.path.lexists("full"):
            os.remove("full")
        if not os.access("/dev", os.W_OK) and stat.S_ISCHR(os.stat("/dev/full").st_mode):
            return "/dev/full"
        print("skipped: a device without space (none here, or none that is safe)")
        return None
