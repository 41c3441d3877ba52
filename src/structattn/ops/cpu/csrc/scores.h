// The scores of one pair of tiles.
#pragma once

#include <cmath>
#include <limits>

#include "partial.h"

namespace structattn {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Two tiles of one head. Keys are the rows of their score tile, queries its columns.
struct Pair {
  int64_t b, h;
  const Row& row;
  Tile queries, keys;

  int64_t query_index() const { return row.first_query + queries.first - row.position; }
  int64_t key_index() const { return row.first_key + keys.first; }
};

// The queries of a pair that see its key i, counted from the first.
inline Span visible(const Plan& plan, const Pair& pair, int64_t i) {
  if (i >= pair.keys.count) return {0, 0};
  const int64_t position = pair.keys.first + i;
  Span seen = plan.levels[0].reach(position);
  if (plan.is_causal) seen.start = std::max(seen.start, position);
  return seen.within(pair.queries.first, pair.queries.count);
}

// True if some pairs are hidden: keys after their query, or outside the window of level 1.
inline bool is_cut(const Plan& plan, const Pair& pair) {
  return (plan.is_causal && pair.keys.last() > pair.queries.first) ||
         !plan.levels[0].reaches_all(pair.queries, pair.keys);
}

// Rows of a tile that is cut are multiplied in strips, each over the columns that one of its rows sees: half of a tile
// on the diagonal is hidden. Products in bfloat16 take it whole: on AMX each shape costs brgemm a compilation.
// Calls body(first row, rows, columns) for each strip; for all rows at once in a tile that is not cut.
template <class T, class Body>
void for_each_strip(const Plan& plan, const Pair& pair, bool cut, int64_t rows, const Body& body) {
  if (!cut || !std::is_same_v<T, float>) return body(0, rows, Span{0, plan.query_stride});
  for (int64_t first = 0; first < rows; first += kStrip) {
    const int64_t count = std::min(kStrip, rows - first);
    const int64_t start = visible(plan, pair, first).start / kStrip * kStrip;
    const int64_t stop = std::min(plan.query_stride, round_up(visible(plan, pair, first + count - 1).stop, kStrip));
    body(first, count, Span{start, std::max(start, stop)});
  }
}

// The scores of a pair of tiles: the factor that brings them to base-2 logarithms, and whether some are -inf.
struct ScoreTile {
  float factor;
  bool hides;
};

template <class T>
class Scores {
 public:
  Scores(const Call& call, const Plan& plan, PartialProducts<T>& partial)
      : call_(call), plan_(plan), scale_(static_cast<float>(call.scale) * kLog2E), partial_(partial) {}

  // Writes scores (rows, query_stride) of a pair to `to`, `row` apart. `keys` is a left operand, `queries` the
  // transposed right one. If all pairs have one depth and there is neither mask nor bias, that is one product.
  ScoreTile operator()(const Pair& pair, const TileDepth& shared, int64_t rows, Left<T> keys, const T* queries,
                       float* to, int64_t row) {
    const Level& finest = plan_.levels[shared.all - 1];
    const bool cut = is_cut(plan_, pair);
    for_each_strip<T>(plan_, pair, cut, rows, [&](int64_t first, int64_t count, Span seen) {
      gemm(count, seen.stop - seen.start, finest.key.prefix, keys.at(first, 0), queries + kPaired<T> * seen.start,
           plan_.query_stride, to + first * row + seen.start, row, false);
    });
    for (int64_t l = shared.all; l < shared.some; ++l) {
      const Level& level = plan_.levels[l];
      partial_.add_products(level, level.key, pair.keys, pair.queries, keys, queries, {to, row});
    }
    float factor = scale_ * finest.gain;
    // A factor of 0 would turn -inf into NaN, and one below 0 would turn a maximum into a minimum.
    if (shared.mixed_gain || call_.bias.data || factor <= 0) {
      multiply_gains(pair, shared, scale_, to, row);
      if (call_.bias.data) add_bias(pair, to, row);
      factor = 1;
    }
    const bool hides = cut || pair.queries.count != plan_.query_stride || pair.keys.count != rows;
    if (hides) hide(pair, rows, to, row);
    return {factor, hides || call_.bias.data};
  }

  // The largest absolute value of a score in base-2 logarithms, if the product of two norms is at most `norms`;
  // infinite with a bias.
  float bound(float norms) const {
    float gain = 0;
    for (const Level& level : plan_.levels) gain = std::max(gain, std::abs(level.gain));
    return call_.bias.data ? -kHidden : norms * gain * std::abs(scale_);
  }

  // `tile` (rows, columns of the pair) times each pair's gain, times `factor`.
  void multiply_gains(const Pair& pair, const TileDepth& shared, float factor, float* tile, int64_t row) const {
    float gains[kMostTile];
    const Tile rows = pair.keys, columns = pair.queries;
    for (int64_t i = 0; i < rows.count; ++i) {
      std::fill_n(gains, columns.count, plan_.levels[shared.all - 1].gain * factor);
      for (int64_t l = shared.all; shared.mixed_gain && l < shared.some; ++l) {
        const Span reached = plan_.levels[l].columns(rows, columns, i);
        std::fill(gains + reached.start, gains + reached.stop, plan_.levels[l].gain * factor);
      }
      for (int64_t j = 0; j < columns.count; ++j) tile[i * row + j] *= gains[j];
    }
  }

 private:
  void add_bias(const Pair& pair, float* to, int64_t row) const {
    const View& bias = call_.bias;
    with_dtype(bias, [&](auto* type) {
      using B = std::remove_pointer_t<decltype(type)>;
      const B* from = at<const B>(bias, pair.b, pair.h, pair.query_index(), pair.key_index());
      for (int64_t i = 0; i < pair.keys.count; ++i)
        for (int64_t j = 0; j < pair.queries.count; ++j)
          to[i * row + j] += static_cast<float>(from[i * bias.stride[3] + j * bias.stride[2]]) * kLog2E;
    });
  }

  // -inf where a pair is hidden, and in the padding of either tile.
  void hide(const Pair& pair, int64_t rows, float* to, int64_t row) const {
    for (int64_t i = 0; i < rows; ++i) {
      const Span seen = visible(plan_, pair, i);
      std::fill(to + i * row, to + i * row + seen.start, kHidden);
      std::fill(to + i * row + seen.stop, to + i * row + plan_.query_stride, kHidden);
    }
  }

  const Call& call_;
  const Plan& plan_;
  float scale_;
  PartialProducts<T>& partial_;
};

}  // namespace structattn
