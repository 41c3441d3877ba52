// Vectors of floats, as wide as the machine's registers, through the compiler's own vector types: plain operators work
// on them, and the same source serves AVX-512, AVX2, SSE and Neon. Intrinsics appear only where no operator exists.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

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

// Combines the lanes of x, halving their number at each step.
template <class V, size_t... kLane, class Combine>
inline float reduce_halves(V x, std::index_sequence<kLane...>, const Combine& combine) {
  constexpr int kHalf = sizeof...(kLane);
  const auto y = combine(__builtin_shufflevector(x, x, kLane...), __builtin_shufflevector(x, x, (kLane + kHalf)...));
  if constexpr (kHalf == 2) return combine(y[0], y[1]);
  else return reduce_halves(y, std::make_index_sequence<kHalf / 2>(), combine);
}

template <class Combine>
inline float reduce(Vec x, const Combine& combine) {
  return reduce_halves(x, std::make_index_sequence<kLanes / 2>(), combine);
}

inline float reduce_max(Vec x) {
  return reduce(x, [](auto a, auto b) { return a > b ? a : b; });
}

inline float reduce_min(Vec x) {
  return reduce(x, [](auto a, auto b) { return a < b ? a : b; });
}

inline float reduce_add(Vec x) {
  return reduce(x, [](auto a, auto b) { return a + b; });
}

// Powers of two, 2^(x - shift), to float precision. The shift is an integer and costs neither time nor precision.
class Power {
 public:
  explicit Power(float shift) : least_(splat(shift - 127)) {
#if defined(__AVX512F__)
    // Nearest to 2^f on [0, 1): relative error 7.5e-8.
    constexpr float kNearest[] = {0.99999993f, 0.69315307f, 0.24015362f, 5.5826318e-2f, 8.9893403e-3f, 1.8775767e-3f};
    const float unit = std::exp2(-shift);
#else
    // Nearest to 2^f on [-0.5, 0.5]: relative error 7.5e-8.
    constexpr float kNearest[] = {1.0000001f, 0.69314697f, 0.24022120f, 5.5507133e-2f, 9.6755415e-3f, 1.3276472e-3f};
    const float unit = 1;
    // Added to x, 1.5 · 2^23 rounds it to an integer, which then lies in the low bits. 127 makes it an exponent.
    magic_ = splat(12582912.0f + 127.0f - shift);
#endif
    for (int i = 0; i < 6; ++i) coefficients_[i] = splat(kNearest[i] * unit);
  }

  // For x - shift in [-126, 127].
  Vec normal(Vec x) const {
#if defined(__AVX512F__)
    // scalef multiplies by 2 to the floor of x.
    const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(polynomial(f), x);
#else
    const Vec shifted = x + magic_;
    IntVec bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return polynomial(x - (shifted - magic_)) * power;
#endif
  }

  // For x - shift < 128; exactly 0 from 2^-127 down, so also for -inf. NaN stays NaN.
  Vec operator()(Vec x) const {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least_, _CMP_NLT_UQ), normal(x));
#else
    return normal(x < least_ ? least_ : x);  // its exponent is that of zero
#endif
  }

 private:
  Vec polynomial(Vec f) const {
    Vec p = coefficients_[5];
    for (int i = 4; i >= 0; --i) p = p * f + coefficients_[i];
    return p;
  }

  Vec least_, coefficients_[6];
#if !defined(__AVX512F__)
  Vec magic_;
#endif
};

// 2^x to float precision for x < 128, exactly 0 from 2^-127 down.
inline Vec exp2(Vec x) { return Power(0)(x); }

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
