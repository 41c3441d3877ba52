// The scores of one pair of tiles, for either layout: forward has queries as rows, backward has keys.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "pack.h"

namespace structattn {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Two tiles of one head, and which of them are the rows of the score tile.
struct Pair {
  int64_t b, h;
  const Row& row;
  Tile queries, keys;
  bool keys_are_rows;

  Tile rows() const { return keys_are_rows ? keys : queries; }
  Tile columns() const { return keys_are_rows ? queries : keys; }
  int64_t query_index() const { return row.first_query + queries.first - row.position; }
  int64_t key_index() const { return row.first_key + keys.first; }
};

// Columns of a score tile, from `start` up to `stop`.
struct Span {
  int64_t start, stop;
};

// The visible columns of row i of a pair's score tile; `crossing` if a key may come after a query.
inline Span visible(const Pair& pair, bool crossing, int64_t i) {
  Span span{0, i < pair.rows().count ? pair.columns().count : 0};
  if (crossing && pair.keys_are_rows) span.start = pair.keys.first + i - pair.queries.first;
  if (crossing && !pair.keys_are_rows) span.stop = std::min(span.stop, pair.queries.first + i + 1 - pair.keys.first);
  span.stop = std::max<int64_t>(span.stop, 0);
  span.start = std::clamp<int64_t>(span.start, 0, span.stop);
  return span;
}

inline bool is_crossing(const Call& call, const Pair& pair) {
  return call.is_causal && pair.keys.last() > pair.queries.first;
}

// Rows of a tile on the diagonal are multiplied in strips, each over the columns that one of its rows sees: half of
// such a tile is hidden. Products in bfloat16 take it whole, since each shape costs brgemm a compilation.
constexpr int64_t kStrip = 16;

// Calls body(first row, rows, columns) for each strip; for all rows at once in a tile off the diagonal.
template <class T, class Body>
void for_each_strip(const Pair& pair, bool crossing, int64_t rows, int64_t stride, const Body& body) {
  if (!crossing || !std::is_same_v<T, float>) return body(0, rows, Span{0, stride});
  for (int64_t first = 0; first < rows; first += kStrip) {
    const int64_t count = std::min(kStrip, rows - first);
    const int64_t start = visible(pair, true, first).start / kStrip * kStrip;
    const int64_t stop = std::min(stride, round_up(visible(pair, true, first + count - 1).stop, kStrip));
    body(first, count, Span{start, std::max(start, stop)});
  }
}

// Products of single rectangles are few and small, and are done in float whatever the tiles' format. These give
// a sub-block of an operand as floats: the place itself, or a copy in `space`.
struct Block {
  const float* data;
  int64_t row;  // distance between rows
};

inline Block widen_left(const float* from, int64_t row, int64_t, int64_t, float*) { return {from, row}; }
inline Block widen_right(const float* from, int64_t row, int64_t i, int64_t j, int64_t, int64_t, float*) {
  return {from + i * row + j, row};
}
inline Block widen_left(const at::BFloat16* from, int64_t row, int64_t rows, int64_t columns, float* space) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) space[i * columns + j] = from[i * row + j];
  return {space, columns};
}
inline Block widen_right(const at::BFloat16* from, int64_t row, int64_t i, int64_t j, int64_t rows, int64_t columns,
                         float* space) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t n = 0; n < columns; ++n)
      space[k * columns + n] = from[(i + k) / 2 * row * 2 + (j + n) * 2 + (i + k) % 2];
  return {space, columns};
}

// Space for two widened blocks.
struct Widened {
  Buffer<float> left, right;
  explicit Widened(const Plan& plan) : left(plan.stride * plan.rank), right(plan.stride * plan.rank) {}
};

template <class T>
class Scores {
 public:
  Scores(const Call& call, const Plan& plan)
      : call_(call), plan_(plan), scale_(static_cast<float>(call.scale) * kLog2E), widened_(plan) {}

  // Writes scores (rows, stride) of a pair to `to`, `row` apart, and returns the factor that brings them to base-2
  // logarithms. `left` is the left operand of the rows' tile, `right` the transposed right operand of the columns'.
  // If all pairs have one depth and there is neither mask nor bias, that is one product.
  float operator()(const Pair& pair, const TileDepth& shared, int64_t rows, const T* left, const T* right, float* to,
                   int64_t row) {
    const int64_t stride = plan_.stride;
    const Level& finest = plan_.levels[shared.depth - 1];
    const bool crossing = is_crossing(call_, pair);
    for_each_strip<T>(pair, crossing, rows, stride, [&](int64_t first, int64_t count, Span seen) {
      gemm(count, seen.stop - seen.start, finest.prefix, left + first * plan_.rank, plan_.rank,
           right + kWide * seen.start, stride, to + first * row + seen.start, row, false);
    });
    if (shared.mixed) add_rectangles(pair, shared, left, right, to, row);
    float factor = scale_ * finest.gain;
    // A factor of 0 would turn -inf into NaN, and one below 0 would turn a maximum into a minimum.
    if (shared.mixed_gain || call_.bias.data || factor <= 0) {
      multiply_gains(pair, shared, scale_, to, row);
      if (call_.bias.data) add_bias(pair, to, row);
      factor = 1;
    }
    hide(pair, crossing, rows, to, row);
    return factor;
  }

  // `tile` (rows, columns of the pair) times each pair's gain, times `factor`.
  void multiply_gains(const Pair& pair, const TileDepth& shared, float factor, float* tile, int64_t row) const {
    float gains[kMostTile * kMostTile];
    const Tile rows = pair.rows(), columns = pair.columns();
    std::fill_n(gains, rows.count * columns.count, plan_.levels[shared.depth - 1].gain * factor);
    for (size_t l = shared.depth; shared.mixed_gain && l < plan_.levels.size(); ++l)
      for_each_rectangle(plan_.levels[l], rows, columns, [&](Tile r, Tile c) {
        for (int64_t i = 0; i < r.count; ++i)
          std::fill_n(gains + (r.first + i) * columns.count + c.first, c.count, plan_.levels[l].gain * factor);
      });
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t j = 0; j < columns.count; ++j) tile[i * row + j] *= gains[i * columns.count + j];
  }

 private:
  // A column of a right operand is a pair in bfloat16.
  static constexpr int64_t kWide = std::is_same_v<T, float> ? 1 : 2;

  void add_rectangles(const Pair& pair, const TileDepth& shared, const T* left, const T* right, float* to, int64_t row) {
    for (size_t l = shared.depth; l < plan_.levels.size(); ++l) {
      const Level& level = plan_.levels[l];
      for_each_rectangle(level, pair.rows(), pair.columns(), [&](Tile r, Tile c) {
        const Block a = widen_left(left + r.first * plan_.rank + level.packed, plan_.rank, r.count, level.width,
                                   widened_.left);
        const Block b =
            widen_right(right, plan_.stride, level.packed, c.first, level.width, c.count, widened_.right);
        gemm(r.count, c.count, level.width, a.data, a.row, b.data, b.row, to + r.first * row + c.first, row, true);
      });
    }
  }

  void add_bias(const Pair& pair, float* to, int64_t row) const {
    const View& bias = call_.bias;
    const int64_t row_step = bias.stride[pair.keys_are_rows ? 3 : 2];
    const int64_t column_step = bias.stride[pair.keys_are_rows ? 2 : 3];
    with_dtype(bias, [&](auto* type) {
      using B = std::remove_pointer_t<decltype(type)>;
      const B* from = at<const B>(bias, pair.b, pair.h, pair.query_index(), pair.key_index());
      for (int64_t i = 0; i < pair.rows().count; ++i)
        for (int64_t j = 0; j < pair.columns().count; ++j)
          to[i * row + j] += static_cast<float>(from[i * row_step + j * column_step]) * kLog2E;
    });
  }

  // -inf where a key comes after its query, and in the padding of either tile.
  void hide(const Pair& pair, bool crossing, int64_t rows, float* to, int64_t row) const {
    if (!crossing && pair.columns().count == plan_.stride && pair.rows().count == rows) return;
    for (int64_t i = 0; i < rows; ++i) {
      const Span seen = visible(pair, crossing, i);
      std::fill(to + i * row, to + i * row + seen.start, kHidden);
      std::fill(to + i * row + seen.stop, to + i * row + plan_.stride, kHidden);
    }
  }

  const Call& call_;
  const Plan& plan_;
  float scale_;
  Widened widened_;
};

}  // namespace structattn
