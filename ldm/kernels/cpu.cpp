// Kernels for one CPU: attention, group norm with SiLU, and the gate of GEGLU, for float and bfloat16; what surrounds
// the products of a 3x3 convolution, for float.
//
// Built for the machine that it runs on (-march=native) and called by ldm/kernels/native.py through plain C functions.
// Vectors of 16 floats are GCC's, which any machine can hold; products of bfloat16 use AMX tiles where the processor
// has them, else AVX512-BF16. Every function takes the number of threads, and rows that torch owns.

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

// 2^x by the polynomial nearest to 2^r for r from 0 to 1: of degree 5 it is right to 1 part in 10^7, of degree 3 to 1 in
// 10^4, which bfloat16 does not see. What lies beyond -126 and 127 may stop there. Without AVX512 x has to be a number.
template <int degree = 5>
inline vf exp2v(vf x) {
#if defined(__AVX512DQ__)
  const vf r = (vf)_mm512_reduce_ps((__m512)x, 1);  // x less the whole number below it
#else
  x = vmin(splat(127.0f), vmax(splat(-126.0f), x));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, and leaves it in the last bits
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

// What follows is for results of type T: of bfloat16 more than 1 part in 10^4 is not seen.

template <class T>
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  if (sizeof(T) == 2) return (vf)_mm512_rcp14_ps((__m512)x);
#endif
  return 1.0f / x;
}

// e^x for numbers x; anything for others, so whoever calls it has to multiply by what x came from.
template <class T>
inline vf expv(vf x) {
  return exp2v<sizeof(T) == 2 ? 3 : 5>(x * 1.44269504f);
}

template <class T>
inline vf silu(vf x) {
  return x * reciprocal<T>(1.0f + expv<T>(-x));
}

// Half of x times 1 + erf(x / sqrt 2); erf by Abramowitz and Stegun 7.1.26, right to 1.5e-7.
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

// --- products -----------------------------------------------------------------------------------
//
// The right-hand operand is packed in blocks of 16 columns: [block][k / G][16][G], where G is how many steps of the
// reduction one multiplication takes: 1 for float, 2 for bfloat16. The left-hand one is plain rows, and the result has
// blocks of 16 columns, too: [block][rows][16].

template <class T>
struct Group {
  static constexpr int size = 1;
};
template <>
struct Group<bf16> {
  static constexpr int size = 2;
};

// A word of 32 bits, one float or two of bfloat16, in all places of a vector.
inline vf all_places(const void* word) {
  float bits;
  std::memcpy(&bits, word, 4);
  return splat(bits);
}

template <class T>
inline vf multiply(vf row, vf columns, vf c) {
  if (Group<T>::size == 1) return c + row * columns;
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)row, (__m512bh)columns);
#else
  const vu a = (vu)row, b = (vu)columns;
  return c + (vf)(a << 16) * (vf)(b << 16) + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

// R rows and J blocks of c = or += a (R, k) b; k is a multiple of the group.
template <class T, int R, int J>
inline void block(const T* a, int64_t lda, const T* b, int64_t b_block, int64_t k, float* c, int64_t c_block, bool add) {
  constexpr int G = Group<T>::size;
  vf acc[R][J];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) acc[r][j] = add ? load(c + r * L + j * c_block) : vf{};
  for (int64_t p = 0; p < k; p += G) {
    vf columns[J];
    for (int j = 0; j < J; ++j) columns[j] = load(reinterpret_cast<const float*>(b + j * b_block + p * L));
    for (int r = 0; r < R; ++r) {
      const vf row = all_places(a + r * lda + p);
      for (int j = 0; j < J; ++j) acc[r][j] = multiply<T>(row, columns[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) store(c + r * L + j * c_block, acc[r][j]);
}

template <class T, int J>
inline void rows_of(const T* a, int64_t lda, const T* b, int64_t b_block, int64_t rows, int64_t k, float* c,
                    int64_t c_block, bool add) {
  constexpr int R = J == 1 ? 16 : 8;
  for (int64_t i = 0; i < rows; i += R) block<T, R, J>(a + i * lda, lda, b, b_block, k, c + i * L, c_block, add);
}

// c (rows, 16 blocks) = or += a (rows, k) b (k, 16 blocks), up to three blocks; rows are a multiple of 16
template <class T>
void product(const T* a, int64_t lda, const T* b, int64_t b_block, int64_t rows, int64_t blocks, int64_t k, float* c,
             int64_t c_block, bool add) {
  if (blocks == 3)
    rows_of<T, 3>(a, lda, b, b_block, rows, k, c, c_block, add);
  else if (blocks == 2)
    rows_of<T, 2>(a, lda, b, b_block, rows, k, c, c_block, add);
  else
    rows_of<T, 1>(a, lda, b, b_block, rows, k, c, c_block, add);
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

// Up to two blocks; k is a multiple of 32. Tiles 0 to 3 are sums, 4 and 5 rows of a, 6 and 7 columns.
template <>
void product<bf16>(const bf16* a, int64_t lda, const bf16* b, int64_t b_block, int64_t rows, int64_t blocks, int64_t k,
                   float* c, int64_t c_block, bool add) {
  const int64_t as = lda * 2;
  const bf16* b1 = b + b_block;
  int64_t i = 0;
  if (blocks == 2) {
    for (; i + 32 <= rows; i += 32) {
      const bf16 *a0 = a + i * lda, *a1 = a0 + 16 * lda;
      float *c0 = c + i * L, *c1 = c0 + 16 * L;
      if (add) {
        _tile_loadd(0, c0, 64); _tile_loadd(1, c0 + c_block, 64);
        _tile_loadd(2, c1, 64); _tile_loadd(3, c1 + c_block, 64);
      } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      }
      for (int64_t p = 0; p < k; p += 32) {
        _tile_loadd(6, b + p * L, 64); _tile_loadd(4, a0 + p, as);
        _tile_loadd(7, b1 + p * L, 64); _tile_loadd(5, a1 + p, as);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c0, 64); _tile_stored(1, c0 + c_block, 64);
      _tile_stored(2, c1, 64); _tile_stored(3, c1 + c_block, 64);
    }
    for (; i < rows; i += 16) {
      const bf16* a0 = a + i * lda;
      float* c0 = c + i * L;
      if (add) {
        _tile_loadd(0, c0, 64); _tile_loadd(1, c0 + c_block, 64);
      } else {
        _tile_zero(0); _tile_zero(1);
      }
      for (int64_t p = 0; p < k; p += 32) {
        _tile_loadd(4, a0 + p, as); _tile_loadd(6, b + p * L, 64); _tile_loadd(7, b1 + p * L, 64);
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
      }
      _tile_stored(0, c0, 64); _tile_stored(1, c0 + c_block, 64);
    }
    return;
  }
  for (; i < rows; i += 16) {
    const bf16* a0 = a + i * lda;
    float* c0 = c + i * L;
    if (add) {
      _tile_loadd(0, c0, 64);
    } else {
      _tile_zero(0);
    }
    for (int64_t p = 0; p < k; p += 32) {
      _tile_loadd(4, a0 + p, as); _tile_loadd(6, b + p * L, 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, c0, 64);
  }
}

#endif

// Up to 16 words of 32 bits, and zeros after them.
inline vu load_words(const void* p, int64_t bytes) {
  vu v = {};
  if (bytes >= 64) {
    std::memcpy(&v, p, 64);
  } else {
#if defined(__AVX512BW__)
    return (vu)_mm512_maskz_loadu_epi8(((__mmask64)1 << bytes) - 1, p);
#endif
    char buffer[64] = {};
    std::memcpy(buffer, p, bytes);
    std::memcpy(&v, buffer, 64);
  }
  return v;
}

// The first n of 16 numbers.
inline void store_some(float* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}
inline void store_some(bf16* p, vf v, int64_t n) {
  bf16 line[L];
  store(line, v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), _mm256_loadu_si256((const __m256i*)line));
#else
  std::memcpy(p, line, n * sizeof(bf16));
#endif
}

// Turn 16 rows of 16 words into columns: interleaving row i with row i + 8, four times.
inline void transpose(vu* rows) {
  vu other[16];
  for (int round = 0; round < 4; ++round) {
    vu *from = round % 2 ? other : rows, *to = round % 2 ? rows : other;
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] =
          __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
}

// --- attention ----------------------------------------------------------------------------------
//
// All of it is turned round, keys as rows and queries as columns, so that what is done for each query (maximum, sum,
// scaling) is done for 16 of them in one vector.

constexpr int64_t CHUNK = 64;  // keys at a time: their scores, and what makes them, stay in the first cache
constexpr int64_t MOST_FEATURES = 512;
constexpr int64_t MOST_GROUPS = 4, NEAR = 1 << 20;
constexpr float SLACK = 2;  // powers of two by which a score may exceed what was the maximum before sums are scaled anew

template <class T>
inline void clear(T* p, int64_t n) {
  std::memset(p, 0, n * sizeof(T));
}

// exp2v takes numbers alone, so rows that hold others, whose exponents are all ones, are found beforehand.
inline bool finite(const bf16* p, int64_t n) {
  uint16_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max<uint16_t>(most, p[i].bits & 0x7f80);
  return most != 0x7f80;
}
inline bool finite(const float* p, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p + i, 4);
    most = std::max<uint32_t>(most, bits & 0x7f800000);
  }
  return most != 0x7f800000;
}

template <class T>
struct Shape {
  int64_t batch, heads, queries, keys, features;
#if defined(LDM_AMX)
  static constexpr int64_t step = Group<T>::size == 2 ? 2 * L : 1;
#else
  static constexpr int64_t step = Group<T>::size;
#endif
  static constexpr int64_t blocks = Group<T>::size == 2 ? 2 : 3;  // vectors of queries at a time
  static constexpr int64_t rows = blocks * L;
  int64_t depth() const { return up(features, step); }  // of the first product's reduction
  int64_t width() const { return up(features, L); }     // of the second one's rows
  int64_t padded_keys() const { return up(keys, 2 * L); }
  int64_t key_size() const { return padded_keys() * depth(); }
  int64_t value_size() const { return up(keys, CHUNK) * width(); }
  // Groups of queries that share a look at the keys: more than one where the keys do not stay in the second cache.
  int64_t groups() const { return (key_size() + value_size()) * (int64_t)sizeof(T) > NEAR ? MOST_GROUPS : 1; }
};

// Keys as rows of the first product, with zeros after them. False if not all are finite.
template <class T>
bool pack_keys(const Shape<T>& s, const T* k, int64_t stride, T* packed) {
  bool fine = true;
  const int64_t depth = s.depth();
  clear(packed, s.key_size());
  for (int64_t m = 0; m < s.keys; ++m) {
    std::memcpy(packed + m * depth, k + m * stride, s.features * sizeof(T));
    fine = fine && finite(k + m * stride, s.features);
  }
  return fine;
}

// Words of 32 bits from d on of what stands at key m, or at keys m and m + 1 where two make a word.
inline vu value_words(const float* v, int64_t stride, int64_t m, int64_t keys, int64_t left) {
  return m < keys ? load_words(v + m * stride, left * 4) : vu{};
}
inline vu value_words(const bf16* v, int64_t stride, int64_t m, int64_t keys, int64_t left) {
  vh pair[2] = {};
  for (int i = 0; i < 2; ++i)
    if (m + i < keys) std::memcpy(&pair[i], v + (m + i) * stride, left < L ? left * 2 : 32);
  return __builtin_convertvector(pair[0], vu) | __builtin_convertvector(pair[1], vu) << 16;
}

// Values as rows of the second product, features by keys: [chunk][width][CHUNK].
template <class T>
void pack_values(const Shape<T>& s, const T* v, int64_t stride, T* packed) {
  constexpr int G = Group<T>::size;
  const int64_t width = s.width();
  for (int64_t m = 0; m < up(s.keys, CHUNK); m += G * L)
    for (int64_t d = 0; d < width; d += L) {
      vu words[16];
      for (int i = 0; i < 16; ++i) words[i] = value_words(v + d, stride, m + i * G, s.keys, s.features - d);
      transpose(words);
      for (int i = 0; i < 16; ++i)
        std::memcpy(packed + m / CHUNK * CHUNK * width + (d + i) * CHUNK + m % CHUNK, &words[i], 64);
    }
}

// Queries as columns of the first product: [block][depth / G][16][G].
template <class T>
void pack_queries(const Shape<T>& s, const T* q, int64_t stride, int64_t count, T* packed) {
  const int64_t depth = s.depth(), bytes = s.features * sizeof(T);
  for (int64_t j = 0; j < up(count, L) / L; ++j)
    for (int64_t word = 0; word < depth / Group<T>::size; word += 16) {
      vu words[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t query = j * L + i, left = bytes - word * 4;
        words[i] = query < count && left > 0 ? load_words((const char*)(q + query * stride) + word * 4, left) : vu{};
      }
      transpose(words);
      for (int64_t i = 0; i < 16 && word + i < depth / Group<T>::size; ++i)
        std::memcpy((char*)(packed + j * depth * L) + (word + i) * 64, &words[i], 64);
    }
}

// Weights of two keys for 16 queries, as columns of the second product.
inline void store_pair(float* p, vf a, vf b) {
  store(p, a);
  store(p + L, b);
}
inline void store_pair(bf16* p, vf a, vf b) {
  vu words;
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  words = (vu)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
#else
  bf16 halves[2 * L];
  store(halves, a);
  store(halves + L, b);
  vh low, high;
  std::memcpy(&low, halves, 32);
  std::memcpy(&high, halves + L, 32);
  words = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16;
#endif
  std::memcpy(p, &words, 64);
}

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  int found = 0;
  for (int i = 0; i < L; ++i) found |= mask[i];
  return found;
#endif
}

// Some groups of blocks of queries: running maximum and sum for each, as flash attention keeps them (arXiv:2205.14135);
// the maximum is followed only where scores would grow out of reach otherwise. All groups meet a chunk of keys while it
// is near, one after the other.
template <class T, int GROUPS>
void attend_groups(const Shape<T>& s, const T* q, int64_t q_stride, int64_t count, const T* keys, bool fine,
                   const T* values, T* out, int64_t out_stride, float scale, float* scratch) {
  constexpr int64_t SCORES = CHUNK * L, MOST = Shape<T>::blocks, ROWS = Shape<T>::rows;
  const int64_t depth = s.depth(), width = s.width(), groups = GROUPS == 1 ? 1 : (count + ROWS - 1) / ROWS;
  float* scores = scratch;                // [block][CHUNK][16]; the weights overwrite them, in T
  float* other = scores + MOST * SCORES;  // the same of what comes next
  float* all_sums = other + MOST * SCORES;                            // [group][block][width][16]
  T* all_left = reinterpret_cast<T*>(all_sums + groups * ROWS * width);  // [group][block][depth / G][16][G]
  vf tops[GROUPS][MOST], totals[GROUPS][MOST];
  const auto blocks_of = [&](int64_t g) { return g + 1 < groups ? MOST : up(count - g * ROWS, L) / L; };
  const float factor = scale * 1.44269504f;
  constexpr int degree = sizeof(T) == 2 ? 3 : 5;
  const vf lowest = splat(-std::numeric_limits<float>::infinity());
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t rows = count - g * ROWS < ROWS ? count - g * ROWS : ROWS;
    pack_queries(s, q + g * ROWS * q_stride, q_stride, rows, all_left + g * ROWS * depth);
    for (int64_t j = 0; j < MOST; ++j) tops[g][j] = lowest, totals[g][j] = vf{};
  }
  const auto score = [&](int64_t g, int64_t m, int64_t rows, float* to) {  // some keys, in rows of to, and a group
    product<T>(keys + m * depth, depth, all_left + g * ROWS * depth, depth * L, rows, blocks_of(g), depth, to, SCORES,
               false);
  };
  score(0, 0, up(s.keys < CHUNK ? s.keys : CHUNK, 2 * L), scores);
  for (int64_t turn = 0, chunks = (s.keys + CHUNK - 1) / CHUNK; turn < chunks * groups; ++turn) {
    const int64_t m0 = turn / groups * CHUNK, group = turn % groups, blocks = blocks_of(group);
    const int64_t here = s.keys - m0 < CHUNK ? s.keys - m0 : CHUNK, padded = up(here, 2 * L);
    const int64_t next = (turn + 1) / groups * CHUNK, next_group = (turn + 1) % groups;
    const int64_t after = s.padded_keys() - next;  // keys from the next turn's on
    float* sums = all_sums + group * ROWS * width;
    vf top[MOST], total[MOST];  // copies, so that they stay in registers
    for (int64_t j = 0; j < MOST; ++j) top[j] = tops[group][j], total[j] = totals[group][j];
    for (int64_t j = 0; j < blocks; ++j) {
      float* column = scores + j * SCORES;
      for (int64_t m = here; m < padded; ++m) store(column + m * L, lowest);
      vf most[4] = {lowest, lowest, lowest, lowest};
      for (int64_t m = 0; m < padded; m += 4)
        for (int i = 0; i < 4; ++i) most[i] = vmax(most[i], load(column + (m + i) * L));
      const vf now = vmax(vmax(most[0], most[1]), vmax(most[2], most[3])) * factor;
      if (any((vi)(now > top[j] + SLACK))) {
        const vf higher = vmax(top[j], now), shrink = exp2v(top[j] - higher);
        top[j] = higher;
        total[j] *= shrink;
        float* rows = sums + j * width * L;
        if (m0)
          for (int64_t d = 0; d < width; ++d) store(rows + d * L, load(rows + d * L) * shrink);
      }
    }
    for (int64_t part = 0; part < padded; part += L) {
      if (part < after) score(next_group, next + part, L, other + part * L);  // tiles work while vectors do what follows
      for (int64_t j = 0; j < blocks; ++j) {
        float* column = scores + j * SCORES + part * L;
        T* weights = reinterpret_cast<T*>(scores + j * SCORES) + part * L;
        if (part >= here) {  // rows for the second product's step alone
          clear(weights, L * L);
          continue;
        }
        vf base = top[j], sum[2] = {};
        for (int64_t m = 0; m < L; m += 2) {  // next to nothing where there is no key, whose value is zero
          vf a = exp2v<degree>(load(column + m * L) * factor - base);
          vf b = exp2v<degree>(load(column + m * L + L) * factor - base);
          sum[0] += a;
          sum[1] += b;
          store_pair(weights + m * L, a, b);
        }
        total[j] += sum[0] + sum[1];
      }
    }
    product<T>(values + m0 * width, CHUNK, reinterpret_cast<T*>(scores), SCORES * 4 / sizeof(T), width, blocks, padded,
               sums, width * L, m0 > 0);
    for (int64_t j = 0; j < MOST; ++j) tops[group][j] = top[j], totals[group][j] = total[j];
    std::swap(scores, other);
  }
  for (int64_t first = 0; first < count; first += L) {
    const int64_t rows = count - first < L ? count - first : L, block = first / L;
    const vf total = totals[block / MOST][block % MOST];
    float inverse[L] = {};
    for (int64_t i = 0; i < rows; ++i)
      inverse[i] = fine && finite(q + (first + i) * q_stride, s.features) ? 1.0f / total[i] : NAN;
    for (int64_t d = 0; d < width; d += L) {
      vu words[16];
      for (int i = 0; i < 16; ++i) words[i] = (vu)(load(all_sums + (block * width + d + i) * L) * load(inverse));
      transpose(words);
      const int64_t features = s.features - d < L ? s.features - d : L;
      for (int64_t i = 0; i < rows; ++i) {
        store_some(out + (first + i) * out_stride + d, (vf)words[i], features);
      }
    }
  }
}

template <class T>
int64_t scratch_floats(const Shape<T>& s) {
  const int64_t queries = s.groups() * s.rows;
  return up(2 * s.rows * CHUNK + queries * s.width() + queries * s.depth() * (int64_t)sizeof(T) / 4, 64);
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
  const int64_t pairs = s.batch * s.heads, rows = s.groups() * s.rows, tasks = (s.queries + rows - 1) / rows;
  float* scratch = reinterpret_cast<float*>(workspace);
  T* packed = reinterpret_cast<T*>(scratch + threads * scratch_floats<T>(s));
  char* fine = reinterpret_cast<char*>(packed + pairs * (s.key_size() + s.value_size()));  // (pairs,): of the keys
  const auto attend = s.groups() == 1 ? attend_groups<T, 1> : attend_groups<T, MOST_GROUPS>;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t b = i / s.heads, h = i % s.heads;
      T* keys = packed + i * (s.key_size() + s.value_size());
      fine[i] = pack_keys(s, k + b * s.keys * k_stride + h * s.features, k_stride, keys);
      pack_values(s, v + b * s.keys * v_stride + h * s.features, v_stride, keys + s.key_size());
    }
#if defined(LDM_AMX)
    configure_tiles();
#endif
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * tasks; ++task) {
      const int64_t i = task / tasks, b = i / s.heads, h = i % s.heads, first = task % tasks * rows;
      const int64_t count = s.queries - first < rows ? s.queries - first : rows;
      const T* keys = packed + i * (s.key_size() + s.value_size());
      attend(s, q + (b * s.queries + first) * q_stride + h * s.features, q_stride, count, keys, fine[i],
             keys + s.key_size(), out + (b * s.queries + first) * out_stride + h * s.features, out_stride, scale,
             scratch + omp_get_thread_num() * scratch_floats<T>(s));
    }
#if defined(LDM_AMX)
    _tile_release();
#endif
  }
}

// --- group norm with SiLU -----------------------------------------------------------------------

// Cells whose sums are kept in float before they enter a sum in double: few, for digits, but no more than so many portions
// of them, for those are read once more, channel by channel.
constexpr int64_t FEWEST_CELLS = 64, MOST_CHUNKS = 256;
constexpr int64_t AHEAD = 16;  // cells between the one that is worked on and the one that is fetched

inline int64_t chunk_cells(int64_t cells) {
  const int64_t share = (cells + MOST_CHUNKS - 1) / MOST_CHUNKS;
  return share < FEWEST_CELLS ? FEWEST_CELLS : share;
}

inline int64_t norm_chunks(int64_t cells) { return (cells + chunk_cells(cells) - 1) / chunk_cells(cells); }

inline int64_t norm_floats(int64_t batch, int64_t cells, int64_t channels) {
  return batch * channels * (2 * norm_chunks(cells) + 2);
}

// Fetch a row of cells that is wanted soon: the processor's own guesses end at each page, and at rows that are not whole.
template <class T>
inline void fetch(const T* row, int64_t channels) {
  for (int64_t c = 0; c < channels; c += (int64_t)(64 / sizeof(T))) __builtin_prefetch(row + c);
}

// Sums and squares of `vectors` vectors of channels over cells start .. end - 1, of their distance from the first cell;
// added to what is there already, unless these are the first.
template <int vectors, class T>
inline void add_up(const T* origin, int64_t start, int64_t end, int64_t channels, bool is_first, float* sum,
                   float* square) {
  vf s[vectors] = {}, q[vectors] = {}, pivot[vectors];
  for (int v = 0; v < vectors; ++v) pivot[v] = load(origin + v * L);
  for (int64_t i = start; i < end; ++i) {
    const T* row = origin + i * channels;
    fetch(row + AHEAD * channels, vectors * L);
    for (int v = 0; v < vectors; ++v) {
      const vf d = load(row + v * L) - pivot[v];
      s[v] += d;
      q[v] += d * d;
    }
  }
  for (int v = 0; v < vectors; ++v) {
    store(sum + v * L, is_first ? s[v] : s[v] + load(sum + v * L));
    store(square + v * L, is_first ? q[v] : q[v] + load(square + v * L));
  }
}

// x and out are (batch, cells, channels) and may be one. What is normalised is x + shift, shift (batch, channels) or
// none; weight and bias are (channels,), or (batch, channels) where affine_stride is channels instead of 0. Sums are of
// the distance from the first cell's value, so that a mean far from zero costs no digits.
template <class T>
void group_norm(int64_t batch, int64_t cells, int64_t channels, int64_t groups, const T* x, const float* shift,
                const float* weight, const float* bias, int64_t affine_stride, float eps, bool with_silu, T* out,
                float* workspace, int threads) {
  const int64_t chunks = norm_chunks(cells), size = chunk_cells(cells), share = channels / groups;
  float* partial = workspace;                            // (batch, chunks, 2, channels)
  float* affine = partial + batch * chunks * 2 * channels;  // (batch, 2, channels): factor and offset of each channel
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * chunks; ++task) {
      const int64_t b = task / chunks, first = task % chunks * size;
      const int64_t last = first + size < cells ? first + size : cells;
      const T* origin = x + b * cells * channels;
      float *sum = partial + task * 2 * channels, *square = sum + channels;
      for (int64_t start = first; start < last; start += FEWEST_CELLS) {  // that many rows stay in the first cache
        const int64_t end = start + FEWEST_CELLS < last ? start + FEWEST_CELLS : last;
        int64_t c = 0;
        for (; c + 8 * L <= channels; c += 8 * L)
          add_up<8>(origin + c, start, end, channels, start == first, sum + c, square + c);
        for (; c < channels; c += L) add_up<1>(origin + c, start, end, channels, start == first, sum + c, square + c);
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
      const int64_t b = task / chunks, first = task % chunks * size;
      const int64_t last = first + size < cells ? first + size : cells;
      const float *factor = affine + b * 2 * channels, *offset = factor + channels;
      for (int64_t i = first; i < last; ++i) {
        const T* row = x + (b * cells + i) * channels;
        T* to = out + (b * cells + i) * channels;
        fetch(row + AHEAD * channels, channels);
        for (int64_t c = 0; c < channels; c += L) {
          vf y = load(row + c) * load(factor + c) + load(offset + c);
          store(to + c, with_silu ? silu<T>(y) : y);
        }
      }
    }
  }
}

// --- doubling -----------------------------------------------------------------------------------

// Spread the four phases of doubled maps: y (batch, height + 1, width + 1, 4 channels) into out (batch, 2 height, 2 width,
// channels). Phase 2 i + j holds the cells of odd (1) or even (0) rows i and columns j.
template <class T>
void spread(int64_t batch, int64_t height, int64_t width, int64_t channels, const T* y, T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < batch * 2 * height; ++row) {
    const int64_t b = row / (2 * height), r = row % (2 * height), i = r % 2;
    const T* from = y + (b * (height + 1) + r / 2 + i) * (width + 1) * 4 * channels + 2 * i * channels;
    T* to = out + row * 2 * width * channels;
    for (int64_t column = 0; column < 2 * width; ++column) {
      const int64_t j = column % 2;
      std::memcpy(to + column * channels, from + ((column / 2 + j) * 4 + j) * channels, channels * sizeof(T));
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
      store(to + c, (load(value + c) + load(bias + c)) * gelu<T>(load(gate + c) + load(bias + width + c)));
  }
}

// --- 3x3 convolutions by Winograd's minimal filtering --------------------------------------------
//
// F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308): a tile of 2x2 results takes 16 products of channels instead of 36.
// The products are matrix products, one for each of 16 places, which the caller has done between these two functions.
// Tiles are counted through rows of tiles of the whole batch: row r is row r % tile_rows of picture r / tile_rows.

struct Map {
  int64_t height, width;
  int64_t tile_rows() const { return (height + 1) / 2; }
  int64_t tile_columns() const { return (width + 1) / 2; }
};

// x is (batch, height, width, channels); out is (16, rows * tile_columns, channels): B^T d B of each patch of 4x4.
void winograd_input(Map map, int64_t channels, int64_t first, int64_t rows, const float* x, float* out, int threads) {
  const int64_t across = map.tile_columns(), tiles = rows * across, plane = tiles * channels;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = first + tile / across, top = row % map.tile_rows() * 2 - 1, left = tile % across * 2 - 1;
    const float* picture = x + row / map.tile_rows() * map.height * map.width * channels;
    for (int64_t c = 0; c < channels; c += L) {
      vf d[4][4];
      for (int i = 0; i < 4; ++i) {
        vf p[4];
        for (int j = 0; j < 4; ++j) {
          const int64_t y = top + i, z = left + j;
          const bool inside = y >= 0 && y < map.height && z >= 0 && z < map.width;
          p[j] = inside ? load(picture + (y * map.width + z) * channels + c) : vf{};
        }
        d[i][0] = p[0] - p[2];
        d[i][1] = p[1] + p[2];
        d[i][2] = p[2] - p[1];
        d[i][3] = p[1] - p[3];
      }
      float* to = out + tile * channels + c;
      for (int j = 0; j < 4; ++j) {
        store(to + j * plane, d[0][j] - d[2][j]);
        store(to + (4 + j) * plane, d[1][j] + d[2][j]);
        store(to + (8 + j) * plane, d[2][j] - d[1][j]);
        store(to + (12 + j) * plane, d[1][j] - d[3][j]);
      }
    }
  }
}

// products are 16 matrices (rows * tile_columns, channels); y and add are (batch, height, width, channels), add or bias
// may be none: y = A^T m A + bias + add.
void winograd_output(Map map, int64_t channels, int64_t first, int64_t rows, const float* const* products,
                     const float* bias, const float* add, float* y, int threads) {
  const int64_t across = map.tile_columns(), tiles = rows * across;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = first + tile / across, top = row % map.tile_rows() * 2, left = tile % across * 2;
    const int64_t picture = row / map.tile_rows() * map.height * map.width;
    const int64_t below = top + 1 < map.height ? 2 : 1, beside = left + 1 < map.width ? 2 : 1;
    for (int64_t c = 0; c < channels; c += L) {
      vf s[2][4];
      for (int j = 0; j < 4; ++j) {
        vf m[4];
        for (int i = 0; i < 4; ++i) m[i] = load(products[4 * i + j] + tile * channels + c);
        s[0][j] = m[0] + m[1] + m[2];
        s[1][j] = m[1] - m[2] - m[3];
      }
      const vf offset = bias ? load(bias + c) : vf{};
      for (int64_t i = 0; i < below; ++i) {
        const vf two[2] = {s[i][0] + s[i][1] + s[i][2] + offset, s[i][1] - s[i][2] - s[i][3] + offset};
        for (int64_t j = 0; j < beside; ++j) {
          const int64_t at = (picture + (top + i) * map.width + left + j) * channels + c;
          store(y + at, add ? two[j] + load(add + at) : two[j]);
        }
      }
    }
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

void ldm_spread(int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, const void* y, void* out,
                int threads) {
  if (dtype)
    spread<bf16>(batch, height, width, channels, (const bf16*)y, (bf16*)out, threads);
  else
    spread<float>(batch, height, width, channels, (const float*)y, (float*)out, threads);
}

void ldm_geglu(int dtype, int64_t rows, int64_t width, const void* x, const float* bias, void* out, int threads) {
  if (dtype)
    geglu<bf16>(rows, width, (const bf16*)x, bias, (bf16*)out, threads);
  else
    geglu<float>(rows, width, (const float*)x, bias, (float*)out, threads);
}

void ldm_winograd_input(int64_t height, int64_t width, int64_t channels, int64_t first, int64_t rows, const float* x,
                        float* out, int threads) {
  winograd_input({height, width}, channels, first, rows, x, out, threads);
}

void ldm_winograd_output(int64_t height, int64_t width, int64_t channels, int64_t first, int64_t rows,
                         const float* const* products, const float* bias, const float* add, float* y, int threads) {
  winograd_output({height, width}, channels, first, rows, products, bias, add, y, threads);
}
}
