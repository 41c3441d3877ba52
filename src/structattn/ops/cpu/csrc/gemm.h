// The matrix product of small tiles, C (+)= A · B with float C, for the two formats in which tiles are held: float, and
// bfloat16 with pairs of B's rows interleaved, so that one instruction multiplies and adds a pair.
//
// The kernel holds a block of C in registers and walks the inner dimension with broadcasts of A against vectors of B. A
// machine with AMX multiplies bfloat16 by PyTorch's brgemm instead, where the build may use it.
#pragma once

#if defined(STRUCTATTN_BRGEMM) && defined(__AMX_BF16__)
#define STRUCTATTN_AMX
#include <ATen/native/CPUBlas.h>
#endif

#include "vector.h"

namespace structattn {

// 8 x 2 vectors of C leave registers for B and a broadcast where there are 32. Where there are 16, 6 x 2 leave four: as
// many sums in flight as two units of four cycles need, and more.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 6;
#endif

inline Vec multiply_add(float a, Vec b, Vec sum) { return a * b + sum; }

// Two bfloat16 of one row of A, or of one column of B: as wide as a float, so that both formats share the kernel. They
// are read from memory that is written as bfloat16.
struct __attribute__((may_alias)) Two {
  uint32_t bits;
};

#if defined(__AVX512BF16__)
inline Vec multiply_add(Two a, Vec b, Vec sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(_mm512_set1_epi32(a.bits)));
}
#endif

// One block of C: kRows rows, kVecs vectors wide; with kPart, one vector of which `part` lanes count. `In` is float or
// Two.
template <int kRows, int kVecs, bool kAdd, bool kPart, class In>
inline __attribute__((always_inline)) void gemm_block(int64_t inner, const In* a, int64_t a_row, int64_t a_inner,
                                                      const In* b, int64_t b_row, float* c, int64_t c_row, int part) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const float* from = c + i * c_row + v * kLanes;
      if constexpr (kAdd) sum[i][v] = kPart ? load_part(from, part) : load(from);
      else sum[i][v] = Vec{};
    }
  for (int64_t k = 0; k < inner; ++k) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const float* from = reinterpret_cast<const float*>(b + k * b_row + v * kLanes);
      right[v] = kPart ? load_part(from, part) : load(from);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = multiply_add(a[i * a_row + k * a_inner], right[v], sum[i][v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = c + i * c_row + v * kLanes;
      if constexpr (kPart) store_part(to, sum[i][v], part);
      else store(to, sum[i][v]);
    }
}

// One vector of each row. Out of line: beside wider blocks, row pointers would not stay in registers.
template <int kRows, bool kAdd, bool kPart, class In>
__attribute__((noinline)) void gemm_vector(int64_t inner, const In* a, int64_t a_row, int64_t a_inner, const In* b,
                                           int64_t b_row, float* c, int64_t c_row, int part) {
  gemm_block<kRows, 1, kAdd, kPart>(inner, a, a_row, a_inner, b, b_row, c, c_row, part);
}

// kRows rows of C over all columns.
template <int kRows, bool kAdd, class In>
void gemm_rows(int64_t columns, int64_t inner, const In* a, int64_t a_row, int64_t a_inner, const In* b, int64_t b_row,
               float* c, int64_t c_row) {
  int64_t j = 0;
  // Few rows leave registers for wider blocks, which walk more of each of B's rows at once.
  for (; kRows <= kBlockRows / 2 && j + 4 * kLanes <= columns; j += 4 * kLanes)
    gemm_block<kRows, 4, kAdd, false>(inner, a, a_row, a_inner, b + j, b_row, c + j, c_row, 0);
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    gemm_block<kRows, 2, kAdd, false>(inner, a, a_row, a_inner, b + j, b_row, c + j, c_row, 0);
  for (; j + kLanes <= columns; j += kLanes)
    gemm_vector<kRows, kAdd, false>(inner, a, a_row, a_inner, b + j, b_row, c + j, c_row, 0);
  if (j < columns)
    gemm_vector<kRows, kAdd, true>(inner, a, a_row, a_inner, b + j, b_row, c + j, c_row,
                                   static_cast<int>(columns - j));
}

template <bool kAdd, class In>
void gemm_strided(int64_t rows, int64_t columns, int64_t inner, const In* a, int64_t a_row, int64_t a_inner,
                  const In* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t i = 0;
  const auto step = [&](auto block) {
    constexpr int kRows = decltype(block)::value;
    for (; i + kRows <= rows; i += kRows)
      gemm_rows<kRows, kAdd>(columns, inner, a + i * a_row, a_row, a_inner, b, b_row, c + i * c_row, c_row);
  };
  if (columns <= kLanes) step(std::integral_constant<int, 2 * kBlockRows>{});
  step(std::integral_constant<int, kBlockRows>{});
  step(std::integral_constant<int, 4>{});
  step(std::integral_constant<int, 1>{});
}

// The left operand of a product: numbers, and the distances between its rows and along the inner dimension.
template <class T>
struct Left {
  const T* data;
  int64_t row, inner = 1;

  Left at(int64_t i, int64_t k) const { return {data + i * row + k * inner, row, inner}; }
};

// C (rows, columns) (+)= A (rows, inner) · B (inner, columns); B and C are row-major with the given distances.
inline void gemm(int64_t rows, int64_t columns, int64_t inner, Left<float> a, const float* b, int64_t b_row, float* c,
                 int64_t c_row, bool add) {
  if (add) gemm_strided<true>(rows, columns, inner, a.data, a.row, a.inner, b, b_row, c, c_row);
  else gemm_strided<false>(rows, columns, inner, a.data, a.row, a.inner, b, b_row, c, c_row);
}

#if defined(__AVX512BF16__)
// The same with A in bfloat16, row-major, and B in pairs of rows, (inner / 2, columns, 2); `b_row` counts columns.
// `inner` and A's rows are even.
inline void gemm(int64_t rows, int64_t columns, int64_t inner, Left<BFloat16> a, const BFloat16* b, int64_t b_row,
                 float* c, int64_t c_row, bool add) {
#if defined(STRUCTATTN_AMX)
  at::native::cpublas::brgemm(rows, columns, inner, a.row, b_row, c_row, add, a.data, b, c, true);
#else
  const Two *left = reinterpret_cast<const Two*>(a.data), *right = reinterpret_cast<const Two*>(b);
  if (add) gemm_strided<true>(rows, columns, inner / 2, left, a.row / 2, 1, right, b_row, c, c_row);
  else gemm_strided<false>(rows, columns, inner / 2, left, a.row / 2, 1, right, b_row, c, c_row);
#endif
}
#endif

// Gives up the tile registers that AMX may have configured.
inline void release_products() {
#if defined(STRUCTATTN_AMX)
  at::native::cpublas::brgemm_release(true);
#endif
}

}  // namespace structattn
