// Products of few rows with weights that are laid out beforehand, and convolutions of small maps by them: the time of a
// small model's step, and of a text encoder, lies here. A general library spends longer on finding its kernel than on these.
//
// A product is out (rows, outs) = act(x (rows, k) W^T + bias) + add. Weights are packed in blocks of 16 outs, for bfloat16
// as [block][k / 2][16][2], pairs of the reduction's steps lying together; for float in groups of up to 4 blocks, as
// [group][k][block][16]. k is a multiple of 32 for bfloat16, which goes through AMX tiles and is not built without them.

#include "common.h"

namespace {

enum Act { NONE = 0, QUICK_GELU = 1, GELU = 2 };

template <class T>
struct Product {
  int64_t rows, k, outs;
  const T *x;  // rows x_stride apart
  int64_t x_stride;
  const T *weights, *bias, *add;  // bias (outs,) and add (rows, outs) or none
  int64_t add_stride;
  int act;
  T* out;
  int64_t out_stride;

  const T* panel(int64_t block) const { return weights + block * k * L; }

  // A vector of results: 16 outs of a row.
  inline void finish(vf y, int64_t row, int64_t column) const {
    if (bias) y += load(bias + column);
    if (act == QUICK_GELU) y *= reciprocal<T>(1.0f + expv<T>(y * -1.702f));
    if (act == GELU) y = gelu<T>(y);
    if (add) y += load(add + row * add_stride + column);
    store(out + row * out_stride + column, y);
  }
};

// Weights come from memory, once for all rows: while some are used, the next ones, which lie behind them, are fetched.
inline void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// --- float: R rows and J blocks at a time, their sums in registers ---------------------------------

constexpr int64_t NEAR = 128;  // steps of the reduction whose weights for 4 blocks stay in the first cache

// Steps first .. last - 1 of the reduction; what is not done yet lies in out.
template <int R, int J>
inline void rows_by_blocks(const Product<float>& p, int64_t row, int64_t block, int64_t first, int64_t last) {
  vf sums[R][J] = {};
  float* out = p.out + row * p.out_stride + block * L;
  if (first)
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < J; ++j) sums[r][j] = load(out + r * p.out_stride + j * L);
  const float *x = p.x + row * p.x_stride, *w = p.panel(block);
  for (int64_t i = first; i < last; ++i) {
    vf columns[J];
    for (int j = 0; j < J; ++j) columns[j] = load(w + (i * J + j) * L);
    for (int r = 0; r < R; ++r) {
      const vf value = splat(x[r * p.x_stride + i]);
      for (int j = 0; j < J; ++j) sums[r][j] += value * columns[j];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < J; ++j) {
      if (last == p.k)
        p.finish(sums[r][j], row + r, (block + j) * L);
      else
        store(out + r * p.out_stride + j * L, sums[r][j]);
    }
}

template <int J>
void multiply(const Product<float>& p, int64_t begin, int64_t end, int64_t block) {
  constexpr int R = 6;
  for (int64_t first = 0; first < p.k; first += NEAR) {
    const int64_t last = std::min(first + NEAR, p.k);
    int64_t row = begin;
    const char* next = (const char*)(p.panel(block) + last * J * L);
    const int64_t part = up(NEAR * J * L * 4 * R / (end - begin), 64);
    for (; row + R <= end; row += R, next += part) {
      fetch(next, part);
      rows_by_blocks<R, J>(p, row, block, first, last);
    }
    switch (end - row) {
      case 5: rows_by_blocks<5, J>(p, row, block, first, last); break;
      case 4: rows_by_blocks<4, J>(p, row, block, first, last); break;
      case 3: rows_by_blocks<3, J>(p, row, block, first, last); break;
      case 2: rows_by_blocks<2, J>(p, row, block, first, last); break;
      case 1: rows_by_blocks<1, J>(p, row, block, first, last); break;
    }
  }
}

template <class T>
struct Shares {
  static constexpr int64_t blocks = 4, rows = 192;  // of one portion of the work
};
template <>
struct Shares<bf16> {
  static constexpr int64_t blocks = 2, rows = 1 << 30;
};

inline void portion(const Product<float>& p, int64_t first, int64_t last, int64_t block, int64_t blocks, const float*) {
  switch (blocks) {
    case 4: return multiply<4>(p, first, last, block);
    case 3: return multiply<3>(p, first, last, block);
    case 2: return multiply<2>(p, first, last, block);
    case 1: return multiply<1>(p, first, last, block);
  }
}

// --- bfloat16: tiles -----------------------------------------------------------------------------------

#if defined(LDM_AMX)
struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void configure() {
  TileShape shape;
  for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
}

// Rows of up to two tiles by one or two blocks. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
template <int R, int J>
inline void tiles(const Product<bf16>& p, const bf16* const* x, const int64_t* stride, const int64_t* row,
                  const int64_t* count, int64_t block, const char* next, int64_t part) {
  const bf16 *w0 = p.panel(block), *w1 = p.panel(block + J - 1);
  _tile_zero(0);
  if (J == 2) _tile_zero(1);
  if (R == 2) _tile_zero(2);
  if (R == 2 && J == 2) _tile_zero(3);
  for (int64_t i = 0; i < p.k; i += 2 * L, next += part) {
    fetch(next, part);
    _tile_loadd(6, w0 + i * L, 64);
    _tile_loadd(4, x[0] + i, stride[0] * 2);
    _tile_dpbf16ps(0, 4, 6);
    if (J == 2) {
      _tile_loadd(7, w1 + i * L, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, x[1] + i, stride[1] * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (J == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][L * L];
  _tile_stored(0, sums[0], 64);
  if (J == 2) _tile_stored(1, sums[1], 64);
  if (R == 2) _tile_stored(2, sums[2], 64);
  if (R == 2 && J == 2) _tile_stored(3, sums[3], 64);
  for (int r = 0; r < R; ++r)
    for (int64_t i = 0; i < count[r]; ++i)
      for (int j = 0; j < J; ++j) p.finish(load(sums[2 * r + j] + i * L), row[r] + i, (block + j) * L);
}

// rest holds the rows of the last tile that is not whole, with zeros after them.
inline void portion(const Product<bf16>& p, int64_t first, int64_t last, int64_t block, int64_t blocks, const bf16* rest) {
  const int64_t bytes = blocks * p.k * L * 2, turns = (last - first + 2 * L - 1) / (2 * L), steps = p.k / (2 * L);
  const int64_t part = up(bytes / (turns * steps), 64);
  const char* next = (const char*)p.panel(block + blocks);
  for (int64_t at = first; at < last; at += 2 * L, next += part * steps) {
    const bf16* x[2];
    int64_t stride[2], row[2], count[2];
    const int both = last - at > L ? 2 : 1;
    for (int r = 0; r < both; ++r) {
      row[r] = at + r * L;
      count[r] = std::min<int64_t>(L, last - row[r]);
      x[r] = count[r] < L ? rest : p.x + row[r] * p.x_stride;
      stride[r] = count[r] < L ? p.k : p.x_stride;
    }
    if (both == 2 && blocks == 2) tiles<2, 2>(p, x, stride, row, count, block, next, part);
    if (both == 2 && blocks == 1) tiles<2, 1>(p, x, stride, row, count, block, next, part);
    if (both == 1 && blocks == 2) tiles<1, 2>(p, x, stride, row, count, block, next, part);
    if (both == 1 && blocks == 1) tiles<1, 1>(p, x, stride, row, count, block, next, part);
  }
}
#endif

// --- both ----------------------------------------------------------------------------------------------

constexpr int64_t WORTH_A_THREAD = 1 << 18;  // multiplications

// Called by every thread of a team; x is whole by then.
template <class T>
inline void share(const Product<T>& p, const T* rest) {
  const int64_t blocks = p.outs / L, groups = (blocks + Shares<T>::blocks - 1) / Shares<T>::blocks;
  const int64_t size = std::min(p.rows, Shares<T>::rows), parts = (p.rows + size - 1) / size;
#if defined(LDM_AMX)
  if (sizeof(T) == 2) configure();
#endif
#pragma omp for schedule(static)
  for (int64_t task = 0; task < groups * parts; ++task) {
    const int64_t block = task / parts * Shares<T>::blocks, first = task % parts * size;
    portion(p, first, std::min(first + size, p.rows), block, std::min(Shares<T>::blocks, blocks - block), rest);
  }
#if defined(LDM_AMX)
  if (sizeof(T) == 2) _tile_release();
#endif
}

template <class T>
inline void keep_rest(const Product<T>& p, T* rest) {
  const int64_t left = p.rows % L;
  if (sizeof(T) == 4 || !left) return;
  for (int64_t i = 0; i < left; ++i) std::memcpy(rest + i * p.k, p.x + (p.rows - left + i) * p.x_stride, p.k * sizeof(T));
  std::memset((void*)(rest + left * p.k), 0, (L - left) * p.k * sizeof(T));
}

template <class T>
void linear(const Product<T>& p, T* rest, int threads) {
  keep_rest(p, rest);
#pragma omp parallel num_threads(useful(p.rows * p.k * p.outs, WORTH_A_THREAD, threads))
  share(p, rest);
}

// Cells of a map and their neighbours as rows of x: (batch * h' * w', taps * channels), with zeros up to k.
struct Map {
  int64_t batch, height, width, channels, kernel, stride, padding, out_height, out_width;
};

template <class T>
void convolution(Product<T> p, const Map& m, const T* x, T* space, int threads) {
  T *rest = space, *lines = space + L * p.k;
  p.x = lines;
  p.x_stride = p.k;
#pragma omp parallel num_threads(useful(p.rows * p.k * p.outs, WORTH_A_THREAD, threads))
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t b = row / (m.out_height * m.out_width), cell = row % (m.out_height * m.out_width);
      const int64_t top = cell / m.out_width * m.stride - m.padding, left = cell % m.out_width * m.stride - m.padding;
      T* to = lines + row * p.k;
      for (int64_t i = top; i < top + m.kernel; ++i)
        for (int64_t j = left; j < left + m.kernel; ++j, to += m.channels) {
          if (i < 0 || j < 0 || i >= m.height || j >= m.width)
            std::memset((void*)to, 0, m.channels * sizeof(T));
          else
            std::memcpy(to, x + ((b * m.height + i) * m.width + j) * m.channels, m.channels * sizeof(T));
        }
      std::memset((void*)to, 0, (lines + (row + 1) * p.k - to) * sizeof(T));
    }
#pragma omp single
    keep_rest(p, rest);
    share(p, rest);
  }
}

}  // namespace

extern "C" {

// Which dtypes are served: 1 for float, 2 for bfloat16, 3 for both.
int ldm_product_dtypes() {
#if defined(LDM_AMX)
  return 3;
#elif defined(__AVX512F__)
  return 1;
#else
  return 0;
#endif
}

// space: 16 k numbers.
void ldm_linear(int dtype, int64_t rows, int64_t k, int64_t outs, const void* x, int64_t x_stride, const void* weights,
                const void* bias, const void* add, int64_t add_stride, int act, void* out, int64_t out_stride, void* space,
                int threads) {
#if defined(LDM_AMX)
  if (dtype)
    return linear<bf16>({rows, k, outs, (const bf16*)x, x_stride, (const bf16*)weights, (const bf16*)bias,
                         (const bf16*)add, add_stride, act, (bf16*)out, out_stride},
                        (bf16*)space, threads);
#endif
  linear<float>({rows, k, outs, (const float*)x, x_stride, (const float*)weights, (const float*)bias, (const float*)add,
                 add_stride, act, (float*)out, out_stride},
                (float*)space, threads);
}

// x, add and out have their channels last. space: (16 + batch * out_height * out_width) * k numbers.
void ldm_convolution(int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t kernel,
                     int64_t stride, int64_t padding, int64_t out_height, int64_t out_width, int64_t k, int64_t outs,
                     const void* x, const void* weights, const void* bias, const void* add, void* out, void* space,
                     int threads) {
  const Map map = {batch, height, width, channels, kernel, stride, padding, out_height, out_width};
  const int64_t rows = batch * out_height * out_width;
#if defined(LDM_AMX)
  if (dtype)
    return convolution<bf16>({rows, k, outs, nullptr, 0, (const bf16*)weights, (const bf16*)bias, (const bf16*)add, outs,
                              NONE, (bf16*)out, outs},
                             map, (const bf16*)x, (bf16*)space, threads);
#endif
  convolution<float>({rows, k, outs, nullptr, 0, (const float*)weights, (const float*)bias, (const float*)add, outs, NONE,
                      (float*)out, outs},
                     map, (const float*)x, (float*)space, threads);
}
}
