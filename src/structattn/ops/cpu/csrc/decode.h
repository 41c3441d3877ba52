// A few queries against a long cache. The speed of memory decides. Keys and values lie level by level, keys
// dimension-major. A task takes one run of keys of one key head and serves all query rows that read it: the run comes
// from memory once and from cache afterwards.
#pragma once

#include "parallel.h"
#include "scores.h"

namespace structattn {

struct Decode {
  View query, out;           // (B, Hq, Tq, r), (B, Hq, Tq, dv)
  const View* key_levels;    // (levels) of (B, Hkv, r_l, capacity): column c is key level_starts[l] + c
  const View* value_levels;  // (levels) of (B, Hkv, capacity, u_l): row c is value level_starts[l] + c
  const int64_t* level_starts;                   // (levels)
  const int64_t* key_start;                      // (B), or null
  const int64_t *ranks, *sizes, *value_widths;   // (levels), as in Call
  const double* gains;                           // (levels)
  int64_t batch, heads, key_heads, queries, key_length, rank, value_width, levels, by_window;
  double scale;
};

// Keys per task: runs of 512 to 4096 took the same time within the noise.
constexpr int64_t kRun = 2048;
// Values per product: few enough to stay in the first cache when they have to be brought to float.
constexpr int64_t kValueRun = 64;

inline Vec load_float(const float* from) { return load(from); }
inline Vec load_float(const BFloat16* from) {
  using Bits = uint16_t __attribute__((vector_size(kLanes * 2)));
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  const IntVec wide = __builtin_convertvector(bits, IntVec) << 16;
  Vec x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
inline Vec load_float(const Half* from) {
  float x[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = from[lane];
  return load(x);
}

// scores[x] += Σ_d query[d] · keys[d · step + x] over `count` keys, kDims dimensions at a time.
template <int kDims, class T>
void add_dimensions(const float* query, const T* keys, int64_t step, int64_t count, float* scores) {
  Vec weight[kDims];
  for (int d = 0; d < kDims; ++d) weight[d] = splat(query[d]);
  int64_t x = 0;
  for (; x + kLanes <= count; x += kLanes) {
    Vec sum = load(scores + x), other{};
    for (int d = 0; d < kDims; d += 2) {
      sum += weight[d] * load_float(keys + d * step + x);
      if (d + 1 < kDims) other += weight[d + 1] * load_float(keys + (d + 1) * step + x);
    }
    store(scores + x, sum + other);
  }
  for (; x < count; ++x)
    for (int d = 0; d < kDims; ++d) scores[x] += query[d] * static_cast<float>(keys[d * step + x]);
}

template <class T>
class Decoder {
 public:
  // `partial` (B · Hkv, runs, rows, width_ + 2), `width_` being value_width rounded up to kAlign: each row holds the
  // output before it is normalised, the maximum and the sum of a run. Rows are query heads of one key head times
  // queries.
  Decoder(const Decode& call, int64_t runs, float* partial)
      : call_(call),
        runs_(runs),
        rows_(call.heads / call.key_heads * call.queries),
        width_(round_up(call.value_width, kAlign)),
        partial_(partial),
        query_(rows_ * call.rank),
        scores_(rows_ * kRun),
        values_(kValueRun * width_),
        kept_(rows_ * kValueRun) {}

  static int64_t partial_row(const Decode& call) { return round_up(call.value_width, kAlign) + 2; }

  void operator()(int64_t task) {
    const int64_t head = task / runs_, run = task % runs_, b = head / call_.key_heads, kv = head % call_.key_heads;
    const int64_t first = run * kRun, count = std::min(kRun, call_.key_length - first);
    const int64_t start = call_.key_start ? call_.key_start[b] : 0;
    if (rows_ == 0) return;
    for (int64_t row = 0; row < rows_; ++row) {
      read_query(b, kv, row);
      score_row(b, kv, start, first, count, row);
    }
    float* partial = partial_ + task * rows_ * partial_row(call_);
    softmax(count, partial);
    const View* values = call_.value_levels;
    for (int64_t l = 0, column = 0; l < call_.levels; column += call_.value_widths[l++])
      if (call_.value_widths[l]) add_values(b, kv, l, start, first, count, values[l], partial + column);
  }

 private:
  void read_query(int64_t b, int64_t kv, int64_t row) {
    const int64_t h = kv * (rows_ / call_.queries) + row / call_.queries;
    read_row(at<const T>(call_.query, b, h, row % call_.queries, 0), call_.query.stride[3], call_.rank,
             query_ + row * call_.rank);
  }

  // Position of a row's query.
  int64_t position_of(int64_t start, int64_t row) const {
    return call_.key_length - call_.queries + row % call_.queries - start;
  }

  // Index of the first key that a level reaches from `position`.
  int64_t first_key(int64_t level, int64_t start, int64_t position) const {
    const Span reach = reach_of(call_.sizes[level], call_.by_window, std::max<int64_t>(position, 0));
    return start + std::max<int64_t>(reach.start, 0);
  }

  // Scores of a query against keys `first … first + count`, in base-2 logarithms.
  void score_row(int64_t b, int64_t kv, int64_t start, int64_t first, int64_t count, int64_t row) {
    const int64_t position = position_of(start, row);
    float* scores = scores_ + row * kRun;
    std::fill_n(scores, count, kHidden);
    if (position < 0) return;
    const auto within = [&](int64_t index) { return std::clamp<int64_t>(index - first, 0, count); };
    const auto edge = [&](int64_t level) { return within(first_key(level, start, position)); };
    const int64_t end = within(start + position + 1);
    if (edge(0) < end) std::fill(scores + edge(0), scores + end, 0.0f);
    const float* query = query_ + row * call_.rank;
    for (int64_t l = 0; l < call_.levels; query += call_.ranks[l++])
      if (edge(l) < end) add_level(b, kv, l, query, first + edge(l), end - edge(l), scores + edge(l));
    // Gains: keys from one level's edge to the next finer one's have that level as their finest.
    for (int64_t l = 0; l < call_.levels; ++l) {
      const int64_t next = l + 1 < call_.levels ? std::min(edge(l + 1), end) : end;
      const float factor = static_cast<float>(call_.scale * call_.gains[l]) * kLog2E;
      for (int64_t x = edge(l); x < next; ++x) scores[x] *= factor;
    }
  }

  void add_level(int64_t b, int64_t kv, int64_t level, const float* query, int64_t index, int64_t count,
                 float* scores) const {
    const View& keys = call_.key_levels[level];
    const T* from = at<const T>(keys, b, kv, 0, index - call_.level_starts[level]);
    const int64_t step = keys.stride[2];
    int64_t d = 0;
    for (; d + 8 <= call_.ranks[level]; d += 8) add_dimensions<8>(query + d, from + d * step, step, count, scores);
    for (; d + 2 <= call_.ranks[level]; d += 2) add_dimensions<2>(query + d, from + d * step, step, count, scores);
    for (; d < call_.ranks[level]; ++d) add_dimensions<1>(query + d, from + d * step, step, count, scores);
  }

  // Overwrites scores by probabilities; writes each row's maximum and sum, and zeros for its output.
  void softmax(int64_t count, float* partial) {
    const int64_t partial_row = Decoder::partial_row(call_);
    for (int64_t row = 0; row < rows_; ++row) {
      float* scores = scores_ + row * kRun;
      const int64_t stop = round_up(count, kLanes);
      std::fill_n(scores + count, stop - count, kHidden);
      Vec tops = splat(kHidden);
      for (int64_t x = 0; x < stop; x += kLanes) tops = max(tops, load(scores + x));
      const float top = reduce_max(tops);
      const Vec base = splat(top == kHidden ? 0.0f : top);
      Vec sum{};
      for (int64_t x = 0; x < stop; x += kLanes) {
        const Vec p = exp2(load(scores + x) - base);
        sum += p;
        store(scores + x, p);
      }
      std::fill_n(partial + row * partial_row, width_, 0.0f);
      partial[row * partial_row + width_] = top;
      partial[row * partial_row + width_ + 1] = reduce_add(sum);
    }
  }

  // Adds a level's dimensions of the values `first … first + count`, weighted by probabilities.
  void add_values(int64_t b, int64_t kv, int64_t level, int64_t start, int64_t first, int64_t count, const View& view,
                  float* partial) {
    const int64_t width = call_.value_widths[level];
    // The first query reaches farthest back, the last one least far.
    const int64_t from = std::max<int64_t>(first_key(level, start, position_of(start, 0)) - first, 0);
    const int64_t all_from = first_key(level, start, position_of(start, call_.queries - 1)) - first;
    for (int64_t x = from; x < count; x += kValueRun) {
      const int64_t keys = std::min(kValueRun, count - x);
      const T* source = at<const T>(view, b, kv, first + x - call_.level_starts[level], 0);
      const float* values = values_;
      int64_t value_row = width_;
      if (std::is_same_v<T, float> && view.stride[3] == 1) {
        values = reinterpret_cast<const float*>(source);
        value_row = view.stride[2];
      } else {
        for (int64_t k = 0; k < keys; ++k)
          read_row(source + k * view.stride[2], view.stride[3], width, values_ + k * width_);
      }
      const bool whole = level == 0 || x >= all_from;  // keys that level 1 does not reach have probability 0
      if (!whole) keep_reached(level, start, first, x, keys);
      const Left<float> weights = whole ? Left<float>{scores_ + x, kRun} : Left<float>{kept_, kValueRun};
      gemm(rows_, width, keys, weights, values, value_row, partial, Decoder::partial_row(call_), true);
    }
  }

  // Copies the probabilities of keys `x … x + keys` of a run, zero where the level does not reach.
  void keep_reached(int64_t level, int64_t start, int64_t first, int64_t x, int64_t keys) {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t edge = first_key(level, start, position_of(start, row)) - first - x;
      const int64_t hidden = std::clamp<int64_t>(edge, 0, keys);
      std::fill_n(kept_ + row * kValueRun, hidden, 0.0f);
      std::copy_n(scores_ + row * kRun + x + hidden, keys - hidden, kept_ + row * kValueRun + hidden);
    }
  }

  const Decode& call_;
  const int64_t runs_, rows_, width_;
  float* partial_;
  Buffer<float> query_, scores_, values_, kept_;
};

// Combines the runs of a key head into its output.
template <class T>
void combine_runs(const Decode& call, int64_t head, int64_t runs, const float* partial) {
  const int64_t group = call.heads / call.key_heads, rows = group * call.queries;
  const int64_t partial_row = Decoder<T>::partial_row(call), width = partial_row - 2;
  std::vector<float> out(call.value_width);
  for (int64_t row = 0; row < rows; ++row) {
    const auto run_at = [&](int64_t run) { return partial + ((head * runs + run) * rows + row) * partial_row; };
    float top = kHidden, total = 0;
    for (int64_t run = 0; run < runs; ++run) top = std::max(top, run_at(run)[width]);
    std::fill(out.begin(), out.end(), 0.0f);
    for (int64_t run = 0; top != kHidden && run < runs; ++run) {
      const float* from = run_at(run);
      const float weight = std::exp2(from[width] - top);
      if (weight == 0) continue;
      total += weight * from[width + 1];
      for (int64_t k = 0; k < call.value_width; ++k) out[k] += weight * from[k];
    }
    write_row(out.data(), call.value_width, total == 0 ? 0.0f : 1 / total,
              at<T>(call.out, head / call.key_heads, head % call.key_heads * group + row / call.queries,
                    row % call.queries, 0),
              call.out.stride[3]);
  }
}

template <class T>
void decode(const Decode& call) {
  const int64_t runs = (call.key_length + kRun - 1) / kRun, heads = call.batch * call.key_heads;
  const int64_t rows = call.heads / call.key_heads * call.queries;
  const Buffer<float> partial(heads * runs * rows * Decoder<T>::partial_row(call));
  const bool cheap = heads * rows * call.key_length * (call.rank + call.value_width) <= kCheap / 8;
  for_each_task(heads * runs, cheap, [&] { return Decoder<T>(call, runs, partial); });
  for_each_task(heads, cheap || heads * runs <= 1024,
                [&] { return [&](int64_t head) { combine_runs<T>(call, head, runs, partial); }; });
}

}  // namespace structattn
