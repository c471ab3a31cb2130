/* SPDX-License-Identifier: Apache-2.0 */
/* product_table.h: the products that the including file has defined, as entries of its table. */
#ifndef SPARGE_CPU_PRODUCT_TABLE_H
#define SPARGE_CPU_PRODUCT_TABLE_H

static void product_kernels(sparge_kernels *k, sparge_isa isa)
{
    k->isa = isa;
    for (int f = 0; f < SPARGE_FORMATS; f++)
        k->product_isa[f] = isa;
    k->peak_floats = peak_floats;
    k->peak_bytes = peak_bytes;
    k->score[SPARGE_BYTES] = score_bytes;
    k->score[SPARGE_WORDS] = score_words;
    k->score[SPARGE_FLOATS] = score_floats;
    k->accumulate_pv[SPARGE_BYTES] = accumulate_pv_bytes;
    k->accumulate_pv[SPARGE_WORDS] = accumulate_pv_words;
    k->accumulate_pv[SPARGE_FLOATS] = accumulate_pv_floats;
}

#endif
