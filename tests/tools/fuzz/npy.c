/* SPDX-License-Identifier: Apache-2.0 */
/* npy.c: libFuzzer target: any bytes give either one line of error and no array, or an array that
 * fits in the bytes, converts, and comes back the same from a file that we write. */
#include "tools/npy.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void check_round_trip(const array *want)
{
    char *text = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    require(stream && npy_write(stream, "fuzz", want, NULL) && fclose(stream) == 0);
    array got;
    require(npy_read_memory((const uint8_t *)text, length, "fuzz", &got, NULL));
    require(got.type == want->type && got.rank == want->rank);
    require(memcmp(got.shape, want->shape, sizeof got.shape) == 0);
    require(memcmp(got.data, want->data, (size_t)array_count(want) * array_type_size(want->type)) ==
            0);
    array_free(&got);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    array got;
    file_error error;
    memset(&got, 0xff, sizeof got);
    memset(&error, 'x', sizeof error);
    if (!npy_read_memory(bytes, size, "fuzz", &got, &error)) {
        require(!got.data && memchr(error.text, '\0', sizeof error.text));
        require(strncmp(error.text, "fuzz: ", 6) == 0 && !strchr(error.text, '\n'));
        require(strchr(error.text, ';') != NULL); /* a remedy */
        return 0;
    }
    require(error.text[0] == '\0' && got.data && got.rank <= ARRAY_MAX_RANK);
    require(array_count(&got) >= 0 && (uint64_t)array_count(&got) <= size);
    check_round_trip(&got);
    require(array_to_f32(&got, &error) && got.type == ARRAY_F32);
    array_free(&got);
    return 0;
}
