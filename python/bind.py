# SPDX-License-Identifier: Apache-2.0
"""bind.py: writes the C source of the module sparge._sparge from sparge*.h, so that nothing of them
is written down a second time: bind.py OUT.c HEADER...

The headers come in the order of who includes whom. Their text goes to cffi as it stands but for the
preprocessor's lines; the C compiler then checks every struct and function against the headers.
"""
import re
import sys
from pathlib import Path

from cffi import FFI

# What C calls in Python (sparge/_native.py).
CALLBACKS = """
extern "Python" bool sparge_python_progress(void *user, double done);
extern "Python" void sparge_python_finished(void *user, int64_t head);
"""
C_TYPE = {"string": "static char *const", "float": "static const float", "int": "static const int"}


def constant(name, value):
    """The declaration of what a header defines as a number or a string."""
    kind = "string" if '"' in value else "float" if "." in value else "int"
    return f"{C_TYPE[kind]} {name};"


def declarations(text):
    """What a header declares, without the preprocessor's lines and without definitions."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S).replace("\\\n", " ")
    constants = re.findall(r"^#define (SPARGE_\w+)\s+([-(\"\d].*)$", text, re.M)
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    text = re.sub(r"^static inline .*?^}$", "", text, flags=re.M | re.S)
    text = re.sub(r"SPARGE_(BEGIN|END)_DECLS", "", text)
    return "\n".join([text, *(constant(*pair) for pair in constants)])


def main(out, *headers):
    ffi = FFI()
    ffi.cdef("\n".join(declarations(Path(header).read_text()) for header in headers) + CALLBACKS)
    ffi.set_source("sparge._sparge", "".join(f'#include "{Path(h).name}"\n' for h in headers),
                   compiler_verbose=False)  # else it prints
    ffi.emit_c_code(out)
    Path(out).touch()  # it leaves an equal file as it was, and the build would never be up to date


if __name__ == "__main__":
    main(*sys.argv[1:])
