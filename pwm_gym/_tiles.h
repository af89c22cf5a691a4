/* Products of bf16 matrices on AMX, summed in fp32, and what brings their factors into tiles.

   A tile is 16 lines of 64 bytes, one of the processor's eight. With A, 16 x 32, and B, 32 x 16, of bf16, and C,
   16 x 16, of fp32, one instruction adds A B to C. Line i of A is row i. Line p of B has the pairs (B[2p][n],
   B[2p + 1][n]), n = 0 .. 15. So with two bf16 as one word, 16 x 16 words in all,

       A of a matrix: its rows as they are ("rows")         B of a matrix: two rows interleaved ("pairs")
       B of its transpose: "rows", words transposed         A of its transpose: "pairs", words transposed

   A right factor, (K, N), is packed in panels of 32 columns: of each panel, for each 32 of its K, two tiles of B, one
   after the other. Left factors are rows of bf16, or packed likewise. What is missing to 32 is filled with zeros. */

#ifndef PWM_GYM_TILES_H
#define PWM_GYM_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#define BARRIER __asm__ volatile("" ::: "memory") /* compilers don't know what memory a tile's load reads */

typedef uint16_t bf16;
typedef int64_t size;

enum { CHUNK = 128, DEPTH = 512, TILE = 512 }; /* rows at a time; of a sum over rows; bf16 in a tile */

INLINE size least(size a, size b) { return a < b ? a : b; }
INLINE size up(size n, size to) { return (n + to - 1) / to * to; }

/* Tiles from memory */

/* Line i of w[] becomes column i: words w[i][j] -> w[j][i]. */
INLINE AMX void transpose(__m512i w[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(w[i], w[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(w[i], w[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            w[i + 2 * k] = _mm512_unpacklo_epi64(t[i + k], t[i + 2 + k]);
            w[i + 2 * k + 1] = _mm512_unpackhi_epi64(t[i + k], t[i + 2 + k]);
        }
    for (int i = 0; i < 4; i++) { /* now 4 x 4 blocks of words are transposed; put the blocks in their places */
        __m512i a = _mm512_shuffle_i32x4(w[i], w[4 + i], 0x88);
        __m512i b = _mm512_shuffle_i32x4(w[i], w[4 + i], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0x88);
        __m512i d = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    memcpy(w, t, sizeof t);
}

/* Bits below `count` of 32. */
INLINE uint32_t first(size count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

/* The "rows" of a tile from (rows, columns) of a matrix with `ld` to a line, of bf16 or of fp32. */
INLINE AMX void load_rows(__m512i w[16], const void *from, int is_float, size ld, size rows, size columns) {
    uint32_t mask = first(columns);
    for (size i = 0; i < 16; i++) {
        if (i >= rows) {
            w[i] = _mm512_setzero_si512();
        } else if (is_float) {
            const float *row = (const float *)from + i * ld;
            __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, row), high = _mm512_maskz_loadu_ps(mask >> 16, row + 16);
            w[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        } else {
            w[i] = _mm512_maskz_loadu_epi16(mask, (const bf16 *)from + i * ld);
        }
    }
}

/* The "pairs" of a tile from (2 x 16 rows, columns). */
INLINE AMX void load_pairs(__m512i w[16], const void *from, int is_float, size ld, size rows, size columns) {
    uint32_t mask = first(columns) & 0xffff;
    __m512i ordinal = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i interleave = /* word j: elements j and 16 + j */
        _mm512_add_epi16(_mm512_set1_epi32(0x00100000), _mm512_mullo_epi32(ordinal, _mm512_set1_epi32(0x00010001)));
    for (size i = 0; i < 16; i++) {
        __mmask16 low = 2 * i < rows ? mask : 0, high = 2 * i + 1 < rows ? mask : 0;
        __m512i both;
        if (is_float) {
            const float *row = (const float *)from + 2 * i * ld;
            both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, row + ld), _mm512_maskz_loadu_ps(low, row));
        } else {
            const bf16 *row = (const bf16 *)from + 2 * i * ld;
            both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(low, row)),
                                      _mm256_maskz_loadu_epi16(high, row + ld), 1);
        }
        w[i] = _mm512_permutexvar_epi16(interleave, both);
    }
}

INLINE AMX void put(bf16 *to, __m512i w[16], int turned) {
    if (turned) transpose(w);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + 32 * i, w[i]);
}

/* Pack the right factor (K, N): from (K, N), or if `turned` from (N, K). */
INLINE AMX void pack_any(bf16 *to, const void *from, int is_float, int turned, size ld, size K, size N) {
    size width = is_float ? 4 : 2;
    __m512i w[16];
    for (size n = 0; n < up(N, 32); n += 32)
        for (size k = 0; k < K; k += 32)
            for (size half = n; half < n + 32; half += 16, to += TILE) {
                const char *at = (const char *)from + width * (turned ? half * ld + k : k * ld + half);
                if (turned)
                    load_rows(w, at, is_float, ld, N - half, K - k);
                else
                    load_pairs(w, at, is_float, ld, K - k, N - half);
                put(to, w, turned);
            }
}

AMX static void pack_weight(bf16 *to, const float *from, size ld, size K, size N) {
    pack_any(to, from, 1, 0, ld, K, N);
}
AMX static void pack_turned(bf16 *to, const float *from, size ld, size K, size N) {
    pack_any(to, from, 1, 1, ld, K, N);
}
AMX static void pack_rows(bf16 *to, const bf16 *from, size ld, size K, size N) {
    pack_any(to, from, 0, 0, ld, K, N);
}

/* Pack 32 columns (or as many as there are) of the left factor's transpose, (K, L): two tiles of A for each 32 of K. */
AMX static void pack_left(bf16 *to, const bf16 *from, size ld, size K, size L) {
    __m512i w[16];
    for (size k = 0; k < K; k += 32)
        for (size half = 0; half < 32; half += 16, to += TILE) {
            load_pairs(w, from + k * ld + half, 0, ld, K - k, L - half);
            put(to, w, 1);
        }
}

/* Round rows of fp32 to bf16, `ld` to a line of which those past F become 0 up to a multiple of 32. */
AMX static void round_rows(bf16 *to, size ld, const float *from, size rows, size F) {
    for (size r = 0; r < rows; r++, to += ld, from += F)
        for (size i = 0; i < F; i += 32) {
            uint32_t mask = first(F - i);
            __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, from + i);
            __m512 high = _mm512_maskz_loadu_ps(mask >> 16, from + i + 16);
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
}

/* Products */

AMX static void configure(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16]; /* of a line */
        uint8_t lines[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.lines[i] = 16;
    _tile_loadconfig(&tiles);
}

struct left { /* where a block's tiles of A are, in bf16 */
    size ld, second, step; /* from line to line, from the upper tile to the lower, to the next 32 of K */
};

/* C, (32, 32) of which (rows, columns) count, = bias or C or 0, plus A B over `depth` steps of 32. */
AMX static void block(const bf16 *a, struct left l, const bf16 *b, size depth, const float *bias, int add, float *c,
                      size ldc, size rows, size columns) {
    int whole = rows >= 32 && columns >= 32;
    for (size i = 0; i < least(rows, 32); i++) { /* what is stored in the end */
        _mm_prefetch((const char *)(c + i * ldc), _MM_HINT_T0);
        _mm_prefetch((const char *)(c + i * ldc + 16), _MM_HINT_T0);
    }
    BARRIER;
    if (bias) {
        _tile_loadd(0, bias, 0);
        _tile_loadd(1, bias + 16, 0);
        _tile_loadd(2, bias, 0);
        _tile_loadd(3, bias + 16, 0);
    } else if (add && whole) {
        _tile_loadd(0, c, 4 * ldc);
        _tile_loadd(1, c + 16, 4 * ldc);
        _tile_loadd(2, c + 16 * ldc, 4 * ldc);
        _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size k = 0; k < depth; k++, a += l.step, b += 2 * TILE) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 2 * l.ld);
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > 16) {
            _tile_loadd(5, a + l.second, 2 * l.ld);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    if (whole) {
        _tile_stored(0, c, 4 * ldc);
        _tile_stored(1, c + 16, 4 * ldc);
        _tile_stored(2, c + 16 * ldc, 4 * ldc);
        _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
        return;
    }
    float edge[32 * 32] __attribute__((aligned(64)));
    _tile_stored(0, edge, 128);
    _tile_stored(1, edge + 16, 128);
    _tile_stored(2, edge + 16 * 32, 128);
    _tile_stored(3, edge + 16 * 32 + 16, 128);
    BARRIER;
    for (size i = 0; i < least(rows, 32); i++)
        for (size j = 0; j < least(columns, 32); j++) c[i * ldc + j] = edge[32 * i + j] + (add ? c[i * ldc + j] : 0.0f);
}

/* C, (rows, N), = bias + A B, for A, (rows, K), in rows of `lda`, of which there are a multiple of 32 in memory. */
AMX static void multiply(const bf16 *a, size lda, const bf16 *packed, const float *bias, float *c, size rows, size N,
                         size K) {
    struct left l = {lda, 16 * lda, 32};
    size depth = (K + 31) / 32;
    for (size n = 0; n < N; n += 32, packed += 2 * TILE * depth)
        for (size r = 0; r < rows; r += 32)
            block(a + r * lda, l, packed, depth, bias ? bias + n : NULL, 0, c + r * N + n, N, rows - r, N - n);
}

/* C, (L, R), = left' right, sums over rows of left, (rows, L), and right, (rows, R): a weight's gradient. This call does
   lines [from, to) of C; `own` has room for DEPTH rows of 32 + R, padded. */
AMX static void multiply_transposed(const bf16 *left, size ldl, const bf16 *right, size ldr, float *c, size rows,
                                    size L, size R, size from, size to, bf16 *own) {
    struct left l = {32, TILE, 2 * TILE};
    bf16 *packed = own + 32 * DEPTH;
    for (size r = 0; r < rows; r += DEPTH) {
        size sum = least(DEPTH, rows - r), depth = (sum + 31) / 32;
        pack_rows(packed, right + r * ldr, ldr, sum, R);
        for (size i = from; i < to; i += 32) {
            pack_left(own, left + r * ldl + i, ldl, sum, L - i);
            for (size j = 0; j < R; j += 32)
                block(own, l, packed + j * 32 * depth, depth, NULL, r > 0, c + i * R + j, R, L - i, R - j);
        }
    }
}

#endif
