/* What bench/erasure.py measures beside: ISA-L's erasure code, and a plain XOR. Built by bench/anchors.py. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <isa-l/erasure_code.h>
#include <isa-l/raid.h>

enum { K = 32, TOTAL = 64, TABLE_BYTES = 32 };

/* Exported by libisal for x86, not declared in every version's headers. */
extern void ec_encode_data_avx2(int, int, int, unsigned char *, unsigned char **, unsigned char **) __attribute__((weak));

/* Tables for making `rows` chunks, numbered `want`, from the 32 numbered `have`: 32 * 32 * rows bytes. 0, or -1. */
int isal_tables(const int *have, const int *want, int rows, unsigned char *tables) {
    unsigned char code[TOTAL * K], held[K * K], inverse[K * K], wanted[K * K];
    gf_gen_cauchy1_matrix(code, TOTAL, K);
    for (int i = 0; i < K; ++i) memcpy(held + i * K, code + have[i] * K, K);
    if (gf_invert_matrix(held, inverse, K) != 0) return -1;
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < K; ++c) {
            unsigned char sum = 0;
            for (int i = 0; i < K; ++i) sum ^= gf_mul(code[want[r] * K + i], inverse[i * K + c]);
            wanted[r * K + c] = sum;
        }
    }
    ec_init_tables(K, rows, wanted, tables);
    return 0;
}

/* All of each chunk at once when column >= chunk_bytes; else column by column. */
void isal_code(int avx2, unsigned char *tables, int rows, size_t chunk_bytes, size_t column, unsigned char **in,
               unsigned char **out) {
    for (size_t at = 0; at < chunk_bytes; at += column) {
        const size_t length = chunk_bytes - at < column ? chunk_bytes - at : column;
        unsigned char *from[K], *to[K];
        for (int i = 0; i < K; ++i) from[i] = in[i] + at;
        for (int r = 0; r < rows; ++r) to[r] = out[r] + at;
        if (avx2 && ec_encode_data_avx2) {
            ec_encode_data_avx2((int)length, K, rows, tables, from, to);
        } else {
            ec_encode_data((int)length, K, rows, tables, from, to);
        }
    }
}

/* rows[32] = the XOR of rows 0 to 31. */
int xor_rows(size_t chunk_bytes, void **rows) { return xor_gen(K + 1, (int)chunk_bytes, rows); }
