/* Whole networks with matrix products on AMX: factors rounded to bf16, sums in fp32 (`_tiles.h`). pwm_gym/bf16.py calls
   the exported functions at the end of this file. `products_available` says no where compiler, processor or Linux has
   no AMX.

   A thread takes rows through all layers, CHUNK at a time, so that what lies between them stays in its cache. */

#include "_kernels.h"

#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)

#include "_tiles.h"

#include <cpuid.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

struct layer {
    int64_t kind, in, out, groups;
    double eps, scale; /* scale: of what dropout keeps */
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
AMX static void pack_member(const struct network *n, const float *const *parameters, size e, int backward, int lowest,
                            char *packed) {
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

/* Dropout, in place, of what comes out of linear maps: `kept` holds 1 or 0. */
INLINE void drop(float *restrict x, const unsigned char *restrict kept, size count, float scale) {
#pragma omp simd
    for (size i = 0; i < count; i++) x[i] *= scale * (float)kept[i];
}

/* y = network(x) on the rows [from, to) of each member. Without `packed`, weights are packed into scratch; without
   `saved`, what lies between layers stays there. */
AMX static void forward_rows(const struct network *n, const char *packed, const float *const *parameters,
                             const unsigned char *const *kept, const float *x, float *y, char *saved, size from,
                             size to) {
    struct spans at[12], end = locate(n, at);
    size F = widest(n), R = n->rows;
    size space = CHUNK * F * 8 + 32 * F * 4 + CHUNK * 8;
    char *own = scratch(space + end.forward), *weights = own + space;
    bf16 *rounded[2] = {(bf16 *)own, (bf16 *)own + CHUNK * F};
    float *inner = (float *)(own + CHUNK * F * 4), *activated = inner + CHUNK * F, *stats = activated + 32 * F;
    int keep = saved && n->learned;
    configure();
    for (size e = 0; e < n->members; e++) {
        const char *mine = packed ? packed + e * end.forward : weights;
        if (!packed) pack_member(n, parameters, e, 0, 0, weights);
        for (size r = from; r < to; r += CHUNK) {
            size rows = least(CHUNK, to - r), padded = up(R, 32);
            size K = n->layers[0].in, reads = n->shared ? 0 : e; /* x of which member */
            bf16 *a = keep ? (bf16 *)(saved + at[0].input) + (reads * padded + r) * pitch(K) : rounded[0];
            if (!(keep && reads < e)) round_rows(a, pitch(K), x + (reads * R + r) * K, rows, K);
            for (int i = 0; i < n->count; i++) {
                const struct layer *l = n->layers + i;
                int last = i + 1 == n->count;
                size N = l->out, line = e * R + r;
                const bf16 *weight = (const bf16 *)(mine + at[i].forward);
                const float *bias = (const float *)((const char *)weight + packed_size(l->in, N));
                const float *scale = parameters[4 * i + 2], *shift = parameters[4 * i + 3];
                float *out = y + line * N, *c = inner, *s = stats;
                if (l->kind == NOTHING && last) c = out;
                if (l->kind != NOTHING && saved) {
                    c = (float *)(saved + at[i].inner) + line * N;
                    s = (float *)(saved + at[i].stats) + line * 2;
                }
                multiply(a, pitch(l->in), weight, bias, c, rows, N, l->in);
                if (kept[i]) drop(c, kept[i] + line * N, rows * N, l->scale);
                if (l->kind == NOTHING && last) break;
                if (!last) a = rounded[(i + 1) % 2];
                if (!last && keep) a = (bf16 *)(saved + at[i + 1].input) + (e * padded + r) * pitch(N);
                for (size q = 0; q < rows; q += 32) {
                    size some = least(32, rows - q);
                    float *result = l->kind == NOTHING ? c + q * N : last ? out + q * N : activated;
                    if (l->kind != NOTHING)
                        fused_forward(l->kind, c + q * N, scale + e * N, shift + e * N, result, s + 2 * q, some, N,
                                      some, l->groups, l->eps, 1);
                    if (!last) round_rows(a + q * pitch(N), pitch(N), result, some, N);
                }
            }
        }
    }
    _tile_release();
}

/* On the rows [from, to): from gy = ∂L/∂y to ∂L/∂x, unless gx is NULL, to the gradients of what leaves the linear maps
   and, of thread t, the sums that make the gradients of biases and norms. */
AMX static void backward_rows(const struct network *n, const char *packed, const float *const *parameters,
                              const unsigned char *const *kept, const char *saved, const float *y, const float *gy,
                              float *const *grads, float *gx, char *work, size from, size to, int t) {
    struct spans at[12], end = locate(n, at);
    size F = widest(n), R = n->rows, E = n->members;
    int wanted = 0;
    while (!gx && wanted < 4 * n->count - 1 && !grads[wanted]) wanted++;
    int lowest = wanted / 4; /* the layer that has to pass no gradient on */
    size space = CHUNK * F * 10 + 32 * F * 4;
    char *own = scratch(space + end.backward), *weights = own + space;
    float *through[2] = {(float *)own, (float *)own + CHUNK * F}, *h = (float *)own + 2 * CHUNK * F;
    bf16 *rounded = (bf16 *)(h + 32 * F);
    configure();
    for (size e = 0; e < E; e++) {
        const char *mine = packed ? packed + e * end.backward : weights;
        if (!packed) pack_member(n, parameters, e, 1, gx ? 0 : lowest + 1, weights);
        for (size r = from; r < to; r += CHUNK) {
            size rows = least(CHUNK, to - r);
            const float *g = gy + (e * R + r) * n->layers[n->count - 1].out;
            for (int i = n->count - 1; i >= lowest; i--) {
                const struct layer *l = n->layers + i;
                size N = l->out, line = e * R + r;
                const float *scale = parameters[4 * i + 2], *shift = parameters[4 * i + 3];
                const float *inner = (const float *)(saved + at[i].inner) + line * N;
                const float *stats = (const float *)(saved + at[i].stats) + line * 2;
                float *sums = (float *)(work + at[i].sums) + (t * E * 3 + e) * N; /* (threads, 3, E, N): for bias, */
                int normed = grads[4 * i + 2] || grads[4 * i + 3];                /* scale and shift */
                float *of_scale = normed ? sums + E * N : NULL, *of_shift = normed ? sums + 2 * E * N : NULL;
                bf16 *d = n->learned ? (bf16 *)(work + at[i].gradient) + (e * up(R, 32) + r) * pitch(N) : rounded;
                for (size q = 0; q < rows; q += 32) {
                    size some = least(32, rows - q);
                    const float *of_inner = g + q * N;
                    if (l->kind != NOTHING) {
                        fused_backward(l->kind, inner + q * N, scale + e * N, shift + e * N, y + (line + q) * N,
                                       stats + 2 * q, of_inner, h, of_scale, of_shift, some, N, some, l->groups, 1);
                        if (kept[i]) drop(h, kept[i] + (line + q) * N, some * N, l->scale);
                        of_inner = h;
                    }
                    for (size m = 0; grads[4 * i + 1] && m < some; m++)
                        for (size j = 0; j < N; j++) sums[j] += of_inner[m * N + j];
                    round_rows(d + q * pitch(N), pitch(N), of_inner, some, N);
                }
                if (i == lowest && !gx) break;
                float *next = i ? through[i % 2] : gx + line * l->in;
                multiply(d, pitch(N), (const bf16 *)(mine + at[i].backward), NULL, next, rows, l->in, N);
                g = next;
            }
        }
    }
    _tile_release();
}

/* Gradients of the weights, of which thread t does its share of lines. */
AMX static void backward_weights(const struct network *n, const char *saved, float *const *grads, const char *work,
                                 int t) {
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
   there is none or, among `grads`, where nobody asks for it. `kept` has for each layer what dropout keeps of its linear
   map, (members, rows, out), or NULL; dropout stands before a norm. */

/* Ask Linux for the use of tiles, once; give this interface's number if they are there, else 0. */
EXPORT int products_available(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int tiles = (d >> 22 & 1) && (d >> 24 & 1);                        /* AMX-BF16 and AMX-TILE */
    int vectors = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1); /* AVX-512 F, DQ, BW, VL */
    if (!tiles || !vectors || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 0; /* AVX512-BF16 */
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18L /* XTILEDATA */) == 0 ? 2 : 0;
}

/* Bytes of packed weights for the way forward and for the way back, of what is saved between, of backward's work. */
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

EXPORT void network_forward(const struct network *n, const char *packed, const float *const *parameters,
                            const unsigned char *const *kept, const float *x, float *y, char *saved) {
    size blocks = (n->rows + 31) / 32, T = n->threads;
#pragma omp parallel for num_threads(T) if (T > 1) schedule(static)
    for (int t = 0; t < T; t++)
        forward_rows(n, packed, parameters, kept, x, y, saved, 32 * (blocks * t / T),
                     least(n->rows, 32 * (blocks * (t + 1) / T)));
}

EXPORT void network_backward(const struct network *n, const char *packed, const float *const *parameters,
                             const unsigned char *const *kept, const char *saved, const float *y, const float *gy,
                             float *const *grads, float *gx, char *work) {
    struct spans at[12];
    locate(n, at);
    size blocks = (n->rows + 31) / 32, T = n->threads;
    for (int i = 0; i < n->count; i++)
        memset(work + at[i].sums, 0, 3 * T * n->members * n->layers[i].out * sizeof(float));
#pragma omp parallel for num_threads(T) if (T > 1) schedule(static)
    for (int t = 0; t < T; t++)
        backward_rows(n, packed, parameters, kept, saved, y, gy, grads, gx, work, 32 * (blocks * t / T),
                      least(n->rows, 32 * (blocks * (t + 1) / T)), t);
#pragma omp parallel for num_threads(T) if (T > 1) schedule(static)
    for (int t = 0; t < T; t++) backward_weights(n, saved, grads, work, t);
    add_up(n, grads, work);
}

#else
EXPORT int products_available(void) { return 0; }
#endif
