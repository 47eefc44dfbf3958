// Group norm with SiLU.

#include "common.h"

namespace {

// --- group norm with SiLU -----------------------------------------------------------------------

// Cells whose sums are accumulated in float before they enter a sum in double: few, for accuracy, but in no more chunks
// than MAX_CHUNKS, for the chunks' sums are read once more, channel by channel.
constexpr int64_t MIN_CELLS = 64, MAX_CHUNKS = 256;
constexpr int64_t AHEAD = 16;  // cells between the current one and the prefetched one

inline int64_t chunk_cells(int64_t cells) {
  const int64_t share = (cells + MAX_CHUNKS - 1) / MAX_CHUNKS;
  return share < MIN_CELLS ? MIN_CELLS : share;
}

inline int64_t norm_chunks(int64_t cells) { return (cells + chunk_cells(cells) - 1) / chunk_cells(cells); }

inline int64_t norm_floats(int64_t batch, int64_t cells, int64_t channels) {
  return batch * channels * (2 * norm_chunks(cells) + 2);
}

// Prefetch a row of cells: the hardware prefetcher stops at page ends and at partial rows.
template <class T>
inline void fetch(const T* row, int64_t channels) {
  for (int64_t c = 0; c < channels; c += (int64_t)(64 / sizeof(T))) __builtin_prefetch(row + c);
}

// Sums and squares of `vectors` vectors of channels over cells start .. end - 1, of their distance from the first cell;
// added to earlier ones, unless these are the first.
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

// x and out are (batch, cells, channels) and may be the same. What is normalised is x + shift, shift (batch, channels) or
// none; weight and bias are (channels,), or (batch, channels) where affine_stride is channels instead of 0. Sums are of
// the distance from the first cell's value, so that a mean far from zero costs no accuracy.
template <class T>
void group_norm(int64_t batch, int64_t cells, int64_t channels, int64_t groups, const T* x, const float* shift,
                const float* weight, const float* bias, int64_t affine_stride, float eps, bool with_silu, T* out,
                float* workspace, int threads) {
  const int64_t chunks = norm_chunks(cells), size = chunk_cells(cells), share = channels / groups;
  float* partial = workspace;                            // (batch, chunks, 2, channels)
  float* affine = partial + batch * chunks * 2 * channels;  // (batch, 2, channels): factor and offset of each channel
#pragma omp parallel num_threads(useful(batch * cells * channels, 1 << 15, threads))
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * chunks; ++task) {
      const int64_t b = task / chunks, first = task % chunks * size;
      const int64_t last = first + size < cells ? first + size : cells;
      const T* origin = x + b * cells * channels;
      float *sum = partial + task * 2 * channels, *square = sum + channels;
      for (int64_t start = first; start < last; start += MIN_CELLS) {  // so many rows fit the L1 cache
        const int64_t end = start + MIN_CELLS < last ? start + MIN_CELLS : last;
        int64_t c = 0;
        for (; c + 8 * L <= channels; c += 8 * L)
          add_up<8>(origin + c, start, end, channels, start == first, sum + c, square + c);
        for (; c < channels; c += L) add_up<1>(origin + c, start, end, channels, start == first, sum + c, square + c);
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * groups; ++task) {
      const int64_t b = task / groups, g = task % groups;
      // Means and squares of single channels are combined into the group's (Chan, Golub and LeVeque 1979).
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

}  // namespace

extern "C" {

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
}
