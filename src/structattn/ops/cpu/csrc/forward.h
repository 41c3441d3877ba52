// The forward pass: each task is one tile of queries of one head. It walks the keys tile by tile, with the running sum
// of softmax, so that memory is O(T). Score tiles have keys as rows, and the output is gathered transposed: products
// then fill whole vectors however few dimensions a level has.
#pragma once

#include <numeric>

#include "dropout.h"
#include "parallel.h"
#include "softmax.h"

namespace structattn {

// Keys and values of some heads, tile after tile, as left operands.
template <class T>
class PackedKeys {
 public:
  PackedKeys(const Call& call, const Plan& plan, int64_t heads)
      : call_(call),
        plan_(plan),
        columns_(Columns::of_keys(plan)),
        value_columns_(Columns::of_values(plan)),
        keys_(heads * plan.key_tiles * plan.key_stride * plan.rank),
        values_(heads * plan.key_tiles * plan.key_stride * plan.value_width),
        norms_(heads * plan.key_tiles) {}

  // A tile of keys (key_stride, rank), and the transpose of one of values (value_width, key_stride); `slot` counts
  // heads.
  Left<T> key(int64_t slot, int64_t tile) const {
    return {keys_ + (slot * plan_.key_tiles + tile) * plan_.key_stride * plan_.rank, plan_.rank};
  }
  Left<T> turned_value(int64_t slot, int64_t tile) const {
    const T* values = values_ + (slot * plan_.key_tiles + tile) * plan_.key_stride * plan_.value_width;
    if constexpr (std::is_same_v<T, float>) return {values, 1, plan_.value_width};
    else return {values, plan_.key_stride};
  }

  // The largest squared norm of a key of tiles `begin … end`.
  float largest_norm(int64_t slot, int64_t begin, int64_t end) const {
    const float* norms = norms_ + slot * plan_.key_tiles;
    return std::accumulate(norms + begin, norms + end, 0.0f, most);
  }

  class Packer {
   public:
    explicit Packer(const PackedKeys& keys, int64_t first_head)
        : keys_(keys),
          first_head_(first_head),
          rows_(kNarrow ? keys.plan_.key_stride * std::max(keys.plan_.rank, keys.plan_.value_width) : 0),
          turned_(kNarrow ? keys.plan_.key_stride * keys.plan_.value_width : 0) {}

    void operator()(int64_t task) {
      const Plan& plan = keys_.plan_;
      const int64_t slot = task / plan.key_tiles, index = task % plan.key_tiles;
      const int64_t b = (first_head_ + slot) / keys_.call_.key_heads, h = (first_head_ + slot) % keys_.call_.key_heads;
      const Row& row = plan.rows[b];
      const Tile tile = plan.key_tile(row, index);
      if (tile.count <= 0) return;
      const int64_t first = row.first_key + tile.first, stride = plan.key_stride;
      T* key = keys_.keys_ + task * stride * plan.rank;
      T* value = keys_.values_ + task * stride * plan.value_width;
      if constexpr (std::is_same_v<T, float>) {
        read_tile(keys_.call_.key, b, h, first, tile.count, stride, keys_.columns_, key);
        read_tile(keys_.call_.value, b, h, first, tile.count, stride, keys_.value_columns_, value);
        keys_.norms_[task] = largest_squared_norm(key, tile.count, plan.rank);
      } else {
        read_tile(keys_.call_.key, b, h, first, tile.count, stride, keys_.columns_, rows_);
        keys_.norms_[task] = largest_squared_norm(rows_, tile.count, plan.rank);
        to_left(rows_, stride, plan.rank, key);
        read_tile(keys_.call_.value, b, h, first, tile.count, stride, keys_.value_columns_, rows_);
        transpose(rows_, plan.value_width, stride, plan.value_width, turned_, stride);
        to_left(turned_, plan.value_width, stride, value);
      }
    }

   private:
    static constexpr bool kNarrow = !std::is_same_v<T, float>;

    const PackedKeys& keys_;
    int64_t first_head_;
    Buffer<float> rows_, turned_;  // for bfloat16 alone
  };

 private:
  const Call& call_;
  const Plan& plan_;
  Columns columns_, value_columns_;
  Buffer<T> keys_, values_;
  Buffer<float> norms_;  // of each tile
};

template <class T>
class Forward {
 public:
  Forward(const Call& call, const Plan& plan, const PackedKeys<T>& keys, int64_t first_head)
      : call_(call),
        plan_(plan),
        keys_(keys),
        first_head_(first_head),
        columns_(Columns::of_keys(plan)),
        value_columns_(Columns::of_values(plan)),
        dropout_(call),
        partial_(plan),
        scores_of_(call, plan, partial_),
        softmax_(plan),
        rows_(plan.query_stride * std::max(plan.rank, plan.value_width)),
        turned_(kNarrow ? plan.query_stride * plan.rank : 0),
        query_(plan.query_stride * plan.rank),
        scores_(plan.key_stride * plan.query_stride),
        probabilities_(kNarrow ? plan.key_stride * plan.query_stride : 0),
        out_(plan.query_stride * plan.value_width) {}

  // Tasks go through the heads, and within each through its query tiles from the last, which sees most keys.
  void operator()(int64_t task) {
    const int64_t group = call_.heads / call_.key_heads;
    const int64_t head = task / plan_.query_tiles, index = plan_.query_tiles - 1 - task % plan_.query_tiles;
    const int64_t slot = head / group, b = (first_head_ + slot) / call_.key_heads;
    const int64_t h = (first_head_ + slot) % call_.key_heads * group + head % group;
    const Row& row = plan_.rows[b];
    const Tile tile = plan_.query_tile(row, index);
    if (row.queries == 0 || tile.count <= 0) return;
    const int64_t query_index = row.first_query + tile.first - row.position;
    const float norm = load_query(b, h, query_index, tile);
    std::fill_n(out_.get(), plan_.query_stride * plan_.value_width, 0.0f);
    const Span seen = plan_.keys_seen(tile);
    const int64_t stop = (std::min(row.keys, seen.stop) + plan_.width - 1) / plan_.width;
    const int64_t begin = std::min(seen.start / plan_.width, stop);  // a window may lie behind the last key
    softmax_.start(scores_of_.bound(std::sqrt(norm * keys_.largest_norm(slot, begin, stop))));
    for (int64_t k = begin; k < stop; ++k)
      add_tile({b, h, row, tile, plan_.key_tile(row, k)}, keys_.key(slot, k), keys_.turned_value(slot, k));
    store_results(b, h, query_index, tile);
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<T, float>;

  // Returns the largest squared norm of a query.
  float load_query(int64_t b, int64_t h, int64_t query_index, Tile tile) {
    const int64_t stride = plan_.query_stride;
    read_tile(call_.query, b, h, query_index, tile.count, stride, columns_, rows_);
    float* turned = turned_;
    if constexpr (!kNarrow) turned = query_;
    transpose(rows_, plan_.rank, stride, plan_.rank, turned, stride);
    if constexpr (kNarrow) to_right(turned, plan_.rank, stride, query_.get());
    return largest_squared_norm(rows_, tile.count, plan_.rank);
  }

  // Adds a tile of keys to the running output and softmax.
  void add_tile(const Pair& pair, Left<T> key, Left<T> turned_value) {
    const TileDepth depth = plan_.tile_depth(pair.queries, pair.keys);
    // In bfloat16 products take whole tiles, see for_each_strip.
    const int64_t rows = kNarrow ? plan_.key_stride : pair.keys.count;
    const ScoreTile tile = scores_of_(pair, depth, rows, key, query_, scores_, plan_.query_stride);
    softmax_.adapt(scores_, tile, rows, out_);
    mix(pair, depth, rows, turned_value, probabilities_of(pair, tile, rows));
  }

  // Turns scores into probabilities, not yet divided by their sum: a right operand.
  const T* probabilities_of(const Pair& pair, ScoreTile tile, int64_t rows) {
    const int64_t stride = plan_.query_stride;
    const auto keep = [&](int64_t i, int64_t j, Vec a, Vec b) {
      store(scores_ + i * stride + j, a);
      if (i + 1 < rows) store(scores_ + (i + 1) * stride + j, b);
    };
    if constexpr (!kNarrow) {
      softmax_.powers(scores_, tile, rows, keep);
      if (dropout_.active()) dropout_.drop(pair, scores_, stride, 1.0f);
      return scores_;
    } else {
      if (dropout_.active()) {
        softmax_.powers(scores_, tile, rows, keep);
        dropout_.drop(pair, scores_, stride, 1.0f);
        to_right(scores_, rows, stride, probabilities_.get());
      } else {
        softmax_.powers(scores_, tile, rows, [&](int64_t i, int64_t j, Vec a, Vec b) {
          store_pairs(probabilities_ + i * stride + 2 * j, a, b);
        });
      }
      return probabilities_;
    }
  }

  // Adds the values of a tile, weighted by probabilities.
  void mix(const Pair& pair, const TileDepth& depth, int64_t rows, Left<T> turned_value, const T* probabilities) {
    const int64_t stride = plan_.query_stride, width = plan_.levels[depth.all - 1].value.prefix;
    for_each_strip<T>(plan_, pair, is_cut(plan_, pair), rows, [&](int64_t i, int64_t strip, Span seen) {
      const T* weights = probabilities + i * stride + kPaired<T> * seen.start;
      if (width)
        gemm(width, seen.stop - seen.start, strip, turned_value.at(0, i), weights, stride, out_ + seen.start, stride,
             true);
    });
    for (int64_t l = depth.all; l < depth.some; ++l) {
      const Level& level = plan_.levels[l];
      partial_.add_to_columns(level, level.value, pair.keys, pair.queries, turned_value, {probabilities, stride}, out_);
    }
  }

  void store_results(int64_t b, int64_t h, int64_t query_index, Tile tile) {
    const int64_t stride = plan_.query_stride, width = plan_.value_width;
    float* lse = call_.lse + (b * call_.heads + h) * call_.query_length + query_index;
    transpose(out_, stride, width, stride, rows_, width);
    for (int64_t i = 0; i < tile.count; ++i) {
      lse[i] = softmax_.lse(i);
      const float total = softmax_.total(i);
      const Vec factor = splat(total == 0 ? 0.0f : dropout_.rescale() / total);
      float* out = rows_ + i * width;
      for (int64_t j = 0; j < width; j += kLanes) store(out + j, load(out + j) * factor);
    }
    write_tile(call_.out, b, h, query_index, tile.count, value_columns_, rows_, 1.0f);
  }

  const Call& call_;
  const Plan& plan_;
  const PackedKeys<T>& keys_;
  const int64_t first_head_;
  const Columns columns_, value_columns_;
  const Dropout dropout_;
  PartialProducts<T> partial_;
  Scores<T> scores_of_;
  Softmax softmax_;
  Buffer<float> rows_, turned_;
  Buffer<T> query_;  // transposed, a right operand
  Buffer<float> scores_;
  Buffer<T> probabilities_;
  Buffer<float> out_;  // transposed
};

// Zeros and +inf for queries that stand before their row's first key.
inline void clear_padding(const Call& call, const Plan& plan) {
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t count = plan.rows[b].first_query;
      std::fill_n(call.lse + (b * call.heads + h) * call.query_length, count, -kHidden);
      const Columns columns{{{0, call.value_width, 0}}, 0};
      const std::vector<float> zeros(call.value_width);
      write_tile(call.out, b, h, 0, count, columns, zeros.data(), 1.0f);
    }
}

template <class T>
void forward(const Call& call) {
  const Plan plan(call, std::is_same_v<T, float> ? 1 : 2);
  clear_padding(call, plan);
  const int64_t all_heads = call.batch * call.key_heads, group = call.heads / call.key_heads;
  const int64_t per_head = plan.key_tiles * plan.key_stride * (plan.rank + plan.value_width) * sizeof(T);
  const int64_t heads = heads_per_wave(all_heads, per_head);
  const PackedKeys<T> keys(call, plan, heads);
  const bool cheap = is_cheap(call);
  for (int64_t first = 0; first < all_heads; first += heads) {
    const int64_t count = std::min(heads, all_heads - first);
    for_each_task(count * plan.key_tiles, cheap, [&] { return typename PackedKeys<T>::Packer(keys, first); });
    for_each_task(count * group * plan.query_tiles, cheap, [&] { return Forward<T>(call, plan, keys, first); });
  }
}

}  // namespace structattn
