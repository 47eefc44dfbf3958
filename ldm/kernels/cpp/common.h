// Shared by the CPU kernels: vectors of 16 floats, bfloat16, and functions of vectors.
//
// Built for the machine that it runs on (-march=native) and called by ldm/kernels/native.py through plain C functions,
// in which dtype is 0 for float and 1 for bfloat16, and strides and sizes are counted in elements. Vectors are GCC's
// vector extension, which every target supports. Every function takes the number of threads, and memory of torch's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#define LDM_AMX 1
#endif

namespace {

constexpr int L = 16;  // floats in a vector
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to the nearest, ties to even
  rounded = ((vu)(v != v) & 0x7fc0) | (~(vu)(v != v) & rounded);
  vh h = __builtin_convertvector(rounded, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) {
  uint32_t u = (uint32_t)p->bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// b where either is NaN, as the processor's instruction does
inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
inline vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// 2^x by the minimax polynomial of 2^r for r from 0 to 1: relative error 1e-7 at degree 5, 1e-4, below bfloat16's
// rounding, at degree 3. x may be clamped to -126 and 127. Without AVX512 x has to be finite.
template <int degree = 5>
inline vf exp2v(vf x) {
#if defined(__AVX512DQ__)
  const vf r = (vf)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#else
  x = vmin(splat(127.0f), vmax(splat(-126.0f), x));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const vf shifted = (x - 0.5f) + magic, r = x - (shifted - magic);
#endif
  vf p;
  if (degree == 5) {
    p = splat(1.87757668e-03f) * r + splat(8.98934014e-03f);
    p = p * r + splat(5.58263179e-02f);
    p = p * r + splat(2.40153617e-01f);
    p = p * r + splat(6.93153073e-01f);
    p = p * r + splat(9.99999925e-01f);
  } else {
    p = splat(7.80245233e-02f) * r + splat(2.26067159e-01f);
    p = p * r + splat(6.95833537e-01f);
    p = p * r + splat(9.99925219e-01f);
  }
#if defined(__AVX512DQ__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

// Functions for results of type T: for bfloat16 a relative error of 1e-4 is below its rounding.

template <class T>
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  if (sizeof(T) == 2) return (vf)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.0f / x;
}

// e^x for finite x, anything for others: the caller multiplies by what x came from, so that NaN and infinity survive.
template <class T>
inline vf expv(vf x) {
  return exp2v<sizeof(T) == 2 ? 3 : 5>(x * 1.44269504f);
}

template <class T>
inline vf silu(vf x) {
  return x * reciprocal<T>(1.0f + expv<T>(-x));
}

// Half of x times 1 + erf(x / sqrt 2); erf by Abramowitz and Stegun 7.1.26, error 1.5e-7.
template <class T>
inline vf gelu(vf x) {
  vf z = x * 0.70710678f;
  vf a = z < 0.0f ? -z : z;
  vf t = reciprocal<T>(1.0f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf tail = p * t * expv<T>(-a * a);  // 1 - erf(a)
  vf cdf = x < 0.0f ? 0.5f * tail : 1.0f - 0.5f * tail;
  return x * cdf;
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many threads some work is shared by: below `worth` for each, waking another and waiting for it costs more than it does.
inline int useful(int64_t work, int64_t worth, int threads) {
  return (int)std::max<int64_t>(1, std::min<int64_t>(threads, work / worth));
}

}  // namespace
