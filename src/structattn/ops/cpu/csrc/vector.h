// Vectors of floats, as wide as the machine's registers, through the compiler's own vector types: plain operators work
// on them, and the same source serves AVX-512, AVX2, SSE and Neon. Intrinsics appear only where no operator exists.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace structattn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = int32_t __attribute__((vector_size(kLanes * 4)));

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// The first `count < kLanes` floats; the other lanes are zero and touch no memory.
inline Vec load_part(const float* from, int count) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  Vec x{};
  std::memcpy(&x, from, count * sizeof(float));
  return x;
#endif
}

inline void store_part(float* to, Vec x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), x);
#else
  std::memcpy(to, &x, count * sizeof(float));
#endif
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float reduce_max(Vec x) {
  float top = x[0];
  for (int lane = 1; lane < kLanes; ++lane) top = x[lane] > top ? x[lane] : top;
  return top;
}

inline float reduce_add(Vec x) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
  return total;
}

// 2^x to float precision for x < 128, exactly 0 from 2^-127 down (so also for -inf); NaN stays NaN.
inline Vec exp2(Vec x) {
  // The polynomial of degree 5 nearest to 2^f on [-0.5, 0.5]: relative error 7.5e-8.
  const auto polynomial = [](Vec f) {
    Vec p = splat(1.32764725e-3f);
    p = p * f + splat(9.67554096e-3f);
    p = p * f + splat(5.55071309e-2f);
    p = p * f + splat(2.40221202e-1f);
    p = p * f + splat(6.93146944e-1f);
    return p * f + splat(1.00000012f);
  };
#if defined(__AVX512F__)
  const __mmask16 underflow = _mm512_cmp_ps_mask(x, splat(-127.0f), _CMP_LT_OQ);
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(static_cast<__mmask16>(~underflow), polynomial(x - n), n);
#else
  x = x < splat(-127.0f) ? splat(-127.0f) : x;
  // Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits, ready to become an exponent.
  const Vec shifted = x + splat(12582912.0f);
  const Vec n = shifted - splat(12582912.0f);
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return polynomial(x - n) * power;
#endif
}

#if defined(__AVX512BF16__)
// kLanes floats rounded to bfloat16.
inline void store(BFloat16* to, Vec x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(to, &rounded, sizeof rounded);
}

// Two rows a and b rounded to bfloat16 and interleaved: a0 b0 a1 b1 …
inline void store_pairs(BFloat16* to, Vec a, Vec b) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(b)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

}  // namespace structattn
