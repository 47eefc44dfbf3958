// Kernels for one CPU: attention, group norm with SiLU, and the gate of GEGLU, for float and bfloat16.
//
// Built for the machine that it runs on (-march=native) and called by ldm/kernels/native.py through plain C functions.
// Vectors of 16 floats are GCC's, which any machine can hold; products of bfloat16 use AMX tiles where the processor
// has them, else AVX512-BF16. Every function takes the number of threads, and rows that torch owns.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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

inline vf splat(float x) { return vf{} + x; }

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
  rounded = (vu)(v != v) & 0x7fc0 | ~(vu)(v != v) & rounded;
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
inline void store1(float* p, float f) { *p = f; }
inline void store1(bf16* p, float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  p->bits = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// b where either is no number, as the processor's instruction has it
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

inline float sum_of(vf v) {
  float s[L];
  std::memcpy(s, &v, sizeof s);
  for (int n = L / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}

inline float max_of(vf v) {
  float s[L];
  std::memcpy(s, &v, sizeof s);
  for (int n = L / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  return s[0];
}

// 2^x for x up to 127, by the Taylor series around the nearest whole number: of degree 6 to 2 parts in 10^7, of degree
// 4 to 5 in 10^5, which bfloat16 does not see. What is below -126 counts as -126; x has to be a number.
template <int degree = 6>
inline vf exp2v(vf x) {
  x = vmax(splat(-126.0f), x);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, and leaves it in the last bits
  vf shifted = x + magic;
  vf r = x - (shifted - magic);  // -0.5 to 0.5
  vf p = splat(9.6181291e-3f);
  if (degree == 6) p = (splat(1.5403530e-4f) * r + splat(1.3333558e-3f)) * r + p;
  p = p * r + splat(5.5504109e-2f);
  p = p * r + splat(2.4022651e-1f);
  p = p * r + splat(6.9314718e-1f);
  p = p * r + splat(1.0f);
  return (vf)((vi)p + ((vi)shifted << 23));
}

// e^x; what is no number stays so.
inline vf expv(vf x) {
  vf found = exp2v(vmin(splat(127.0f), x * 1.44269504f));
  return x == x ? found : x;
}

inline vf silu(vf x) { return x / (1.0f + expv(-x)); }

// Half of x times 1 + erf(x / sqrt 2); erf by Abramowitz and Stegun 7.1.26, right to 1.5e-7.
inline vf gelu(vf x) {
  vf z = x * 0.70710678f;
  vf a = z < 0.0f ? -z : z;
  vf t = 1.0f / (1.0f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  vf tail = p * t * expv(-a * a);  // 1 - erf(a)
  vf cdf = x < 0.0f ? 0.5f * tail : 1.0f - 0.5f * tail;
  return x * cdf;
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- products -----------------------------------------------------------------------------------
//
// The right-hand operand is packed in blocks of 16 columns: [block][k / G][16][G], where G is how many steps of the
// reduction one multiplication takes: 1 for float, 2 for bfloat16. The left-hand one is plain rows.

template <class T>
struct Group {
  static constexpr int size = 1;
};
template <>
struct Group<bf16> {
  static constexpr int size = 2;
};

inline vf multiply(const float* a, const float* b, vf c) { return c + splat(*a) * load(b); }

inline vf multiply(const bf16* a, const bf16* b, vf c) {
#if defined(__AVX512BF16__)
  int32_t pair;
  std::memcpy(&pair, a, 4);
  __m512i columns;
  std::memcpy(&columns, b, 64);
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)columns);
#else
  vu pairs;
  std::memcpy(&pairs, b, 64);
  vf even = (vf)(pairs << 16), odd = (vf)(pairs & 0xffff0000u);
  return c + load1(a) * even + load1(a + 1) * odd;
#endif
}

// c (R rows, J blocks of 16) = or += a (R, k) b; k is a multiple of the group.
template <class T, int R, int J>
inline void block(const T* a, int64_t lda, const T* b, int64_t block_size, int64_t k, float* c, int64_t ldc, bool add) {
  constexpr int G = Group<T>::size;
  vf acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = add ? load(c + r * ldc + j * L) : vf{};
  for (int64_t p = 0; p < k; p += G)
    for (int j = 0; j < J; ++j) {
      const T* columns = b + j * block_size + p * L;
      for (int r = 0; r < R; ++r) acc[r][j] = multiply(a + r * lda + p, columns, acc[r][j]);
    }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) store(c + r * ldc + j * L, acc[r][j]);
}

template <class T, int J>
inline void rows_of(const T* a, int64_t lda, const T* b, int64_t block_size, int64_t rows, int64_t k, float* c,
                    int64_t ldc, bool add) {
  constexpr int R = J == 1 ? 16 : 8;
  int64_t i = 0;
  for (; i + R <= rows; i += R) block<T, R, J>(a + i * lda, lda, b, block_size, k, c + i * ldc, ldc, add);
  for (; i < rows; ++i) block<T, 1, J>(a + i * lda, lda, b, block_size, k, c + i * ldc, ldc, add);
}

// c (rows, 16 blocks) = or += a (rows, k) b (k, 16 blocks)
template <class T>
void product(const T* a, int64_t lda, const T* b, int64_t block_size, int64_t rows, int64_t blocks, int64_t k, float* c,
             int64_t ldc, bool add) {
  int64_t j = 0;
  while (j < blocks) {
    int64_t left = blocks - j;
    const T* columns = b + j * block_size;
    if (left == 3 || left > 4) {
      rows_of<T, 3>(a, lda, columns, block_size, rows, k, c + j * L, ldc, add);
      j += 3;
    } else if (left >= 2) {
      rows_of<T, 2>(a, lda, columns, block_size, rows, k, c + j * L, ldc, add);
      j += 2;
    } else {
      rows_of<T, 1>(a, lda, columns, block_size, rows, k, c + j * L, ldc, add);
      j += 1;
    }
  }
}

#if defined(LDM_AMX)

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void configure_tiles() {
  Tiles tiles;
  for (int i = 0; i < 8; ++i) tiles.bytes[i] = 64, tiles.rows[i] = 16;
  _tile_loadconfig(&tiles);
}

// Rows are a multiple of 16 and k of 32: the caller pads. Tiles 0 to 3 are sums, 4 and 5 rows of a, 6 and 7 columns.
template <>
void product<bf16>(const bf16* a, int64_t lda, const bf16* b, int64_t block_size, int64_t rows, int64_t blocks,
                   int64_t k, float* c, int64_t ldc, bool add) {
  const int64_t as = lda * 2, cs = ldc * 4;
  int64_t i = 0;
  for (; i + 32 <= rows; i += 32) {
    const bf16 *a0 = a + i * lda, *a1 = a0 + 16 * lda;
    float *c0 = c + i * ldc, *c1 = c0 + 16 * ldc;
    int64_t j = 0;
    for (; j + 2 <= blocks; j += 2) {
      const bf16 *b0 = b + j * block_size, *b1 = b0 + block_size;
      if (add) {
        _tile_loadd(0, c0 + j * L, cs); _tile_loadd(1, c0 + j * L + L, cs);
        _tile_loadd(2, c1 + j * L, cs); _tile_loadd(3, c1 + j * L + L, cs);
      } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      }
      for (int64_t p = 0; p < k; p += 32) {
        _tile_loadd(4, a0 + p, as); _tile_loadd(6, b0 + p * L, 64);
        _tile_loadd(7, b1 + p * L, 64); _tile_loadd(5, a1 + p, as);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0 + j * L, cs); _tile_stored(1, c0 + j * L + L, cs);
      _tile_stored(2, c1 + j * L, cs); _tile_stored(3, c1 + j * L + L, cs);
    }
    if (j < blocks) {
      const bf16* b0 = b + j * block_size;
      if (add) {
        _tile_loadd(0, c0 + j * L, cs); _tile_loadd(2, c1 + j * L, cs);
      } else {
        _tile_zero(0); _tile_zero(2);
      }
      for (int64_t p = 0; p < k; p += 32) {
        _tile_loadd(6, b0 + p * L, 64); _tile_loadd(4, a0 + p, as); _tile_loadd(5, a1 + p, as);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(2, 5, 6);
      }
      _tile_stored(0, c0 + j * L, cs); _tile_stored(2, c1 + j * L, cs);
    }
  }
  for (; i < rows; i += 16) {
    const bf16* a0 = a + i * lda;
    float* c0 = c + i * ldc;
    for (int64_t j = 0; j < blocks; ++j) {
      const bf16* b0 = b + j * block_size;
      if (add) {
        _tile_loadd(0, c0 + j * L, cs);
      } else {
        _tile_zero(0);
      }
      for (int64_t p = 0; p < k; p += 32) {
        _tile_loadd(4, a0 + p, as); _tile_loadd(6, b0 + p * L, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, c0 + j * L, cs);
    }
  }
}

#endif

// --- attention ----------------------------------------------------------------------------------

constexpr int64_t ROWS = 32;    // queries at a time
constexpr int64_t CHUNK = 256;  // keys at a time: their scores stay in the first cache
constexpr int64_t LANE = CHUNK + L;  // of the scores; a power of two would crowd few sets of it
constexpr int64_t MOST_FEATURES = 512;

template <class T>
inline void clear(T* p, int64_t n) {
  std::memset(p, 0, n * sizeof(T));
}

// exp2v takes numbers alone, so rows that hold others are found beforehand.
template <class T>
inline bool finite(const T* p, int64_t n) {
  float zero = 0;
  for (int64_t i = 0; i < n; ++i) zero += load1(p + i) * 0.0f;
  return zero == 0;
}

// Pack keys as columns: the reduction is over the head's features. False if not all are finite.
template <class T>
bool pack_keys(const T* k, int64_t stride, int64_t keys, int64_t features, int64_t depth, T* packed) {
  constexpr int G = Group<T>::size;
  bool fine = true;
  clear(packed, up(keys, 2 * L) * depth);
  for (int64_t m = 0; m < keys; ++m) {
    T* column = packed + m / L * L * depth + m % L * G;
    const T* row = k + m * stride;
    for (int64_t d = 0; d < features; ++d) column[d / G * L * G + d % G] = row[d];
    fine = fine && finite(row, features);
  }
  return fine;
}

// Pack values as columns of features: the reduction is over the keys.
template <class T>
void pack_values(const T* v, int64_t stride, int64_t keys, int64_t features, int64_t width, int64_t depth, T* packed) {
  constexpr int G = Group<T>::size;
  clear(packed, width * depth);
  for (int64_t m = 0; m < keys; ++m) {
    const T* row = v + m * stride;
    for (int64_t d = 0; d < features; ++d)
      packed[d / L * L * depth + m / G * L * G + d % L * G + m % G] = row[d];
  }
}

template <class T>
struct Shape {
  int64_t batch, heads, queries, keys, features;
#if defined(LDM_AMX)
  static constexpr int64_t step = Group<T>::size == 2 ? 2 * L : 1;
#else
  static constexpr int64_t step = Group<T>::size;
#endif
  int64_t depth() const { return up(features, step); }   // of the first product's reduction
  int64_t width() const { return up(features, L); }      // of the second one's columns
  int64_t padded_keys() const { return up(keys, 2 * L); }
  int64_t key_size() const { return padded_keys() * depth(); }
  int64_t value_size() const { return padded_keys() * width(); }
};

// One block of queries: running maximum and sum per row, as flash attention keeps them (arXiv:2205.14135).
template <class T>
void attend_block(const Shape<T>& s, const T* q, int64_t q_stride, int64_t count, const T* keys, bool fine,
                  const T* values, T* out, int64_t out_stride, float scale, float* scratch) {
  const int64_t depth = s.depth(), width = s.width(), rows = up(count, L);
  float* scores = scratch;                       // (ROWS, LANE); the weights overwrite them, in T
  float* sums = scores + ROWS * LANE;            // (ROWS, width)
  float* top = sums + ROWS * width;              // (ROWS,)
  float* total = top + ROWS;                     // (ROWS,)
  T* left = reinterpret_cast<T*>(total + ROWS);  // (ROWS, depth)
  clear(left, rows * depth);
  for (int64_t i = 0; i < count; ++i) std::memcpy(left + i * depth, q + i * q_stride, s.features * sizeof(T));
  const float factor = scale * 1.44269504f;
  constexpr int degree = sizeof(T) == 2 ? 4 : 6;
  for (int64_t i = 0; i < rows; ++i) top[i] = -std::numeric_limits<float>::infinity(), total[i] = 0;
  for (int64_t m0 = 0; m0 < s.keys; m0 += CHUNK) {
    const int64_t here = s.keys - m0 < CHUNK ? s.keys - m0 : CHUNK, padded = up(here, 2 * L);
    product<T>(left, depth, keys + m0 * depth, L * depth, rows, padded / L, depth, scores, LANE,
               false);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scores + i * LANE;
      for (int64_t m = here; m < padded; ++m) row[m] = -std::numeric_limits<float>::infinity();
      vf most = splat(-std::numeric_limits<float>::infinity());
      for (int64_t m = 0; m < padded; m += L) most = vmax(most, load(row + m));
      float now = max_of(most) * factor;
      now = now > top[i] ? now : top[i];
      T* weights = reinterpret_cast<T*>(row);
      vf sum = {}, base = splat(now);
      for (int64_t m = 0; m < padded; m += L) {
        vf w = exp2v<degree>(load(row + m) * factor - base);  // 2^-126 where there is no key, and its value is zero
        sum += w;
        store(weights + m, w);
      }
      const float shrink = std::exp2(top[i] - now);  // 0 at the first chunk
      total[i] = total[i] * shrink + sum_of(sum);
      top[i] = now;
      if (m0)
        for (int64_t d = 0; d < width; d += L) store(sums + i * width + d, load(sums + i * width + d) * shrink);
    }
    product<T>(reinterpret_cast<T*>(scores), LANE * 4 / sizeof(T), values + m0 * L, s.padded_keys() * L, rows, width / L, padded, sums,
               width, m0 > 0);
  }
  for (int64_t i = 0; i < count; ++i) {
    const float inverse = fine && finite(left + i * depth, s.features) ? 1.0f / total[i] : NAN;
    float line[MOST_FEATURES];
    for (int64_t d = 0; d < width; d += L) store(line + d, load(sums + i * width + d) * inverse);
    for (int64_t d = 0; d < s.features; ++d) store1(out + i * out_stride + d, line[d]);
  }
}

template <class T>
int64_t scratch_floats(const Shape<T>& s) {
  return up(ROWS * LANE + ROWS * s.width() + 2 * ROWS + ROWS * s.depth() * (int64_t)sizeof(T) / 4, 64);
}

template <class T>
int64_t attention_bytes(const Shape<T>& s, int threads) {
  const int64_t pairs = s.batch * s.heads;
  return pairs * (s.key_size() + s.value_size()) * (int64_t)sizeof(T) + threads * scratch_floats<T>(s) * 4 + pairs;
}

// q, k, v and out are (batch, tokens, heads, features), features and heads lying together.
template <class T>
void attention(const Shape<T>& s, const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride,
               T* out, int64_t out_stride, float scale, char* workspace, int threads) {
  const int64_t pairs = s.batch * s.heads, blocks = (s.queries + ROWS - 1) / ROWS;
  float* scratch = reinterpret_cast<float*>(workspace);
  T* packed = reinterpret_cast<T*>(scratch + threads * scratch_floats<T>(s));
  char* fine = reinterpret_cast<char*>(packed + pairs * (s.key_size() + s.value_size()));  // (pairs,): of the keys
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t b = i / s.heads, h = i % s.heads;
      T* keys = packed + i * (s.key_size() + s.value_size());
      fine[i] = pack_keys(k + b * s.keys * k_stride + h * s.features, k_stride, s.keys, s.features, s.depth(), keys);
      pack_values(v + b * s.keys * v_stride + h * s.features, v_stride, s.keys, s.features, s.width(), s.padded_keys(),
                  keys + s.key_size());
    }
#if defined(LDM_AMX)
    configure_tiles();
#endif
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * blocks; ++task) {
      const int64_t i = task / blocks, b = i / s.heads, h = i % s.heads, first = task % blocks * ROWS;
      const int64_t count = s.queries - first < ROWS ? s.queries - first : ROWS;
      const T* keys = packed + i * (s.key_size() + s.value_size());
      attend_block(s, q + (b * s.queries + first) * q_stride + h * s.features, q_stride, count, keys, fine[i],
                   keys + s.key_size(), out + (b * s.queries + first) * out_stride + h * s.features, out_stride, scale,
                   scratch + omp_get_thread_num() * scratch_floats<T>(s));
    }
#if defined(LDM_AMX)
    _tile_release();
#endif
  }
}

// --- group norm with SiLU -----------------------------------------------------------------------

constexpr int64_t CHUNK_ROWS = 64;  // cells whose sums are kept in float before they enter a sum in double

inline int64_t norm_chunks(int64_t cells) { return (cells + CHUNK_ROWS - 1) / CHUNK_ROWS; }

inline int64_t norm_floats(int64_t batch, int64_t cells, int64_t channels) {
  return batch * channels * (2 * norm_chunks(cells) + 2);
}

// x and out are (batch, cells, channels) and may be one. What is normalised is x + shift, shift (batch, channels) or
// none; weight and bias are (channels,), or (batch, channels) where affine_stride is channels instead of 0. Sums are of
// the distance from the first cell's value, so that a mean far from zero costs no digits.
template <class T>
void group_norm(int64_t batch, int64_t cells, int64_t channels, int64_t groups, const T* x, const float* shift,
                const float* weight, const float* bias, int64_t affine_stride, float eps, bool with_silu, T* out,
                float* workspace, int threads) {
  const int64_t chunks = norm_chunks(cells), share = channels / groups;
  float* partial = workspace;                            // (batch, chunks, 2, channels)
  float* affine = partial + batch * chunks * 2 * channels;  // (batch, 2, channels): factor and offset of each channel
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * chunks; ++task) {
      const int64_t b = task / chunks, first = task % chunks * CHUNK_ROWS;
      const int64_t last = first + CHUNK_ROWS < cells ? first + CHUNK_ROWS : cells;
      const T* origin = x + b * cells * channels;
      float *sum = partial + task * 2 * channels, *square = sum + channels;
      for (int64_t c = 0; c < channels; c += L) {
        vf pivot = load(origin + c), s = {}, q = {};
        for (int64_t i = first; i < last; ++i) {
          vf d = load(origin + i * channels + c) - pivot;
          s += d;
          q += d * d;
        }
        store(sum + c, s);
        store(square + c, q);
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * groups; ++task) {
      const int64_t b = task / groups, g = task % groups;
      // Means and squares of single channels are joined into the group's (Chan, Golub and LeVeque 1979).
      double mean = 0, squares = 0, means[2] = {};
      for (int64_t c = g * share; c < (g + 1) * share; ++c) {
        double s = 0, q = 0;
        for (int64_t k = 0; k < chunks; ++k) {
          const float* sums = partial + (b * chunks + k) * 2 * channels;
          s += sums[c];
          q += sums[channels + c];
        }
        const double pivot = load1(x + b * cells * channels + c) + (shift ? shift[b * channels + c] : 0.0f);
        const double here = pivot + s / cells;
        squares += q - s * s / cells;
        means[0] += here;
        means[1] += here * here;
      }
      mean = means[0] / share;
      const double between = means[1] / share - mean * mean;
      const double variance = squares / (cells * share) + (between > 0 ? between : 0);
      const double inverse = 1 / std::sqrt(variance + eps);
      for (int64_t c = g * share; c < (g + 1) * share; ++c) {
        const double factor = inverse * weight[b * affine_stride + c];
        const double moved = (shift ? shift[b * channels + c] : 0.0f) - mean;
        affine[b * 2 * channels + c] = factor;
        affine[b * 2 * channels + channels + c] = bias[b * affine_stride + c] + factor * moved;
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * chunks; ++task) {
      const int64_t b = task / chunks, first = task % chunks * CHUNK_ROWS;
      const int64_t last = first + CHUNK_ROWS < cells ? first + CHUNK_ROWS : cells;
      const float *factor = affine + b * 2 * channels, *offset = factor + channels;
      for (int64_t i = first; i < last; ++i) {
        const T* row = x + (b * cells + i) * channels;
        T* to = out + (b * cells + i) * channels;
        for (int64_t c = 0; c < channels; c += L) {
          vf y = load(row + c) * load(factor + c) + load(offset + c);
          store(to + c, with_silu ? silu(y) : y);
        }
      }
    }
  }
}

// --- the gate of GEGLU --------------------------------------------------------------------------

// out (rows, width) = first half of (x + bias) times gelu of its second half; x is (rows, 2 width).
template <class T>
void geglu(int64_t rows, int64_t width, const T* x, const float* bias, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T *value = x + i * 2 * width, *gate = value + width;
    T* to = out + i * width;
    for (int64_t c = 0; c < width; c += L)
      store(to + c, (load(value + c) + load(bias + c)) * gelu(load(gate + c) + load(bias + width + c)));
  }
}

bool allow_tiles() {
#if defined(LDM_AMX)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM of the tiles' data
#else
  return true;
#endif
}

}  // namespace

// dtype is 0 for float and 1 for bfloat16. Strides and sizes are counted in elements.
extern "C" {

// 0: cannot run here; 1: products of bfloat16 by the plain path; 2: by AVX512-BF16; 3: by AMX.
int ldm_level() {
  if (!allow_tiles()) return 0;
#if defined(LDM_AMX)
  return 3;
#elif defined(__AVX512BF16__)
  return 2;
#else
  return 1;
#endif
}

int64_t ldm_attention_bytes(int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t features,
                            int threads) {
  if (dtype) return attention_bytes<bf16>({batch, heads, queries, keys, features}, threads);
  return attention_bytes<float>({batch, heads, queries, keys, features}, threads);
}

void ldm_attention(int dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t features,
                   const void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                   void* out, int64_t out_stride, float scale, void* workspace, int threads) {
  if (dtype)
    attention<bf16>({batch, heads, queries, keys, features}, (const bf16*)q, q_stride, (const bf16*)k, k_stride,
                    (const bf16*)v, v_stride, (bf16*)out, out_stride, scale, (char*)workspace, threads);
  else
    attention<float>({batch, heads, queries, keys, features}, (const float*)q, q_stride, (const float*)k, k_stride,
                     (const float*)v, v_stride, (float*)out, out_stride, scale, (char*)workspace, threads);
}

int64_t ldm_norm_bytes(int64_t batch, int64_t cells, int64_t channels) {
  return norm_floats(batch, cells, channels) * 4;
}

void ldm_group_norm(int dtype, int64_t batch, int64_t cells, int64_t channels, int64_t groups, const void* x,
                    const float* shift, const float* weight, const float* bias, int64_t affine_stride, float eps,
                    int with_silu, void* out, void* workspace, int threads) {
  if (dtype)
    group_norm<bf16>(batch, cells, channels, groups, (const bf16*)x, shift, weight, bias, affine_stride, eps, with_silu,
                     (bf16*)out, (float*)workspace, threads);
  else
    group_norm<float>(batch, cells, channels, groups, (const float*)x, shift, weight, bias, affine_stride, eps,
                      with_silu, (float*)out, (float*)workspace, threads);
}

void ldm_geglu(int dtype, int64_t rows, int64_t width, const void* x, const float* bias, void* out, int threads) {
  if (dtype)
    geglu<bf16>(rows, width, (const bf16*)x, bias, (bf16*)out, threads);
  else
    geglu<float>(rows, width, (const float*)x, bias, (float*)out, threads);
}
}
