// Tiles of tensors brought into the formats that products take, and back. Whatever a tensor's dtype, strides or tail,
// a packed tile is dense and its padding is zero, so that nothing after this file has a special case.
//
// left:  (rows, columns), row-major.
// right: (rows, columns) as the right operand of a product: row-major in float, pairs of rows interleaved in bfloat16.
#pragma once

#include "tiles.h"
#include "vector.h"

namespace structattn {

// The place of a tensor's columns in a packed tile.
struct Columns {
  struct Segment {
    int64_t source, width, packed;
  };
  std::vector<Segment> segments;
  int64_t packed;

  static Columns of_keys(const Plan& plan) { return of_levels(plan, &Level::key, plan.rank); }
  static Columns of_values(const Plan& plan) { return of_levels(plan, &Level::value, plan.value_width); }

 private:
  static Columns of_levels(const Plan& plan, Dims Level::*dims_of, int64_t packed) {
    Columns columns{{}, packed};
    for (const Level& level : plan.levels) {
      const Dims& dims = level.*dims_of;
      if (!columns.segments.empty() && dims.packed == columns.segments.back().packed + columns.segments.back().width)
        columns.segments.back().width += dims.width;
      else columns.segments.push_back({dims.column, dims.width, dims.packed});
    }
    return columns;
  }
};

template <class T>
T* at(const View& view, int64_t b, int64_t h, int64_t row, int64_t column) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] + row * view.stride[2] +
         column * view.stride[3];
}

// Calls body with a null pointer of the view's element type.
template <class Body>
void with_dtype(const View& view, const Body& body) {
  switch (view.dtype) {
    case kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case kFloat16: return body(static_cast<Half*>(nullptr));
    default: return body(static_cast<float*>(nullptr));
  }
}

// One row, every number times `factor`.
template <class T>
void write_row(const float* from, int64_t count, float factor, T* to, int64_t step) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i] * factor);
  else
    for (int64_t i = 0; i < count; ++i) to[i * step] = static_cast<T>(from[i] * factor);
}

template <class T>
void read_row(const T* from, int64_t step, int64_t count, float* to) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i * step]);
}

// Positions `first … first + count` of one head as floats (rows, columns.packed), zero past the end.
inline void read_tile(const View& view, int64_t b, int64_t h, int64_t first, int64_t count, int64_t rows,
                      const Columns& columns, float* to) {
  int64_t used = 0;
  for (const auto& segment : columns.segments) used += segment.width;
  if (used < columns.packed) std::fill_n(to, count * columns.packed, 0.0f);
  std::fill_n(to + count * columns.packed, (rows - count) * columns.packed, 0.0f);
  with_dtype(view, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < count; ++i)
      for (const auto& segment : columns.segments)
        read_row(at<const T>(view, b, h, first + i, segment.source), view.stride[3], segment.width,
                 to + i * columns.packed + segment.packed);
  });
}

inline float most(float a, float b) { return a > b ? a : b; }

// The largest squared norm of a row of a dense tile (rows, columns).
inline float largest_squared_norm(const float* tile, int64_t rows, int64_t columns) {
  float largest = 0;
  for (int64_t i = 0; i < rows; ++i) {
    Vec sum{};
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) sum += load(tile + j) * load(tile + j);
    if (j < columns) sum += load_part(tile + j, columns - j) * load_part(tile + j, columns - j);
    tile += columns;
    largest = most(reduce_add(sum), largest);
  }
  return largest;
}

// The inverse of read_tile, every number times `factor`.
inline void write_tile(const View& view, int64_t b, int64_t h, int64_t first, int64_t count, const Columns& columns,
                       const float* from, float factor) {
  with_dtype(view, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < count; ++i)
      for (const auto& segment : columns.segments)
        write_row(from + i * columns.packed + segment.packed, segment.width, factor,
                  at<T>(view, b, h, first + i, segment.source), view.stride[3]);
  });
}

// to (columns, to_row) = the transpose of from (rows, from_row), by blocks of 4 x 4, what is left one by one.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  using Four = float __attribute__((vector_size(16)));
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t i = 0; i < whole_rows; i += 4)
    for (int64_t j = 0; j < whole_columns; j += 4) {
      Four row[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&row[k], from + (i + k) * from_row + j, sizeof(Four));
      const Four low01 = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
      const Four low23 = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
      const Four high01 = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
      const Four high23 = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
      const Four column[4] = {
          __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
          __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
      for (int k = 0; k < 4; ++k) std::memcpy(to + (j + k) * to_row + i, &column[k], sizeof(Four));
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
}

#if defined(__AVX512BF16__)
inline void to_left(const float* tile, int64_t rows, int64_t columns, BFloat16* to) {
  const int64_t count = rows * columns;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(tile + i));
  for (; i < count; ++i) to[i] = tile[i];
}

// `rows` is even.
inline void to_right(const float* tile, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float *a = tile + i * columns, *b = a + columns;
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store_pairs(to + i * columns + 2 * j, load(a + j), load(b + j));
    for (; j < columns; ++j) {
      to[i * columns + 2 * j] = a[j];
      to[i * columns + 2 * j + 1] = b[j];
    }
  }
}
#endif

}  // namespace structattn
