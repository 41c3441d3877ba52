// The softmax of a tile of queries, over its keys tile by tile. Score tiles have queries as columns, so that sums and
// maxima of many queries lie along vectors.
//
// A probability is 2^(score - shift) over the sum of all: the shift cancels, and only keeps powers in a float's range.
// Where norms bound every score by kMostBound, the bound, an integer, is the shift of all queries. Elsewhere it is a
// query's largest score so far, which has to be searched for, and which rescales the output when it grows.
#pragma once

#include "scores.h"

namespace structattn {

// Bound on scores in base-2 logarithms. Powers then lie between 2^-65 and 1: their products with values, too, stay far
// from a float's edge, 2^-126.
constexpr float kMostBound = 32;

class Softmax {
 public:
  explicit Softmax(const Plan& plan) : plan_(plan) {}

  // Begins a tile of queries whose scores have at most the absolute value `bound`.
  void start(float bound) {
    bounded_ = bound <= kMostBound;
    bound_ = bounded_ ? std::ceil(bound) : 0;
    std::fill_n(top_, kMostTile, bounded_ ? bound_ : kHidden);
    std::fill_n(shift_, kMostTile, 0.0f);
    std::fill_n(total_, kMostTile, 0.0f);
  }

  // Brings the shift to the scores of one more tile; scales the output so far, `out` (value_width, query_stride).
  void adapt(const float* scores, ScoreTile tile, int64_t rows, float* out) {
    if (bounded_) return;
    for (int64_t j = 0; j < plan_.query_stride; j += kLanes) {
      Vec tops[2] = {splat(kHidden), splat(kHidden)};
      for (int64_t i = 0; i < rows; ++i)
        tops[i % 2] = max(tops[i % 2], load(scores + i * plan_.query_stride + j) * tile.factor);
      const Vec before = load(top_ + j), top = max(before, max(tops[0], tops[1]));
      store(top_ + j, top);
      const Vec shift = top == kHidden ? Vec{} : top, decay = exp2(before - shift);
      store(shift_ + j, shift);
      store(total_ + j, load(total_ + j) * decay);
      if (reduce_min(decay) == 1) continue;
      for (int64_t d = 0; d < plan_.value_width; ++d)
        store(out + d * plan_.query_stride + j, load(out + d * plan_.query_stride + j) * decay);
    }
  }

  // The powers of a tile of scores, two rows at a time: body(first row, column, powers of one row, of the next).
  template <class Body>
  void powers(const float* scores, ScoreTile tile, int64_t rows, const Body& body) {
    const Power power(bound_);
    if (tile.hides || !bounded_) pass(scores, tile.factor, rows, body, power);
    else pass(scores, tile.factor, rows, body, [power](Vec x) { return power.normal(x); });
  }

  // The sum of query j's powers, and its log-sum-exp: +inf for a query that sees no key.
  float total(int64_t j) const { return total_[j]; }
  float lse(int64_t j) const {
    const double total = total_[j];
    return total == 0 ? -kHidden : static_cast<float>((top_[j] + std::log2(total)) / kLog2E);
  }

 private:
  template <class Body, class Raise>
  void pass(const float* scores, float factor, int64_t rows, const Body& body, const Raise& power) {
    const int64_t stride = plan_.query_stride;
    for (int64_t j = 0; j < stride; j += kLanes) {
      const Vec scale = splat(factor), shift = load(shift_ + j);
      Vec totals[2] = {Vec{}, Vec{}};  // of this tile alone: one long sum would lose digits
      int64_t i = 0;
      for (; i + 2 <= rows; i += 2) {
        const Vec a = power(load(scores + i * stride + j) * scale - shift);
        const Vec b = power(load(scores + (i + 1) * stride + j) * scale - shift);
        totals[0] += a;
        totals[1] += b;
        body(i, j, a, b);
      }
      if (i < rows) {
        const Vec a = power(load(scores + i * stride + j) * scale - shift);
        totals[0] += a;
        body(i, j, a, Vec{});
      }
      store(total_ + j, load(total_ + j) + (totals[0] + totals[1]));
    }
  }

  const Plan& plan_;
  bool bounded_;
  float bound_;  // an integer; 0 if not bounded
  float top_[kMostTile], shift_[kMostTile], total_[kMostTile];  // of each query; shift_ comes on top of bound_
};

}  // namespace structattn
