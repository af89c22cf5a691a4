/* Fused normalisation and activation on rows of float32, forward and backward. Plain C: no Python, no PyTorch.
   pwm_gym/kernels.py calls `fused_forward` and `fused_backward`, at the end of this file.

   Every function works on the rows [first, last) of a C-contiguous (rows, F) matrix. Parameters are (E, F), of which
   row r uses line r / per_member. `stats` holds (mean, 1 / deviation) of each row, (rows, 2).

   LayerNorm:  x̂ = (x - μ) / sqrt(σ² + ε),  u = w x̂ + b
   and with h = w ∂L/∂u,  ∂L/∂x = (h - mean(h) - x̂ mean(h x̂)) / sqrt(σ² + ε).

   Mish:  y = x tanh(softplus(x)). With e = exp(x), n = e (e + 2) and q = 1 / (n + 2):
   y = x n q,  dy/dx = n q + 4 x e (e + 1) q².

   SimNorm: feature v G + g is member v of group g, v < F / G; a softmax over v. */

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-thread-jumps") /* which would compute both halves of a clamp: slow, and with subnormal numbers */
#endif

#include "_kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define PER_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_PROCESSOR
#endif

/* exp(x), x <= 88, to 2 units in the last place from -87 on, and below the value of -87; NaN stays NaN. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: its lowest bits now hold n = round(x / ln 2) */
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* x - n ln 2, in two parts */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23; /* 2^n */
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

INLINE float mish(float x) {
    float e = exponential(x > 40.0f ? 40.0f : x), n = e * (e + 2.0f);
    return x * (n / (n + 2.0f));
}

INLINE float mish_slope(float x) {
    float e = exponential(x > 40.0f ? 40.0f : x), n = e * (e + 2.0f), q = 1.0f / (n + 2.0f);
    return n * q + 4.0f * (x * (e * q)) * ((e + 1.0f) * q);
}

INLINE void moments(const float *restrict x, int64_t F, float eps, float *restrict stats) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < F; i++) sum += x[i];
    float mean = sum / (float)F;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < F; i++) squares += (x[i] - mean) * (x[i] - mean);
    stats[0] = mean;
    stats[1] = 1.0f / sqrtf(squares / (float)F + eps);
}

/* From g = ∂L/∂u to ∂L/∂x, both (F,), of a LayerNorm of x; adds to ∂L/∂w and ∂L/∂b unless dw is NULL.
   h is scratch, (F,). `gx` may be `x` or `g`. */
INLINE void normed_backward(const float *x, const float *g, const float *restrict w, const float *stats, float *gx,
                            float *restrict dw, float *restrict db, float *restrict h, int64_t F) {
    float mean = stats[0], scale = stats[1], along = 0.0f, total = 0.0f;
#pragma omp simd reduction(+ : along, total)
    for (int64_t i = 0; i < F; i++) {
        h[i] = g[i] * w[i];
        total += h[i];
        along += h[i] * ((x[i] - mean) * scale);
    }
    total /= (float)F;
    along /= (float)F;
    if (dw) {
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            dw[i] += g[i] * ((x[i] - mean) * scale);
            db[i] += g[i];
        }
    }
#pragma omp simd
    for (int64_t i = 0; i < F; i++) gx[i] = (h[i] - total - (x[i] - mean) * scale * along) * scale;
}

/* y = Mish(LayerNorm(x)) */
static PER_PROCESSOR void norm_mish(const float *x, const float *w, const float *b, float *y, float *stats,
                                    int64_t first, int64_t last, int64_t F, int64_t per_member, float eps) {
    for (int64_t r = first; r < last; r++) {
        const float *restrict row = x + r * F, *restrict wr = w + r / per_member * F, *restrict br = b + r / per_member * F;
        float *restrict out = y + r * F;
        moments(row, F, eps, stats + 2 * r);
        float mean = stats[2 * r], scale = stats[2 * r + 1];
#pragma omp simd
        for (int64_t i = 0; i < F; i++) out[i] = mish((row[i] - mean) * scale * wr[i] + br[i]);
    }
}

static PER_PROCESSOR void norm_mish_backward(const float *x, const float *w, const float *b, const float *stats,
                                             const float *gy, float *gx, float *dw, float *db, int64_t first,
                                             int64_t last, int64_t F, int64_t per_member) {
    float *restrict g = malloc(2 * F * sizeof(float)), *restrict h = g + F;
    for (int64_t r = first; r < last; r++) {
        int64_t m = r / per_member * F;
        const float *restrict row = x + r * F, *restrict wr = w + m, *restrict br = b + m, *restrict up = gy + r * F;
        float mean = stats[2 * r], scale = stats[2 * r + 1];
#pragma omp simd
        for (int64_t i = 0; i < F; i++) g[i] = up[i] * mish_slope((row[i] - mean) * scale * wr[i] + br[i]);
        normed_backward(row, g, wr, stats + 2 * r, gx + r * F, dw ? dw + m : NULL, dw ? db + m : NULL, h, F);
    }
    free(g);
}

/* y = LayerNorm(Mish(x)) */
static PER_PROCESSOR void mish_norm(const float *x, const float *w, const float *b, float *y, float *stats,
                                    int64_t first, int64_t last, int64_t F, int64_t per_member, float eps) {
    for (int64_t r = first; r < last; r++) {
        const float *restrict row = x + r * F, *restrict wr = w + r / per_member * F, *restrict br = b + r / per_member * F;
        float *restrict out = y + r * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) out[i] = mish(row[i]);
        moments(out, F, eps, stats + 2 * r);
        float mean = stats[2 * r], scale = stats[2 * r + 1];
#pragma omp simd
        for (int64_t i = 0; i < F; i++) out[i] = (out[i] - mean) * scale * wr[i] + br[i];
    }
}

static PER_PROCESSOR void mish_norm_backward(const float *x, const float *w, const float *stats,
                                             const float *gy, float *gx, float *dw, float *db, int64_t first,
                                             int64_t last, int64_t F, int64_t per_member) {
    float *restrict a = malloc(3 * F * sizeof(float)), *restrict slope = a + F, *restrict h = a + 2 * F;
    for (int64_t r = first; r < last; r++) {
        int64_t m = r / per_member * F;
        const float *restrict row = x + r * F;
        float *out = gx + r * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            float v = row[i], e = exponential(v > 40.0f ? 40.0f : v), n = e * (e + 2.0f), q = 1.0f / (n + 2.0f);
            a[i] = v * (n * q);
            slope[i] = n * q + 4.0f * (v * (e * q)) * ((e + 1.0f) * q);
        }
        normed_backward(a, gy + r * F, w + m, stats + 2 * r, out, dw ? dw + m : NULL, dw ? db + m : NULL, h, F);
#pragma omp simd
        for (int64_t i = 0; i < F; i++) out[i] *= slope[i];
    }
    free(a);
}

/* y = SimNorm(LayerNorm(x)), with G groups */
static PER_PROCESSOR void norm_simnorm(const float *x, const float *w, const float *b, float *y, float *stats,
                                       int64_t first, int64_t last, int64_t F, int64_t per_member, float eps,
                                       int64_t G) {
    float *restrict top = malloc(2 * G * sizeof(float)), *restrict total = top + G;
    for (int64_t r = first; r < last; r++) {
        const float *restrict row = x + r * F, *restrict wr = w + r / per_member * F, *restrict br = b + r / per_member * F;
        float *restrict out = y + r * F;
        moments(row, F, eps, stats + 2 * r);
        float mean = stats[2 * r], scale = stats[2 * r + 1];
#pragma omp simd
        for (int64_t i = 0; i < F; i++) out[i] = (row[i] - mean) * scale * wr[i] + br[i];
        memcpy(top, out, G * sizeof(float));
        for (int64_t v = G; v < F; v += G)
#pragma omp simd
            for (int64_t g = 0; g < G; g++) top[g] = out[v + g] > top[g] ? out[v + g] : top[g];
        memset(total, 0, G * sizeof(float));
        for (int64_t v = 0; v < F; v += G)
#pragma omp simd
            for (int64_t g = 0; g < G; g++) {
                out[v + g] = exponential(out[v + g] - top[g]);
                total[g] += out[v + g];
            }
#pragma omp simd
        for (int64_t g = 0; g < G; g++) total[g] = 1.0f / total[g];
        for (int64_t v = 0; v < F; v += G)
#pragma omp simd
            for (int64_t g = 0; g < G; g++) out[v + g] *= total[g];
    }
    free(top);
}

static PER_PROCESSOR void norm_simnorm_backward(const float *x, const float *w, const float *y, const float *stats,
                                                const float *gy, float *gx, float *dw, float *db, int64_t first,
                                                int64_t last, int64_t F, int64_t per_member, int64_t G) {
    float *restrict along = malloc((G + 2 * F) * sizeof(float)), *restrict d = along + G, *restrict h = d + F;
    for (int64_t r = first; r < last; r++) {
        int64_t m = r / per_member * F;
        const float *restrict out = y + r * F, *restrict up = gy + r * F;
        memset(along, 0, G * sizeof(float));
        for (int64_t v = 0; v < F; v += G)
#pragma omp simd
            for (int64_t g = 0; g < G; g++) along[g] += out[v + g] * up[v + g];
        for (int64_t v = 0; v < F; v += G)
#pragma omp simd
            for (int64_t g = 0; g < G; g++) d[v + g] = out[v + g] * (up[v + g] - along[g]);
        normed_backward(x + r * F, d, w + m, stats + 2 * r, gx + r * F, dw ? dw + m : NULL, dw ? db + m : NULL, h, F);
    }
    free(along);
}

/* Work on `rows` rows of x, (rows, F), with parameters w and b, (rows / per_member, F), in `threads` threads: writes
   y, (rows, F), and stats, (rows, 2). `G` is SimNorm's number of groups. */
EXPORT void fused_forward(int kind, const float *x, const float *w, const float *b, float *y, float *stats, int64_t rows,
                          int64_t F, int64_t per_member, int64_t G, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int t = 0; t < threads; t++) {
        int64_t first = rows * t / threads, last = rows * (t + 1) / threads;
        if (kind == NORM_MISH)
            norm_mish(x, w, b, y, stats, first, last, F, per_member, eps);
        else if (kind == MISH_NORM)
            mish_norm(x, w, b, y, stats, first, last, F, per_member, eps);
        else
            norm_simnorm(x, w, b, y, stats, first, last, F, per_member, eps, G);
    }
}

/* From gy = ∂L/∂y to gx = ∂L/∂x, both (rows, F); `y` is read for SimNorm alone. Thread t adds what its rows
   contribute to ∂L/∂w and ∂L/∂b to line t of dw and db, (threads, E, F), unless they are NULL. */
EXPORT void fused_backward(int kind, const float *x, const float *w, const float *b, const float *y,
                           const float *stats, const float *gy, float *gx, float *dw, float *db, int64_t rows,
                           int64_t F, int64_t per_member, int64_t G, int threads) {
    int64_t size = rows / per_member * F;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int t = 0; t < threads; t++) {
        int64_t first = rows * t / threads, last = rows * (t + 1) / threads;
        float *dwt = dw ? dw + t * size : NULL, *dbt = dw ? db + t * size : NULL;
        if (kind == NORM_MISH)
            norm_mish_backward(x, w, b, stats, gy, gx, dwt, dbt, first, last, F, per_member);
        else if (kind == MISH_NORM)
            mish_norm_backward(x, w, stats, gy, gx, dwt, dbt, first, last, F, per_member);
        else
            norm_simnorm_backward(x, w, y, stats, gy, gx, dwt, dbt, first, last, F, per_member, G);
    }
}
