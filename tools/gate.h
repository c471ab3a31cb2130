/* SPDX-License-Identifier: Apache-2.0 */
/* gate.h: a trained gate of SeerAttention from a .safetensors file, for --method seer. */
#ifndef SPARGE_TOOLS_GATE_H
#define SPARGE_TOOLS_GATE_H

#include "sparge_methods.h"
#include "tools/program.h"

typedef struct gate {
    sparge_gate c; /* of the arrays below */
    array k, q;    /* q: empty if there is none */
} gate;

/* For so many heads and channels: gate_k and, if there is one, gate_q; or those of a layer under
 * the names that the authors' files have them by. After failure *out is empty. */
exit_code gate_read(const char *path, int64_t layer, double rope_base, int64_t heads,
                    int64_t kv_heads, int64_t dim, gate *out, file_error *error);
void gate_free(gate *g);

#endif
