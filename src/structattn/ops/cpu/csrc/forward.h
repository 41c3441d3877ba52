// The forward pass: each task is one tile of queries of one head. It walks the keys in chunks of a few tiles, with the
// running maximum and sum of softmax, so that memory is O(T).
#pragma once

#include "dropout.h"
#include "parallel.h"
#include "scores.h"

namespace structattn {

// Tiles of keys per pass of softmax: enough to spread the cost of a pass, few enough to stay in cache.
constexpr int64_t kForwardChunk = 4;

// Keys (transposed) and values of some heads as right operands, tile after tile.
template <class T>
class PackedKeys {
 public:
  PackedKeys(const Call& call, const Plan& plan, int64_t heads)
      : call_(call),
        plan_(plan),
        columns_(Columns::of_keys(plan)),
        value_columns_(Columns::of_values(plan)),
        keys_(heads * plan.key_tiles * plan.stride * plan.rank),
        values_(heads * plan.key_tiles * plan.stride * plan.value_width) {}

  // Transposed right operand (rank, stride) and right operand (stride, value_width) of a tile; `slot` counts heads.
  T* key(int64_t slot, int64_t tile) const {
    return keys_ + (slot * plan_.key_tiles + tile) * plan_.stride * plan_.rank;
  }
  T* value(int64_t slot, int64_t tile) const {
    return values_ + (slot * plan_.key_tiles + tile) * plan_.stride * plan_.value_width;
  }

  class Packer {
   public:
    explicit Packer(const PackedKeys& keys, int64_t first_head)
        : keys_(keys),
          first_head_(first_head),
          rows_(keys.plan_.stride * std::max(keys.plan_.rank, keys.plan_.value_width)),
          turned_(keys.plan_.stride * keys.plan_.rank) {}

    void operator()(int64_t task) {
      const Plan& plan = keys_.plan_;
      const int64_t slot = task / plan.key_tiles, index = task % plan.key_tiles;
      const int64_t b = (first_head_ + slot) / keys_.call_.key_heads, h = (first_head_ + slot) % keys_.call_.key_heads;
      const Row& row = plan.rows[b];
      const Tile tile = plan.key_tile(row, index);
      if (tile.count <= 0) return;
      const int64_t first = row.first_key + tile.first;
      read_tile(keys_.call_.key, b, h, first, tile.count, plan.stride, keys_.columns_, rows_);
      if constexpr (std::is_same_v<T, float>) {
        transpose(rows_, plan.rank, plan.stride, plan.rank, keys_.key(slot, index), plan.stride);
        read_tile(keys_.call_.value, b, h, first, tile.count, plan.stride, keys_.value_columns_,
                  keys_.value(slot, index));
      } else {
        transpose(rows_, plan.rank, plan.stride, plan.rank, turned_, plan.stride);
        to_right(turned_, plan.rank, plan.stride, keys_.key(slot, index));
        read_tile(keys_.call_.value, b, h, first, tile.count, plan.stride, keys_.value_columns_, rows_);
        to_right(rows_, plan.stride, plan.value_width, keys_.value(slot, index));
      }
    }

   private:
    const PackedKeys& keys_;
    int64_t first_head_;
    Buffer<float> rows_, turned_;
  };

 private:
  const Call& call_;
  const Plan& plan_;
  Columns columns_, value_columns_;
  Buffer<T> keys_, values_;
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
        row_(kForwardChunk * plan.stride + kAlign),
        floats_(plan.stride * std::max(plan.rank, plan.value_width)),
        query_(plan.stride * plan.rank),
        scores_(plan.stride * row_),
        probabilities_(std::is_same_v<T, float> ? 0 : plan.stride * row_),
        out_(plan.stride * plan.value_width) {}

  // Tasks go through the heads, and within each through its query tiles from the last, whose rows are longest.
  void operator()(int64_t task) {
    const int64_t group = call_.heads / call_.key_heads;
    const int64_t head = task / plan_.query_tiles, index = plan_.query_tiles - 1 - task % plan_.query_tiles;
    const int64_t slot = head / group, b = (first_head_ + slot) / call_.key_heads;
    const int64_t h = (first_head_ + slot) % call_.key_heads * group + head % group;
    const Row& row = plan_.rows[b];
    const Tile tile = plan_.query_tile(row, index);
    if (row.queries == 0 || tile.count <= 0) return;
    // Products in bfloat16 always take whole tiles: each shape costs brgemm a compilation.
    const int64_t rows = std::is_same_v<T, float> ? tile.count : plan_.stride;
    const int64_t query_index = row.first_query + tile.first - row.position;
    load_query(b, h, query_index, tile, rows);
    std::fill_n(top_, kMostTile, kHidden);
    std::fill_n(total_, kMostTile, 0.0f);
    std::fill_n(out_.get(), plan_.stride * plan_.value_width, 0.0f);
    const Span seen = plan_.keys_seen(tile);
    const int64_t stop = (std::min(row.keys, seen.stop) + plan_.width - 1) / plan_.width;
    for (int64_t first = seen.start / plan_.width; first < stop; first += kForwardChunk)
      add_chunk(b, h, slot, row, tile, rows, first, std::min(kForwardChunk, stop - first));
    store_results(b, h, query_index, tile);
  }

 private:
  void load_query(int64_t b, int64_t h, int64_t query_index, Tile tile, int64_t rows) {
    if constexpr (std::is_same_v<T, float>) {
      read_tile(call_.query, b, h, query_index, tile.count, rows, columns_, query_);
    } else {
      read_tile(call_.query, b, h, query_index, tile.count, rows, columns_, floats_);
      to_left(floats_, rows, plan_.rank, query_.get());
    }
  }

  // Adds `count` tiles of keys from tile `first` on to the running output, maximum and sum.
  void add_chunk(int64_t b, int64_t h, int64_t slot, const Row& row, Tile queries, int64_t rows, int64_t first,
                 int64_t count) {
    float factors[kForwardChunk];
    TileDepth depths[kForwardChunk];
    for (int64_t k = 0; k < count; ++k) {
      const Pair pair{b, h, row, queries, plan_.key_tile(row, first + k), false};
      depths[k] = plan_.tile_depth(pair.queries, pair.keys);
      factors[k] =
          scores_of_(pair, depths[k], rows, query_, keys_.key(slot, first + k), scores_ + k * plan_.stride, row_);
    }
    T* probabilities;
    if constexpr (std::is_same_v<T, float>) probabilities = scores_;
    else probabilities = probabilities_;
    for (int64_t i = 0; i < rows; ++i)
      softmax_row(scores_ + i * row_, factors, count, probabilities + i * row_, i);
    if (dropout_.active()) drop(b, h, row, queries, first, count, probabilities);
    for (int64_t k = 0, next; k < count; k = next) {
      for (next = k + 1; next < count && depths[next].all == depths[k].all;) ++next;
      const Pair last{b, h, row, queries, plan_.key_tile(row, first + next - 1), false};
      mix_shared(last, depths[k], slot, rows, first + k, next - k, probabilities + k * plan_.stride);
    }
    for (int64_t k = 0; k < count; ++k)
      mix_partial(plan_.key_tile(row, first + k), queries, depths[k], keys_.value(slot, first + k),
                  probabilities + k * plan_.stride);
  }

  // Adds values of `count` tiles from tile `first` on, over the levels that all pairs share. A key after the last one
  // that a query of the last tile sees has probability 0.
  void mix_shared(const Pair& last, const TileDepth& shared, int64_t slot, int64_t rows, int64_t first, int64_t count,
                  const T* probabilities) {
    const int64_t before = (count - 1) * plan_.stride, width = plan_.levels[shared.all - 1].value.prefix;
    if (!width) return;
    for_each_strip<T>(plan_, last, is_cut(plan_, last), rows, [&](int64_t i, int64_t strip, Span seen) {
      gemm(strip, width, before + seen.stop, probabilities + i * row_, row_, keys_.value(slot, first),
           plan_.value_width, out_ + i * plan_.value_width, plan_.value_width, true);
    });
  }

  // Adds values of a tile over the levels that some pairs share.
  void mix_partial(Tile keys, Tile queries, const TileDepth& shared, const T* values, const T* probabilities) {
    for (int64_t l = shared.all; l < shared.some; ++l) {
      const Level& level = plan_.levels[l];
      partial_.add_to_rows(level, level.value, queries, keys, {probabilities, row_}, {values, plan_.value_width},
                           {out_, plan_.value_width});
    }
  }

  // Probabilities of row i relative to its running maximum; the output so far is scaled to a maximum that has grown.
  void softmax_row(const float* scores, const float* factors, int64_t count, T* probabilities, int64_t i) {
    Vec tops[2] = {splat(kHidden), splat(kHidden)};
    for (int64_t k = 0; k < count; ++k) {
      const Vec factor = splat(factors[k]);
      for (int64_t j = 0; j < plan_.stride; j += kLanes)
        tops[j / kLanes % 2] = max(tops[j / kLanes % 2], load(scores + k * plan_.stride + j) * factor);
    }
    const float top = std::max(top_[i], reduce_max(max(tops[0], tops[1])));
    const float base = top == kHidden ? 0.0f : top;
    const float decay = std::exp2(top_[i] - base);
    Vec totals[2] = {Vec{}, Vec{}};
    for (int64_t k = 0; k < count; ++k) {
      const Vec factor = splat(factors[k]), shift = splat(base);
      for (int64_t j = 0; j < plan_.stride; j += kLanes) {
        const Vec p = exp2(load(scores + k * plan_.stride + j) * factor - shift);
        totals[j / kLanes % 2] += p;
        store(probabilities + k * plan_.stride + j, p);
      }
    }
    total_[i] = total_[i] * decay + reduce_add(totals[0] + totals[1]);
    top_[i] = top;
    if (decay == 1) return;
    float* out = out_ + i * plan_.value_width;
    for (int64_t j = 0; j < plan_.value_width; j += kLanes) store(out + j, load(out + j) * splat(decay));
  }

  void drop(int64_t b, int64_t h, const Row& row, Tile queries, int64_t first, int64_t count, T* probabilities) const {
    uint32_t keys[kForwardChunk * kMostTile];
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = 0; j < plan_.stride; ++j)
        keys[k * plan_.stride + j] = Dropout::key_term(row.first_key + (first + k) * plan_.width + j);
    for (int64_t i = 0; i < queries.count; ++i) {
      const uint32_t query =
          dropout_.query_term(b * call_.heads + h, row.first_query + queries.first + i - row.position);
      T* p = probabilities + i * row_;
      for (int64_t j = 0; j < count * plan_.stride; ++j) p[j] = dropout_.keeps(query, keys[j]) ? p[j] : T(0.0f);
    }
  }

  void store_results(int64_t b, int64_t h, int64_t query_index, Tile tile) {
    float* lse = call_.lse + (b * call_.heads + h) * call_.query_length + query_index;
    for (int64_t i = 0; i < tile.count; ++i) {
      const bool empty = total_[i] == 0;
      lse[i] = empty ? -kHidden : (top_[i] + std::log2(total_[i])) / kLog2E;
      const Vec factor = splat(empty ? 0.0f : dropout_.rescale() / total_[i]);
      float* out = out_ + i * plan_.value_width;
      for (int64_t j = 0; j < plan_.value_width; j += kLanes) store(out + j, load(out + j) * factor);
    }
    write_tile(call_.out, b, h, query_index, tile.count, value_columns_, out_, 1.0f);
  }

  const Call& call_;
  const Plan& plan_;
  const PackedKeys<T>& keys_;
  const int64_t first_head_;
  const Columns columns_, value_columns_;
  const Dropout dropout_;
  PartialProducts<T> partial_;
  Scores<T> scores_of_;
  const int64_t row_;  // distance between rows of scores: not a power of two, which would crowd a few cache sets
  Buffer<float> floats_;
  Buffer<T> query_;
  Buffer<float> scores_;
  Buffer<T> probabilities_;
  Buffer<float> out_;
  float top_[kMostTile], total_[kMostTile];  // running maximum and sum, in base-2 logarithms
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
  const int64_t per_head = plan.key_tiles * plan.stride * (plan.rank + plan.value_width) * sizeof(T);
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
