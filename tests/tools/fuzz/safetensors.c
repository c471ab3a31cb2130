/* SPDX-License-Identifier: Apache-2.0 */
/* safetensors.c: libFuzzer target: any bytes give either one line of error and no tensor, or
 * tensors that fit in the bytes and convert. */
#include "tools/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static void check_names(const uint8_t *bytes, size_t size, const char *const *names, int count)
{
    array got[3];
    file_error error;
    memset(got, 0xff, sizeof got);
    memset(&error, 'x', sizeof error);
    if (!safetensors_read_memory(bytes, size, "fuzz", names, count, got, &error)) {
        for (int i = 0; i < count; i++)
            require(!got[i].data);
        require(memchr(error.text, '\0', sizeof error.text) != NULL);
        require(strncmp(error.text, "fuzz: ", 6) == 0 && !strchr(error.text, '\n'));
        return;
    }
    require(error.text[0] == '\0');
    size_t bytes_read = 0;
    for (int i = 0; i < count; i++) {
        require(got[i].data && got[i].rank <= ARRAY_MAX_RANK && array_count(&got[i]) >= 0);
        bytes_read += (size_t)array_count(&got[i]) * array_type_size(got[i].type);
        require(array_to_f32(&got[i], &error) && got[i].type == ARRAY_F32);
        array_free(&got[i]);
    }
    require(bytes_read <= size); /* no byte belongs to two of them */
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static const char *const names[] = {"q", "k", "v"};
    for (int first = 0; first < 3; first++) /* one alone, so that one bad one hides no other */
        check_names(bytes, size, names + first, 1);
    check_names(bytes, size, names, 3);
    return 0;
}
