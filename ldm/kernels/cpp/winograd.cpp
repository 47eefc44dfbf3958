// Input and output transforms of 3x3 Winograd convolution, for float.

#include "common.h"

namespace {

// F(2x2, 3x3) of Lavin and Gray (arXiv:1509.09308): a tile of 2x2 outputs takes 16 products of channels instead of 36.
// They are matrix products, one for each of 16 positions, which the caller computes between these two functions.
// Rows of tiles are counted through the whole batch: row r is row r % tile_rows of image r / tile_rows.

struct Map {
  int64_t height, width;
  int64_t tile_rows() const { return (height + 1) / 2; }
  int64_t tile_columns() const { return (width + 1) / 2; }
};

// x is (batch, height, width, channels); out is (16, rows * tile_columns, channels): B^T d B of each 4x4 input tile.
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

}  // namespace

extern "C" {

void ldm_winograd_input(int64_t height, int64_t width, int64_t channels, int64_t first, int64_t rows, const float* x,
                        float* out, int threads) {
  winograd_input({height, width}, channels, first, rows, x, out, threads);
}

void ldm_winograd_output(int64_t height, int64_t width, int64_t channels, int64_t first, int64_t rows,
                         const float* const* products, const float* bias, const float* add, float* y, int threads) {
  winograd_output({height, width}, channels, first, rows, products, bias, add, y, threads);
}
}
