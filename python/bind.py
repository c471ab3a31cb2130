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

# What C calls in Python (sparge/_native.py), and the memory of arrays that the library frees.
CALLBACKS = """
void *malloc(size_t size);
void free(void *);
extern "Python" bool sparge_python_progress(void *user, double done);
extern "Python" void sparge_python_finished(void *user, int64_t head);
bool sparge_python_signals(void *user, double done);
"""
SOURCE = """
#include <time.h>

/* For calls whose progress nobody watches: lets Python run its signal handlers, but 20 times a
 * second at most, since it waits up to 5 ms each time if another thread of Python works. */
static bool sparge_python_progress(void *user, double done);
static bool sparge_python_signals(void *user, double done)
{
    static _Thread_local double last;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    const double now = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
    if (now - last < 0.05)
        return true;
    last = now;
    return sparge_python_progress(user, done);
}
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
    includes = "".join(f'#include "{Path(header).name}"\n' for header in headers)
    ffi.set_source("sparge._sparge", includes + SOURCE, compiler_verbose=False)  # else it prints
    ffi.emit_c_code(out)
    Path(out).touch()  # it leaves an equal file as it was, and the build would never be up to date


if __name__ == "__main__":
    main(*sys.argv[1:])
