/* SPDX-License-Identifier: Apache-2.0 */
/* reading.c: input_read where the system reads little at a time, is interrupted, or fails: pread is
 * ours here. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/support/check.h"
#include "tools/array.h"

/* What the next calls do, from the last word backwards: 'e' EIO, 'i' EINTR, '1' one byte. */
static const char *script = "";

ssize_t __wrap_pread(int file, void *to, size_t size, off_t at);
ssize_t __real_pread(int file, void *to, size_t size, off_t at);

ssize_t __wrap_pread(int file, void *to, size_t size, off_t at)
{
    const char now = *script;
    script += now != '\0';
    if (now == 'e' || now == 'i') {
        errno = now == 'e' ? EIO : EINTR;
        return -1;
    }
    return __real_pread(file, to, now == '1' ? 1 : size, at);
}

/* Reads 8 bytes under a script; what is said, or "". */
static const char *read_under(const char *calls)
{
    static file_error error;
    char path[] = "/tmp/sparge_reading_XXXXXX", got[9] = "";
    const int file = mkstemp(path);
    check(file >= 0 && write(file, "01234567", 8) == 8, "a file");
    close(file);
    file_input in;
    check(input_open(path, &in, &error), "opens: %s", error.text);
    unlink(path);
    script = calls;
    const bool ok = input_read(&in, 0, 8, got);
    check(!ok || strcmp(got, "01234567") == 0, "'%s' under '%s'", got, calls);
    input_close(&in);
    return ok ? "" : error.text;
}

TestSuite(reading, .timeout = 20);

Test(reading, what_is_interrupted_goes_on)
{
    check(!*read_under("i"), "EINTR at once: %s", read_under("i"));
    check(!*read_under("11i1ii1"), "and between bytes: %s", read_under("11i1ii1"));
}

Test(reading, what_fails_ends)
{
    check(strstr(read_under("e"), "byte 0: cannot read"), "EIO at once: %s", read_under("e"));
    check(strstr(read_under("111e"), "byte 3: cannot read"), "later: %s", read_under("111e"));
}
