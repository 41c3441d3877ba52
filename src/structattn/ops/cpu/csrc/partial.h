// Products over a level that only some pairs of two tiles share.
//
// In float they are taken rectangle by rectangle: by block the blocks that both tiles touch, by window strips of rows,
// each cut into the columns that all of its rows reach and those at the two edges that some reach. In bfloat16 the
// tiles are taken whole: on AMX each shape costs brgemm a compilation.
#pragma once

#include "gemm.h"
#include "pack.h"
#include "parallel.h"

namespace structattn {

// Rows per strip of a tile in which a level reaches only some pairs.
constexpr int64_t kStrip = 16;

// Numbers from one column of a right operand to the next: bfloat16 interleaves two rows (pack.h).
template <class T>
constexpr int64_t kPaired = std::is_same_v<T, float> ? 1 : 2;

// A part of two tiles, whose runs count from the first row and column; `whole` if the level reaches all of its pairs.
struct Rectangle {
  Tile rows, columns;
  bool whole;
};

template <class T, class Body>
void for_each_rectangle(const Level& level, Tile rows, Tile columns, const Rectangle& both, const Body& body) {
  if constexpr (!std::is_same_v<T, float>) {
    body(both);
  } else if (level.by_window) {
    for (int64_t i = 0; i < rows.count; i += kStrip) {
      const Tile strip{i, std::min(kStrip, rows.count - i)};
      const Span first = level.columns(rows, columns, i), last = level.columns(rows, columns, strip.last());
      const int64_t left = std::min(last.start, first.stop), right = std::max(last.start, first.stop);
      const auto part = [&](int64_t start, int64_t stop, bool whole) {
        if (start < stop) body(Rectangle{strip, {start, stop - start}, whole});
      };
      part(first.start, left, false);
      part(left, right, first.stop > last.start);
      part(right, last.stop, false);
    }
  } else {
    for (int64_t at = std::max(rows.first, columns.first) / level.size * level.size;
         at <= std::min(rows.last(), columns.last()); at += level.size) {
      const Span block{at, at + level.size}, r = block.within(rows.first, rows.count),
                 c = block.within(columns.first, columns.count);
      body(Rectangle{{r.start, r.stop - r.start}, {c.start, c.stop - c.start}, true});
    }
  }
}

// A matrix in memory: numbers, and the distance between its rows.
template <class T>
struct Matrix {
  T* data;
  int64_t row;
};

template <class T>
class PartialProducts {
 public:
  explicit PartialProducts(const Plan& plan)
      : rows_(plan.key_stride), stride_(plan.query_stride), products_(rows_ * stride_), kept_(rows_ * stride_) {}

  // to(i, j) += Σ_d left(i, d) · right(d, j) over a level's dimensions; `right` has rows of `query_stride`.
  void add_products(const Level& level, const Dims& dims, Tile rows, Tile columns, Left<T> left, const T* right,
                    Matrix<float> to) {
    if (!dims.width) return;
    for_each_rectangle<T>(level, rows, columns, both_tiles(), [&](const Rectangle& part) {
      const Tile r = part.rows, c = part.columns;
      const Left<T> from = left.at(r.first, dims.packed);
      const T* other = right + dims.packed * stride_ + kPaired<T> * c.first;
      float* target = to.data + r.first * to.row + c.first;
      if (part.whole) {
        gemm(r.count, c.count, dims.packed_width(), from, other, stride_, target, to.row, true);
        return;
      }
      gemm(r.count, c.count, dims.packed_width(), from, other, stride_, products_, stride_, false);
      for (int64_t i = 0; i < r.count; ++i) {
        const Span reached = reached_in(level, rows, columns, part, i);
        for (int64_t j = reached.start; j < reached.stop; ++j) target[i * to.row + j] += products_[i * stride_ + j];
      }
    });
  }

  // to(i, d) += Σ_j pairs(i, j) · right(j, d) in a level's dimensions.
  void add_to_rows(const Level& level, const Dims& dims, Tile rows, Tile columns, Matrix<const T> pairs,
                   Matrix<const T> right, Matrix<float> to) {
    if (!dims.width) return;
    for_each_rectangle<T>(level, rows, columns, both_tiles(), [&](const Rectangle& part) {
      const Matrix<const T> kept = keep(level, rows, columns, part, pairs);
      gemm(part.rows.count, dims.packed_width(), part.columns.count, Left<T>{kept.data, kept.row},
           right.data + part.columns.first * right.row + kPaired<T> * dims.packed, right.row,
           to.data + part.rows.first * to.row + dims.packed, to.row, true);
    });
  }

  // to(d, j) += Σ_i left(d, i) · pairs(i, j) in a level's dimensions; `to` has rows of `query_stride`, `pairs` is a
  // right operand.
  void add_to_columns(const Level& level, const Dims& dims, Tile rows, Tile columns, Left<T> left,
                      Matrix<const T> pairs, float* to) {
    if (!dims.width) return;
    for_each_rectangle<T>(level, rows, columns, both_tiles(), [&](const Rectangle& part) {
      const Matrix<const T> kept = keep_right(level, rows, columns, part, pairs);
      gemm(dims.packed_width(), part.columns.count, part.rows.count, left.at(dims.packed, part.rows.first), kept.data,
           kept.row, to + dims.packed * stride_ + part.columns.first, stride_, true);
    });
  }

 private:
  // The columns of a rectangle that the level reaches from its row i, counted from the rectangle's first.
  static Span reached_in(const Level& level, Tile rows, Tile columns, const Rectangle& part, int64_t i) {
    return level.columns(rows, columns, part.rows.first + i).within(part.columns.first, part.columns.count);
  }

  // The pairs of a rectangle, zero where the level does not reach.
  Matrix<const T> keep(const Level& level, Tile rows, Tile columns, const Rectangle& part, Matrix<const T> pairs) {
    const T* from = pairs.data + part.rows.first * pairs.row + part.columns.first;
    if (part.whole) return {from, pairs.row};
    for (int64_t i = 0; i < part.rows.count; ++i) {
      const Span reached = reached_in(level, rows, columns, part, i);
      T* to = kept_ + i * stride_;
      std::fill(to, to + reached.start, T(0.0f));
      std::copy(from + i * pairs.row + reached.start, from + i * pairs.row + reached.stop, to + reached.start);
      std::fill(to + reached.stop, to + part.columns.count, T(0.0f));
    }
    return {kept_.get(), stride_};
  }

  // The same for pairs that are a right operand.
  Matrix<const T> keep_right(const Level& level, Tile rows, Tile columns, const Rectangle& part,
                             Matrix<const T> pairs) {
    if constexpr (std::is_same_v<T, float>) {
      return keep(level, rows, columns, part, pairs);
    } else {
      std::fill_n(kept_.get(), rows_ * stride_, T(0.0f));
      for (int64_t i = 0; i < rows.count; ++i) {
        const Span reached = reached_in(level, rows, columns, part, i);
        const T* from = pairs.data + i / 2 * 2 * pairs.row + i % 2;
        T* to = kept_ + i / 2 * 2 * stride_ + i % 2;
        for (int64_t j = reached.start; j < reached.stop; ++j) to[2 * j] = from[2 * j];
      }
      return {kept_.get(), stride_};
    }
  }

  Rectangle both_tiles() const { return {{0, rows_}, {0, stride_}, false}; }

  int64_t rows_, stride_;  // of a pair of tiles in memory
  Buffer<float> products_;
  Buffer<T> kept_;
};

}  // namespace structattn
