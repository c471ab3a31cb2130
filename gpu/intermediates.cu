/* SPDX-License-Identifier: Apache-2.0 */
/* intermediates.cu: the codes of a call as plain arrays [head][token][channel], for those who ask
 * for intermediates. */
#include "gpu/layout.h"
#include "gpu/work.h"

namespace sparge {

enum { THREADS = 256 };

/* Where a code of q, k or v lies: which tile, which row of it (a token), which channel. */
struct code_place {
    int64_t tile;
    int row, c;
};

static __device__ code_place place_of_code(int64_t at, int64_t len, int dim, int64_t blocks,
                                           int block)
{
    const int64_t token = at / dim % len, head = at / dim / len;
    return {head * blocks + token / block, (int)(token % block), (int)(at % dim)};
}

static __global__ void __launch_bounds__(THREADS) unpack_codes(const __grid_constant__ work w)
{
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    const int pitch = pitch_of(w.width);
    if (w.q_int && at < w.batch * w.heads * w.g.q_len * w.dim) {
        const code_place p = place_of_code(at, w.g.q_len, w.dim, w.g.q_blocks, BLOCK_Q);
        w.q_int[at] = w.q_tile[p.tile * q_tile_bytes(w.width) + swizzle(pitch, p.row, p.c)];
    }
    if (w.k_int && at < w.batch * w.kv_heads * w.g.k_len * w.dim) {
        const code_place p = place_of_code(at, w.g.k_len, w.dim, w.g.k_blocks, BLOCK_K);
        w.k_int[at] = w.k_tile[p.tile * k_tile_bytes(w.width) + swizzle(pitch, p.row, p.c)];
    }
    if ((w.v_int || w.v_scale_out) && at < w.batch * w.kv_heads * w.g.k_len * w.dim_v) {
        const code_place p = place_of_code(at, w.g.k_len, w.dim_v, w.g.k_blocks, BLOCK_K);
        if (w.v_int)
            w.v_int[at] = (int8_t)w.v_tile[p.tile * v_tile_bytes(w.width, false) +
                                           swizzle(V_PITCH, p.c, permute_key(p.row))];
        if (w.v_scale_out && p.row == 0)
            w.v_scale_out[p.tile * w.dim_v + p.c] = w.v_scale[p.tile * w.width + p.c];
    }
}

cudaError_t intermediates(const work &w, cudaStream_t stream)
{
    if (!w.q_int && !w.k_int && !w.v_int && !w.v_scale_out)
        return cudaSuccess;
    const int64_t of_q = w.heads * w.g.q_len, of_k = w.kv_heads * w.g.k_len;
    const int64_t codes = w.batch * sparge_max(of_q, of_k) * sparge_max(w.dim, w.dim_v);
    return launch(unpack_codes, sparge_ceil_div(codes, THREADS), THREADS, 0, stream, w);
}

} // namespace sparge
