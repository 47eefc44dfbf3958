// Attention; bfloat16 products by AMX tiles where the processor has them, else by AVX512-BF16.

#include "common.h"

namespace {

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

// Broadcast a 32-bit word, one float or two of bfloat16, to a whole vector.
inline vf broadcast(const void* word) {
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
      const vf row = broadcast(a + r * lda + p);
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

// Load up to 16 32-bit words, zero-padded.
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

// Store the first n of 16 numbers.
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

// Transpose 16 x 16 words: row i is interleaved with row i + 8, four times.
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
// The products are K Q^T and V^T W, keys as rows and queries as columns, so that what is done for each query (maximum,
// sum, scaling) is done for 16 of them in one vector.

constexpr int64_t CHUNK = 64;  // keys at a time: their scores and operands fit the L1 cache
constexpr int64_t MAX_FEATURES = 512;
constexpr int64_t MAX_GROUPS = 4, L2_BYTES = 1 << 20;
constexpr float SLACK = 2;  // powers of two by which a score may exceed the running maximum before sums are rescaled

template <class T>
inline void clear(T* p, int64_t n) {
  std::memset(p, 0, n * sizeof(T));
}

// exp2v takes finite numbers only, so rows with others, whose exponent bits are all ones, are found beforehand.
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
  bool causal = false;  // query i sees keys 0 to i
#if defined(LDM_AMX)
  static constexpr int64_t step = Group<T>::size == 2 ? 2 * L : 1;
#else
  static constexpr int64_t step = Group<T>::size;
#endif
  static constexpr int64_t blocks = Group<T>::size == 2 ? 2 : 3;  // vectors of queries at a time
  static constexpr int64_t rows = blocks * L;
  int64_t depth() const { return up(features, step); }  // reduction length of the first product
  int64_t width() const { return up(features, L); }     // rows of the second product
  int64_t padded_keys() const { return up(keys, 2 * L); }
  int64_t key_size() const { return padded_keys() * depth(); }
  int64_t value_size() const { return up(keys, CHUNK) * width(); }
  // Groups of queries that share each load of the keys: more than one where the keys do not fit the L2 cache.
  int64_t groups() const { return (key_size() + value_size()) * (int64_t)sizeof(T) > L2_BYTES ? MAX_GROUPS : 1; }
};

// Pack keys as rows of the first product, zero-padded. False if not all are finite.
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

// 32-bit words of the value of key m, from feature d on; for bfloat16 each word pairs keys m and m + 1.
inline vu value_words(const float* v, int64_t stride, int64_t m, int64_t keys, int64_t left) {
  return m < keys ? load_words(v + m * stride, left * 4) : vu{};
}
inline vu value_words(const bf16* v, int64_t stride, int64_t m, int64_t keys, int64_t left) {
  vh pair[2] = {};
  for (int i = 0; i < 2; ++i)
    if (m + i < keys) std::memcpy(&pair[i], v + (m + i) * stride, left < L ? left * 2 : 32);
  return __builtin_convertvector(pair[0], vu) | __builtin_convertvector(pair[1], vu) << 16;
}

// Pack values as rows of the second product, features by keys: [chunk][width][CHUNK].
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

// Pack queries as columns of the first product: [block][depth / G][16][G].
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

// Store the weights of two keys for 16 queries, as columns of the second product.
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

// Take the keys after each query out of a block's scores [key][16 queries], which begin at key m0 and a query.
inline void hide_later_keys(float* column, int64_t m0, int64_t keys, int64_t query) {
  const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf lowest = splat(-std::numeric_limits<float>::infinity());
  for (int64_t m = std::max<int64_t>(0, query - m0); m < keys; ++m)
    store(column + m * L, lanes < (int32_t)(m0 + m - query) ? lowest : load(column + m * L));
}

// Flash attention (arXiv:2205.14135) of a few groups of query blocks, with a running maximum and sum for each query;
// the maximum is updated only where exp would overflow otherwise. All groups use a chunk of keys while it is cached.
template <class T, int GROUPS>
void attend_groups(const Shape<T>& s, int64_t first_query, const T* q, int64_t q_stride, int64_t count, const T* keys,
                   bool fine, const T* values, T* out, int64_t out_stride, float scale, float* scratch) {
  constexpr int64_t SCORES = CHUNK * L, MOST = Shape<T>::blocks, ROWS = Shape<T>::rows;
  const int64_t depth = s.depth(), width = s.width(), groups = GROUPS == 1 ? 1 : (count + ROWS - 1) / ROWS;
  float* scores = scratch;                // [block][CHUNK][16]; the weights overwrite them, in T
  float* other = scores + MOST * SCORES;  // the same of the next chunk or group
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
  const auto score = [&](int64_t g, int64_t m, int64_t rows, float* to) {  // scores of some keys (rows of `to`) and a group of queries
    product<T>(keys + m * depth, depth, all_left + g * ROWS * depth, depth * L, rows, blocks_of(g), depth, to, SCORES,
               false);
  };
  score(0, 0, up(s.keys < CHUNK ? s.keys : CHUNK, 2 * L), scores);
  for (int64_t turn = 0, chunks = (s.keys + CHUNK - 1) / CHUNK; turn < chunks * groups; ++turn) {
    const int64_t m0 = turn / groups * CHUNK, group = turn % groups, blocks = blocks_of(group);
    const int64_t here = s.keys - m0 < CHUNK ? s.keys - m0 : CHUNK, padded = up(here, 2 * L);
    const int64_t next = (turn + 1) / groups * CHUNK, next_group = (turn + 1) % groups;
    const int64_t after = s.padded_keys() - next;  // keys from the next turn on
    float* sums = all_sums + group * ROWS * width;
    vf top[MOST], total[MOST];  // copies, so that they stay in registers
    for (int64_t j = 0; j < MOST; ++j) top[j] = tops[group][j], total[j] = totals[group][j];
    for (int64_t j = 0; j < blocks; ++j) {
      float* column = scores + j * SCORES;
      if (s.causal) hide_later_keys(column, m0, here, first_query + group * ROWS + j * L);
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
      if (part < after) score(next_group, next + part, L, other + part * L);  // tiles compute while the vector units do what follows
      for (int64_t j = 0; j < blocks; ++j) {
        float* column = scores + j * SCORES + part * L;
        T* weights = reinterpret_cast<T*>(scores + j * SCORES) + part * L;
        if (part >= here) {  // padding to the step of the second product
          clear(weights, L * L);
          continue;
        }
        vf base = top[j], sum[2] = {};
        for (int64_t m = 0; m < L; m += 2) {  // almost zero beyond the last key, where values are zero
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

// q, k, v and out are (batch, tokens, heads, features), contiguous in heads and features.
template <class T>
void attention(const Shape<T>& s, const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride,
               T* out, int64_t out_stride, float scale, char* workspace, int threads) {
  const int64_t pairs = s.batch * s.heads, rows = s.groups() * s.rows, tasks = (s.queries + rows - 1) / rows;
  float* scratch = reinterpret_cast<float*>(workspace);
  T* packed = reinterpret_cast<T*>(scratch + threads * scratch_floats<T>(s));
  char* fine = reinterpret_cast<char*>(packed + pairs * (s.key_size() + s.value_size()));  // (pairs,)
  const auto attend = s.groups() == 1 ? attend_groups<T, 1> : attend_groups<T, MAX_GROUPS>;
#pragma omp parallel num_threads(useful(pairs * s.queries * s.keys * s.features, 1 << 18, threads))
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
      attend(s, first, q + (b * s.queries + first) * q_stride + h * s.features, q_stride, count, keys, fine[i],
             keys + s.key_size(), out + (b * s.queries + first) * out_stride + h * s.features, out_stride, scale,
             scratch + omp_get_thread_num() * scratch_floats<T>(s));
    }
#if defined(LDM_AMX)
    _tile_release();
#endif
  }
}

bool allow_tiles() {
#if defined(LDM_AMX)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM of XTILEDATA
#else
  return true;
#endif
}

}  // namespace

extern "C" {

// 0: AMX is not permitted; bfloat16 products 1: by plain vectors, 2: by AVX512-BF16, 3: by AMX.
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
                   void* out, int64_t out_stride, float scale, int causal, void* workspace, int threads) {
  if (dtype)
    attention<bf16>({batch, heads, queries, keys, features, causal != 0}, (const bf16*)q, q_stride, (const bf16*)k, k_stride,
                    (const bf16*)v, v_stride, (bf16*)out, out_stride, scale, (char*)workspace, threads);
  else
    attention<float>({batch, heads, queries, keys, features, causal != 0}, (const float*)q, q_stride, (const float*)k, k_stride,
                     (const float*)v, v_stride, (float*)out, out_stride, scale, (char*)workspace, threads);
}
}
