// GEGLU's gate, and interleaving the phases of upsampled maps.

#include "common.h"

namespace {

// --- upsampling ---------------------------------------------------------------------------------

// Interleave the four phases of upsampled maps: y (batch, height + 1, width + 1, 4 channels) into out (batch, 2 height,
// 2 width, channels). Phase 2 i + j holds the cells of odd (1) or even (0) rows i and columns j.
template <class T>
void interleave_phases(int64_t batch, int64_t height, int64_t width, int64_t channels, const T* y, T* out, int threads) {
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
#pragma omp parallel for num_threads(useful(rows * width, 1 << 14, threads)) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const T *value = x + i * 2 * width, *gate = value + width;
    T* to = out + i * width;
    for (int64_t c = 0; c < width; c += L)
      store(to + c, (load(value + c) + load(bias + c)) * gelu<T>(load(gate + c) + load(bias + width + c)));
  }
}

}  // namespace

extern "C" {

void ldm_interleave_phases(int dtype, int64_t batch, int64_t height, int64_t width, int64_t channels, const void* y, void* out,
                int threads) {
  if (dtype)
    interleave_phases<bf16>(batch, height, width, channels, (const bf16*)y, (bf16*)out, threads);
  else
    interleave_phases<float>(batch, height, width, channels, (const float*)y, (float*)out, threads);
}

void ldm_geglu(int dtype, int64_t rows, int64_t width, const void* x, const float* bias, void* out, int threads) {
  if (dtype)
    geglu<bf16>(rows, width, (const bf16*)x, bias, (bf16*)out, threads);
  else
    geglu<float>(rows, width, (const float*)x, bias, (float*)out, threads);
}
}
