/* Whole networks with matrix products on AMX: factors rounded to bf16, sums in fp32. pwm_gym/bf16.py calls the exported
   functions at the end of this file. `products_available` says no where compiler, processor or kernel has no AMX.

   A tile is 16 lines of 64 bytes, one of the processor's eight. With A, 16 x 32, and B, 32 x 16, of bf16, and C, 16 x 16,
   of fp32, one instruction adds A B to C. Line i of A is row i. Line p of B has the pair (B[2p][n], B[2p + 1][n]) for
   n = 0 .. 15. So with two bf16 as one word, 16 x 16 words in all,

       A of a matrix: its rows as they are ("rows")        B of a matrix: two rows interleaved ("pairs")
       B of its transpose: "rows", words transposed         A of its transpose: "pairs", words transposed

   A right factor, (K, N), is packed in panels of 32 columns: of each panel, for each 32 of its K, two tiles of B, one
   after the other. Left factors are rows of bf16, or packed likewise. What is missing to 32 is filled with zeros. */

#include "_kernels.h"

#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cpuid.h>

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
        __m512i a = _mm512_shuffle_i32x4(w[i], w[4 + i], 0x88), b = _mm512_shuffle_i32x4(w[i], w[4 + i], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0x88), d = _mm512_shuffle_i32x4(w[8 + i], w[12 + i], 0xdd);
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
    __m512i interleave = _mm512_add_epi16(_mm512_set1_epi32(0x00100000), /* word j: elements j and 16 + j */
                                          _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                                             _mm512_set1_epi32(0x00010001)));
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

AMX static void pack_weight(bf16 *to, const float *from, size ld, size K, size N) { pack_any(to, from, 1, 0, ld, K, N); }
AMX static void pack_turned(bf16 *to, const float *from, size ld, size K, size N) { pack_any(to, from, 1, 1, ld, K, N); }
AMX static void pack_rows(bf16 *to, const bf16 *from, size ld, size K, size N) { pack_any(to, from, 0, 0, ld, K, N); }

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
            __m512 low = _mm512_maskz_loadu_ps(mask & 0xffff, from + i), high = _mm512_maskz_loadu_ps(mask >> 16, from + i + 16);
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
AMX static void block(const bf16 *a, struct left l, const bf16 *b, size depth, const float *bias, int add, float *c, size ldc,
                      size rows, size columns) {
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
AMX static void multiply(const bf16 *a, size lda, const bf16 *packed, const float *bias, float *c, size rows, size N, size K) {
    struct left l = {lda, 16 * lda, 32};
    size depth = (K + 31) / 32;
    for (size n = 0; n < N; n += 32, packed += 2 * TILE * depth)
        for (size r = 0; r < rows; r += 32)
            block(a + r * lda, l, packed, depth, bias ? bias + n : NULL, 0, c + r * N + n, N, rows - r, N - n);
}

/* C, (L, R), = left' right, sums over rows of left, (rows, L), and right, (rows, R): a weight's gradient. This call does
   lines [from, to) of C; `own` has room for DEPTH rows of 32 + R, padded. */
AMX static void multiply_transposed(const bf16 *left, size ldl, const bf16 *right, size ldr, float *c, size rows, size L,
                                    size R, size from, size to, bf16 *own) {
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

/* Networks */

struct layer {
    int64_t kind, in, out, groups;
    double eps;
};

struct network {
    int64_t count, members, plain; /* plain: one member, whose weights are (out, in) instead of (members, in, out) */
    int64_t shared;                /* members read one x, (rows, in), instead of (members, rows, in) */
    int64_t learned;               /* whether any weight's gradient is asked for */
    int64_t rows, threads;
    struct layer layers[12];
};

struct spans { /* where in its buffer a layer's part begins, in bytes */
    size forward, backward;       /* packed weights of a member: right factors, of x and of gradients */
    size input, inner, stats;     /* saved: what comes in, in bf16; what comes out of the linear map; of the norm */
    size gradient, sums;          /* work: gradient of `inner` in bf16; each thread's sums for the small gradients */
};

/* Elements from row to row of bf16; strides that are multiples of 1 KiB would meet in few lines of the cache. */
INLINE size pitch(size F) { return up(F, 32) + (F % 512 ? 0 : 32); }
INLINE size packed_size(size K, size N) { return 2 * up(K, 32) * up(N, 32); }

static struct spans locate(const struct network *n, struct spans *at) {
    struct spans end = {0};
    size E = n->members, rows = up(n->rows, 32);
    for (int i = 0; i < n->count; i++) {
        const struct layer *l = n->layers + i;
        at[i] = end;
        end.forward += packed_size(l->in, l->out) + 4 * up(l->out, 32); /* weight and bias */
        end.backward += packed_size(l->out, l->in);
        size kept = n->learned * (i == 0 && n->shared ? 1 : E) * rows * pitch(l->in) * 2;
        at[i].inner = at[i].input + kept;
        at[i].stats = at[i].inner + up(l->kind == NOTHING ? 0 : 4 * E * n->rows * l->out, 64);
        end.input = end.inner = end.stats = at[i].stats + up(l->kind == NOTHING ? 0 : 8 * E * n->rows, 64);
        at[i].sums = at[i].gradient + n->learned * E * rows * pitch(l->out) * 2;
        end.gradient = end.sums = at[i].sums + up(n->threads * 3 * E * l->out * 4, 64);
    }
    return end;
}

/* Memory of this thread, kept for the next call. */
static char *scratch(size bytes) {
    static __thread char *memory;
    static __thread size owned;
    if (bytes > owned) {
        free(memory);
        memory = aligned_alloc(64, up(bytes, 4096));
        owned = memory ? up(bytes, 4096) : 0;
    }
    return memory;
}

INLINE size widest(const struct network *n) {
    size F = 32;
    for (int i = 0; i < n->count; i++) {
        if (pitch(n->layers[i].in) > F) F = pitch(n->layers[i].in);
        if (pitch(n->layers[i].out) > F) F = pitch(n->layers[i].out);
    }
    return F;
}

/* Pack weights of a member for one of the two ways; for the way back those above layer `lowest`. */
AMX static void pack_member(const struct network *n, const float *const *parameters, size e, int backward, int lowest, char *packed) {
    struct spans at[12];
    locate(n, at);
    for (int i = lowest; i < n->count; i++) {
        size K = n->layers[i].in, N = n->layers[i].out;
        const float *weight = parameters[4 * i] + e * K * N;
        bf16 *to = (bf16 *)(packed + (backward ? at[i].backward : at[i].forward));
        if (backward) { /* the factor (N, K) */
            n->plain ? pack_weight(to, weight, K, N, K) : pack_turned(to, weight, N, N, K);
        } else { /* (K, N) */
            float *bias = (float *)((char *)to + packed_size(K, N));
            n->plain ? pack_turned(to, weight, K, K, N) : pack_weight(to, weight, N, K, N);
            memset(bias, 0, 4 * up(N, 32));
            memcpy(bias, parameters[4 * i + 1] + e * N, 4 * N);
        }
    }
}

/* y = network(x) on the rows [from, to) of each member. Without `packed`, weights are packed into scratch; without
   `saved`, what lies between layers stays there. */
AMX static void forward_rows(const struct network *n, const char *packed, const float *const *parameters, const float *x,
                             float *y, char *saved, size from, size to) {
    struct spans at[12], end = locate(n, at);
    size F = widest(n), R = n->rows;
    char *own = scratch(CHUNK * F * 8 + 32 * F * 4 + CHUNK * 8 + end.forward), *weights = own + CHUNK * F * 8 + 32 * F * 4 + CHUNK * 8;
    bf16 *rounded[2] = {(bf16 *)own, (bf16 *)own + CHUNK * F};
    float *inner = (float *)(own + CHUNK * F * 4), *activated = inner + CHUNK * F, *stats = activated + 32 * F;
    int keep = saved && n->learned;
    configure();
    for (size e = 0; e < n->members; e++) {
        const char *mine = packed ? packed + e * end.forward : weights;
        if (!packed) pack_member(n, parameters, e, 0, 0, weights);
        for (size r = from; r < to; r += CHUNK) {
            size rows = least(CHUNK, to - r), padded = up(R, 32);
            bf16 *a = keep ? (bf16 *)(saved + at[0].input) + ((n->shared ? 0 : e * padded) + r) * pitch(n->layers[0].in) : rounded[0];
            if (!(keep && n->shared && e > 0))
                round_rows(a, pitch(n->layers[0].in), x + ((n->shared ? 0 : e * R) + r) * n->layers[0].in, rows, n->layers[0].in);
            for (int i = 0; i < n->count; i++) {
                const struct layer *l = n->layers + i;
                int last = i + 1 == n->count;
                const char *weight = mine + at[i].forward;
                float *out = y + (e * R + r) * l->out, *c = inner, *s = stats;
                if (l->kind == NOTHING && last) c = out;
                if (l->kind != NOTHING && saved) {
                    c = (float *)(saved + at[i].inner) + (e * R + r) * l->out;
                    s = (float *)(saved + at[i].stats) + (e * R + r) * 2;
                }
                multiply(a, pitch(l->in), (const bf16 *)weight, (const float *)(weight + packed_size(l->in, l->out)), c,
                         rows, l->out, l->in);
                if (!last)
                    a = keep ? (bf16 *)(saved + at[i + 1].input) + (e * padded + r) * pitch(l->out) : rounded[(i + 1) % 2];
                for (size q = 0; q < rows && !(last && l->kind == NOTHING); q += 32) {
                    size some = least(32, rows - q);
                    float *result = l->kind == NOTHING ? c + q * l->out : last ? out + q * l->out : activated;
                    if (l->kind != NOTHING)
                        fused_forward(l->kind, c + q * l->out, parameters[4 * i + 2] + e * l->out,
                                      parameters[4 * i + 3] + e * l->out, result, s + 2 * q, some, l->out, some, l->groups, l->eps, 1);
                    if (!last) round_rows(a + q * pitch(l->out), pitch(l->out), result, some, l->out);
                }
            }
        }
    }
    _tile_release();
}

/* On the rows [from, to): from gy = ∂L/∂y to ∂L/∂x, unless gx is NULL, to the gradients of what leaves the linear maps
   and, of thread t, the sums that make the gradients of biases and norms. */
AMX static void backward_rows(const struct network *n, const char *packed, const float *const *parameters, const char *saved,
                              const float *y, const float *gy, float *const *grads, float *gx, char *work, size from, size to, int t) {
    struct spans at[12], end = locate(n, at);
    size F = widest(n), R = n->rows, E = n->members;
    int lowest = 0; /* layer that has to pass no gradient on */
    while (!gx && lowest < n->count - 1 && !grads[4 * lowest] && !grads[4 * lowest + 1] && !grads[4 * lowest + 2] && !grads[4 * lowest + 3])
        lowest++;
    char *own = scratch(CHUNK * F * 10 + 32 * F * 4 + end.backward), *weights = own + CHUNK * F * 10 + 32 * F * 4;
    float *through[2] = {(float *)own, (float *)own + CHUNK * F}, *h = (float *)own + 2 * CHUNK * F;
    bf16 *rounded = (bf16 *)(h + 32 * F);
    configure();
    for (size e = 0; e < E; e++) {
        const char *of_member = packed ? packed + e * end.backward : weights;
        if (!packed) pack_member(n, parameters, e, 1, gx ? 0 : lowest + 1, weights);
        for (size r = from; r < to; r += CHUNK) {
            size rows = least(CHUNK, to - r);
            const float *g = gy + (e * R + r) * n->layers[n->count - 1].out;
            for (int i = n->count - 1; i >= lowest; i--) {
                const struct layer *l = n->layers + i;
                size N = l->out, line = e * R + r;
                float *sums = (float *)(work + at[i].sums) + (t * E * 3 + e) * N; /* (threads, 3, E, N): bias, scale, shift */
                int normed = grads[4 * i + 2] || grads[4 * i + 3];
                bf16 *d = n->learned ? (bf16 *)(work + at[i].gradient) + (e * up(R, 32) + r) * pitch(N) : rounded;
                for (size q = 0; q < rows; q += 32) {
                    size some = least(32, rows - q);
                    const float *mine = g + q * N;
                    if (l->kind != NOTHING) {
                        fused_backward(l->kind, (const float *)(saved + at[i].inner) + (line + q) * N,
                                       parameters[4 * i + 2] + e * N, parameters[4 * i + 3] + e * N, y + (line + q) * N,
                                       (const float *)(saved + at[i].stats) + (line + q) * 2, mine, h,
                                       normed ? sums + E * N : NULL, normed ? sums + 2 * E * N : NULL, some, N, some, l->groups, 1);
                        mine = h;
                    }
                    for (size m = 0; grads[4 * i + 1] && m < some; m++)
                        for (size j = 0; j < N; j++) sums[j] += mine[m * N + j];
                    round_rows(d + q * pitch(N), pitch(N), mine, some, N);
                }
                if (i == lowest && !gx) break;
                float *next = i ? through[i % 2] : gx + line * l->in;
                multiply(d, pitch(N), (const bf16 *)(of_member + at[i].backward), NULL, next, rows, l->in, N);
                g = next;
            }
        }
    }
    _tile_release();
}

/* Gradients of the weights, of which thread t does its share of lines. */
AMX static void backward_weights(const struct network *n, const char *saved, float *const *grads, const char *work, int t) {
    struct spans at[12];
    locate(n, at);
    bf16 *own = (bf16 *)scratch(DEPTH * (widest(n) + 32) * 2);
    configure();
    for (int i = 0; i < n->count; i++)
        for (size e = 0; grads[4 * i] && e < n->members; e++) {
            const struct layer *l = n->layers + i;
            size R = n->rows, K = l->in, N = l->out, padded = up(R, 32);
            const bf16 *a = (const bf16 *)(saved + at[i].input) + (i == 0 && n->shared ? 0 : e) * padded * pitch(K);
            const bf16 *d = (const bf16 *)(work + at[i].gradient) + e * padded * pitch(N);
            size lines = n->plain ? N : K, blocks = (lines + 31) / 32;
            size from = 32 * (blocks * t / n->threads), to = least(32 * (blocks * (t + 1) / n->threads), lines);
            float *c = grads[4 * i] + e * K * N;
            if (n->plain)
                multiply_transposed(d, pitch(N), a, pitch(K), c, R, N, K, from, to, own);
            else
                multiply_transposed(a, pitch(K), d, pitch(N), c, R, K, N, from, to, own);
        }
    _tile_release();
}

static void add_up(const struct network *n, float *const *grads, const char *work) {
    struct spans at[12];
    locate(n, at);
    for (int i = 0; i < n->count; i++)
        for (int k = 0; k < 3; k++) { /* bias, scale, shift */
            size width = n->members * n->layers[i].out;
            const float *sums = (const float *)(work + at[i].sums) + k * width;
            float *to = grads[4 * i + 1 + k];
            if (!to) continue;
            memcpy(to, sums, width * sizeof(float));
            for (int t = 1; t < n->threads; t++)
                for (size j = 0; j < width; j++) to[j] += sums[3 * t * width + j];
        }
}

/* What Python calls. `parameters` and `grads` have weight, bias, norm's scale and its shift of each layer; NULL where
   there is none or, among `grads`, where nobody asks for it. */

/* Ask Linux for the use of tiles, once, and tell whether they are there. */
EXPORT int products_available(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int tiles = (d >> 22 & 1) && (d >> 24 & 1);                        /* AMX-BF16 and AMX-TILE */
    int vectors = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1); /* AVX-512 F, DQ, BW, VL */
    if (!tiles || !vectors || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0; /* AVX512-BF16 */
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18L /* XTILEDATA */) == 0;
}

/* Bytes of packed weights for the way forward and for the way back, of what is saved between, and of backward's work. */
EXPORT void network_sizes(const struct network *n, int64_t *bytes) {
    struct spans at[12], end = locate(n, at);
    bytes[0] = n->members * end.forward;
    bytes[1] = n->members * end.backward;
    bytes[2] = end.input;
    bytes[3] = end.gradient;
}

EXPORT void network_pack(const struct network *n, const float *const *parameters, int backward, char *packed) {
    struct spans at[12], end = locate(n, at);
    for (size e = 0; e < n->members; e++)
        pack_member(n, parameters, e, backward, 0, packed + e * (backward ? end.backward : end.forward));
}

EXPORT void network_forward(const struct network *n, const char *packed, const float *const *parameters, const float *x,
                            float *y, char *saved) {
    size blocks = (n->rows + 31) / 32, T = n->threads;
#pragma omp parallel for num_threads(T) if (T > 1) schedule(static)
    for (int t = 0; t < T; t++)
        forward_rows(n, packed, parameters, x, y, saved, 32 * (blocks * t / T), least(n->rows, 32 * (blocks * (t + 1) / T)));
}

EXPORT void network_backward(const struct network *n, const char *packed, const float *const *parameters, const char *saved,
                             const float *y, const float *gy, float *const *grads, float *gx, char *work) {
    struct spans at[12];
    locate(n, at);
    size blocks = (n->rows + 31) / 32, T = n->threads;
    for (int i = 0; i < n->count; i++)
        memset(work + at[i].sums, 0, 3 * T * n->members * n->layers[i].out * sizeof(float));
#pragma omp parallel for num_threads(T) if (T > 1) schedule(static)
    for (int t = 0; t < T; t++)
        backward_rows(n, packed, parameters, saved, y, gy, grads, gx, work, 32 * (blocks * t / T),
                      least(n->rows, 32 * (blocks * (t + 1) / T)), t);
#pragma omp parallel for num_threads(T) if (T > 1) schedule(static)
    for (int t = 0; t < T; t++) backward_weights(n, saved, grads, work, t);
    add_up(n, grads, work);
}

#else
EXPORT int products_available(void) { return 0; }
#endif
