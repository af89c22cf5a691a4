/* What the two files of the library share: `_kernels.c` between matrix products, `_products.c` products in bf16. */

#ifndef PWM_GYM_KERNELS_H
#define PWM_GYM_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

enum { NORM_MISH, MISH_NORM, NORM_SIMNORM, NOTHING };

EXPORT void fused_forward(int kind, const float *x, const float *w, const float *b, float *y, float *stats, int64_t rows,
                          int64_t F, int64_t per_member, int64_t G, float eps, int threads);

EXPORT void fused_backward(int kind, const float *x, const float *w, const float *b, const float *y,
                           const float *stats, const float *gy, float *gx, float *dw, float *db, int64_t rows,
                           int64_t F, int64_t per_member, int64_t G, int threads);

#endif
