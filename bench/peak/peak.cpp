// The rate that the units for products reach at best: sums of products of registers, with nothing to load.
//
// One call for each kind: 0 fused multiply-adds of float, 1 products of bfloat16. Built for the machine it runs on; called by
// bench/speedlib/peak.py through ctypes.
#include <cstdint>

#include <omp.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#endif

namespace {

#if defined(HAS_AMX)
struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Four products of tiles of 16 x 32 by 32 x 16, each with sums of its own, as many times as asked for.
double products(int64_t times) {
  TileShape shape;
  for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
  _tile_loadconfig(&shape);
  alignas(64) uint16_t ones[512];
  for (auto& one : ones) one = 0x3f80;
  alignas(64) float sums[256];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t i = 0; i < times; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  double sum = sums[0];
  _tile_stored(3, sums, 64);
  _tile_release();
  return sum + sums[0];
}
constexpr int64_t PER_TURN = 4 * 2 * 16 * 16 * 32;  // operations, two for a multiplication and its addition
#elif defined(__AVX512BF16__)
double products(int64_t times) {
  const __m512bh one = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sums[24];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < times; ++i)
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, one, one);
  double all = 0;
  for (auto& sum : sums) all += _mm512_reduce_add_ps(sum);
  return all;
}
constexpr int64_t PER_TURN = 24 * 2 * 32;
#endif

#if defined(__AVX512F__)
double multiply_adds(int64_t times) {
  __m512 sums[24];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
  for (int64_t i = 0; i < times; ++i)
#pragma GCC unroll 24
    for (int j = 0; j < 24; ++j) sums[j] = _mm512_fmadd_ps(a, b, sums[j]);
  double all = 0;
  for (auto& sum : sums) all += _mm512_reduce_add_ps(sum);
  return all;
}
#endif

}  // namespace

extern "C" {

// What a kind is done by: 0 nothing, 1 AVX-512, 2 AVX512-BF16, 3 AMX.
int peak_unit(int kind) {
#if defined(HAS_AMX)
  if (kind == 1) return syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 3 : 0;  // ARCH_REQ_XCOMP_PERM of the tiles' data
#elif defined(__AVX512BF16__)
  if (kind == 1) return 2;
#endif
#if defined(__AVX512F__)
  if (kind == 0) return 1;
#endif
  return 0;
}

// Do it `times` times on each of so many threads; gives the operations per thread, and adds what came out to *sum, so
// that nothing is left out by the compiler.
int64_t peak_run(int kind, int64_t times, int threads, double* sum) {
  int64_t done = 0;
  double all = 0;
#pragma omp parallel num_threads(threads) reduction(+ : all)
  {
#if defined(HAS_AMX) || defined(__AVX512BF16__)
    if (kind == 1) all += products(times);
#endif
#if defined(__AVX512F__)
    if (kind == 0) all += multiply_adds(times);
#endif
  }
#if defined(HAS_AMX) || defined(__AVX512BF16__)
  if (kind == 1) done = times * PER_TURN;
#endif
#if defined(__AVX512F__)
  if (kind == 0) done = times * 24 * 2 * 16;
#endif
  *sum += all;
  return done;
}
}
