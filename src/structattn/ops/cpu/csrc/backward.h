// The backward pass: each task is a share of the key tiles of one key head. Score tiles have keys as rows, so that the
// gradients of keys and values gather in place while queries go by, and so that a query's maximum and sum lie along a
// vector. The gradient of queries is gathered transposed, one copy for each task that adds to it.
#pragma once

#include "dropout.h"
#include "parallel.h"
#include "scores.h"

namespace structattn {

// Tiles of queries per pass over a tile of keys.
constexpr int64_t kBackwardChunk = 4;

// Queries and output gradients of some heads in both right formats, log-sum-exp and delta of each query, and the
// gradient of queries so far.
template <class T>
struct PackedQueries {
  const Plan& plan;
  const int64_t shares;
  Buffer<T> query, query_turned, grad, grad_turned;
  Buffer<float> lse, delta;   // base-2 log-sum-exp, Σ grad_out · out; +inf and 0 in padding
  Buffer<float> query_grad;   // (shares, heads, tiles, rank, stride)
  int64_t heads;

  PackedQueries(const Plan& plan, int64_t heads, int64_t shares)
      : plan(plan),
        shares(shares),
        query(tiles(heads) * plan.rank),
        query_turned(tiles(heads) * plan.rank),
        grad(tiles(heads) * plan.value_width),
        grad_turned(tiles(heads) * plan.value_width),
        lse(tiles(heads)),
        delta(tiles(heads)),
        query_grad(shares * tiles(heads) * plan.rank),
        heads(heads) {}

  // Positions before tile `index` of head `slot`; times a width, the tile's place in memory.
  int64_t at(int64_t slot, int64_t index) const { return (slot * plan.query_tiles + index) * plan.query_stride; }
  float* query_grad_at(int64_t share, int64_t slot, int64_t index) const {
    return query_grad + (share * tiles(heads) + at(slot, index)) * plan.rank;
  }

 private:
  int64_t tiles(int64_t heads) const { return heads * plan.query_tiles * plan.query_stride; }
};

// The query tile of a task: tasks go through heads and, within each, through tiles.
struct QueryTask {
  int64_t slot, index, b, h;
  const Row& row;
  Tile tile;
  int64_t query_index;

  QueryTask(const Call& call, const Plan& plan, int64_t first_head, int64_t task)
      : slot(task / plan.query_tiles),
        index(task % plan.query_tiles),
        b((first_head + slot) / call.heads),
        h((first_head + slot) % call.heads),
        row(plan.rows[b]),
        tile(plan.query_tile(row, index)),
        query_index(row.first_query + tile.first - row.position) {
    if (row.queries == 0) tile.count = 0;
  }
};

template <class T>
class QueryPacker {
 public:
  QueryPacker(const Call& call, const Gradients& gradients, const Plan& plan, const PackedQueries<T>& packed,
              int64_t first_head)
      : call_(call),
        gradients_(gradients),
        plan_(plan),
        packed_(packed),
        first_head_(first_head),
        columns_(Columns::of_keys(plan)),
        value_columns_(Columns::of_values(plan)),
        out_(plan.query_stride * plan.value_width),
        floats_(kNarrow ? plan.query_stride * std::max(plan.rank, plan.value_width) : 0),
        turned_(kNarrow ? plan.query_stride * std::max(plan.rank, plan.value_width) : 0) {}

  void operator()(int64_t task) {
    const QueryTask at(call_, plan_, first_head_, task);
    if (at.tile.count <= 0) return;
    const int64_t place = packed_.at(at.slot, at.index), count = at.tile.count;
    pack(call_.query, at, columns_, packed_.query + place * plan_.rank, packed_.query_turned + place * plan_.rank);
    const float* grad = pack(gradients_.grad_out, at, value_columns_, packed_.grad + place * plan_.value_width,
                             packed_.grad_turned + place * plan_.value_width);
    read_tile(call_.out, at.b, at.h, at.query_index, count, plan_.query_stride, value_columns_, out_);
    const float* lse = call_.lse + (at.b * call_.heads + at.h) * call_.query_length + at.query_index;
    for (int64_t i = 0; i < plan_.query_stride; ++i) {
      packed_.lse[place + i] = i < count ? lse[i] * kLog2E : -kHidden;
      Vec sum{};
      for (int64_t j = 0; j < plan_.value_width; j += kLanes)
        sum += load(grad + i * plan_.value_width + j) * load(out_ + i * plan_.value_width + j);
      packed_.delta[place + i] = reduce_add(sum);
    }
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<T, float>;

  // Writes a tile of queries or their gradients, and its transpose, as right operands; returns it in float.
  const float* pack(const View& view, const QueryTask& at, const Columns& columns, T* right, T* turned) {
    const int64_t stride = plan_.query_stride, width = columns.packed;
    float *tile = floats_, *turned_tile = turned_;
    if constexpr (!kNarrow) tile = right, turned_tile = turned;
    read_tile(view, at.b, at.h, at.query_index, at.tile.count, stride, columns, tile);
    transpose(tile, width, stride, width, turned_tile, stride);
    if constexpr (kNarrow) {
      to_right(tile, stride, width, right);
      to_right(turned_tile, width, stride, turned);
    }
    return tile;
  }

  const Call& call_;
  const Gradients& gradients_;
  const Plan& plan_;
  const PackedQueries<T>& packed_;
  const int64_t first_head_;
  const Columns columns_, value_columns_;
  Buffer<float> out_, floats_, turned_;  // the last two for bfloat16 alone
};

template <class T>
class Backward {
 public:
  Backward(const Call& call, const Gradients& gradients, const Plan& plan, const PackedQueries<T>& packed,
           int64_t first_head)
      : call_(call),
        gradients_(gradients),
        plan_(plan),
        packed_(packed),
        first_head_(first_head),
        columns_(Columns::of_keys(plan)),
        value_columns_(Columns::of_values(plan)),
        dropout_(call),
        partial_(plan),
        scores_of_(call, plan, partial_),
        row_(kBackwardChunk * plan.query_stride + kAlign),
        floats_(kNarrow ? plan.key_stride * std::max(plan.rank, plan.value_width) : 0),
        turned_(kNarrow ? plan.key_stride * plan.rank : 0),
        key_(plan.key_stride * plan.rank),
        key_turned_(kNarrow ? plan.key_stride * plan.rank : 0),
        value_(plan.key_stride * plan.value_width),
        scores_(plan.key_stride * row_),
        score_grads_(plan.key_stride * row_),
        probabilities_(kNarrow ? plan.key_stride * row_ : 0),
        narrow_grads_(kNarrow ? plan.key_stride * row_ : 0),
        paired_grads_(kNarrow ? plan.key_stride * row_ : 0),
        key_grad_(plan.key_stride * plan.rank),
        value_grad_(plan.key_stride * plan.value_width) {}

  // A task is a share of the key tiles of a key head of this wave: every packed.shares-th, so that shares are even.
  void operator()(int64_t task) {
    const int64_t slot = task / packed_.shares, share = task % packed_.shares;
    const int64_t group = call_.heads / call_.key_heads;
    const int64_t head = first_head_ / group + slot, b = head / call_.key_heads, kv = head % call_.key_heads;
    const int64_t positions = group * plan_.query_tiles * plan_.query_stride;
    std::fill_n(packed_.query_grad_at(share, slot * group, 0), positions * plan_.rank, 0.0f);
    const Row& row = plan_.rows[b];
    for (int64_t index = share; index * plan_.width < row.keys; index += packed_.shares) {
      const Tile keys = plan_.key_tile(row, index);
      load_keys(b, kv, row, keys);
      std::fill_n(key_grad_.get(), plan_.key_stride * plan_.rank, 0.0f);
      std::fill_n(value_grad_.get(), plan_.key_stride * plan_.value_width, 0.0f);
      for (int64_t g = 0; g < group; ++g) add_head(b, kv * group + g, slot * group + g, share, row, keys);
      const int64_t first = row.first_key + keys.first;
      write_tile(gradients_.key, b, kv, first, keys.count, columns_, key_grad_, static_cast<float>(call_.scale));
      write_tile(gradients_.value, b, kv, first, keys.count, value_columns_, value_grad_, dropout_.rescale());
    }
  }

 private:
  static constexpr bool kNarrow = !std::is_same_v<T, float>;

  void load_keys(int64_t b, int64_t kv, const Row& row, Tile keys) {
    const int64_t first = row.first_key + keys.first;
    if constexpr (kNarrow) {
      read_tile(call_.key, b, kv, first, keys.count, plan_.key_stride, columns_, floats_);
      to_left(floats_, plan_.key_stride, plan_.rank, key_.get());
      transpose(floats_, plan_.rank, plan_.key_stride, plan_.rank, turned_, plan_.key_stride);
      to_left(turned_, plan_.rank, plan_.key_stride, key_turned_.get());
      read_tile(call_.value, b, kv, first, keys.count, plan_.key_stride, value_columns_, floats_);
      to_left(floats_, plan_.key_stride, plan_.value_width, value_.get());
    } else {
      read_tile(call_.key, b, kv, first, keys.count, plan_.key_stride, columns_, key_);
      read_tile(call_.value, b, kv, first, keys.count, plan_.key_stride, value_columns_, value_);
    }
  }

  // One query head against a tile of keys, in chunks of query tiles.
  void add_head(int64_t b, int64_t h, int64_t slot, int64_t share, const Row& row, Tile keys) {
    if (row.queries == 0) return;
    const int64_t origin = row.position / plan_.width;
    const Span seeing = plan_.queries_seeing(keys);
    const int64_t last = std::min(row.position + row.queries, seeing.stop) - 1;
    const int64_t end = last / plan_.width - origin + 1;
    const int64_t begin = std::max<int64_t>(seeing.start / plan_.width - origin, 0);
    for (int64_t first = begin; first < end; first += kBackwardChunk)
      add_chunk(b, h, slot, share, row, keys, first, std::min(kBackwardChunk, end - first));
  }

  void add_chunk(int64_t b, int64_t h, int64_t slot, int64_t share, const Row& row, Tile keys, int64_t first,
                 int64_t count) {
    const int64_t stride = plan_.query_stride, rows = kNarrow ? plan_.key_stride : keys.count;
    TileDepth depths[kBackwardChunk];
    for (int64_t s = 0; s < count; ++s) {
      const Pair pair{b, h, row, plan_.query_tile(row, first + s), keys};
      const int64_t place = packed_.at(slot, first + s);
      depths[s] = plan_.tile_depth(pair.queries, pair.keys);
      float* scores = scores_ + s * stride;
      float* grads = score_grads_ + s * stride;
      const Left<T> key{key_, plan_.rank};
      const T* query = packed_.query_turned + place * plan_.rank;
      const float factor = scores_of_(pair, depths[s], rows, key, query, scores, row_).factor;
      multiply_values(pair, depths[s], rows, packed_.grad_turned + place * plan_.value_width, grads);
      softmax_grad(pair, depths[s], rows, factor, packed_.lse + place, packed_.delta + place, s);
    }
    for (int64_t s = 0, next; s < count; s = next) {
      for (next = s + 1; next < count && depths[next].all == depths[s].all;) ++next;
      const Pair pair{b, h, row, plan_.query_tile(row, first + s), keys};
      add_shared(pair, depths[s], slot, share, rows, first, s, next);
    }
    for (int64_t s = 0; s < count; ++s)
      add_partial(keys, plan_.query_tile(row, first + s), depths[s], slot, share, first + s, s);
  }

  // The gradient of probabilities, 0 where a pair is hidden.
  void multiply_values(const Pair& pair, const TileDepth& shared, int64_t rows, const T* grad_turned, float* grads) {
    const int64_t stride = plan_.query_stride, prefix = plan_.levels[shared.all - 1].value.prefix;
    const Left<T> value{value_, plan_.value_width};
    for_each_strip<T>(plan_, pair, is_cut(plan_, pair), rows, [&](int64_t i, int64_t strip, Span seen) {
      if (!prefix) seen = {0, 0};
      for (int64_t k = i; k < i + strip; ++k) {
        std::fill_n(grads + k * row_, seen.start, 0.0f);
        std::fill(grads + k * row_ + seen.stop, grads + k * row_ + stride, 0.0f);
      }
      if (prefix)
        gemm(strip, seen.stop - seen.start, prefix, value.at(i, 0), grad_turned + kPaired<T> * seen.start, stride,
             grads + i * row_ + seen.start, row_, false);
    });
    for (int64_t l = shared.all; l < shared.some; ++l) {
      const Level& level = plan_.levels[l];
      partial_.add_products(level, level.value, pair.keys, pair.queries, value, grad_turned, {grads, row_});
    }
  }

  // Overwrites scores by probabilities, and the gradient of probabilities by that of scores.
  void softmax_grad(const Pair& pair, const TileDepth& shared, int64_t rows, float factor, const float* lse,
                    const float* delta, int64_t s) {
    const int64_t stride = plan_.query_stride;
    float* scores = scores_ + s * stride;
    float* grads = score_grads_ + s * stride;
    if (dropout_.active()) dropout_.drop(pair, grads, row_, dropout_.rescale());
    // Each pair's gain, unless it differs within the tile or the bias has to see the gradient before it.
    const bool apart = shared.mixed_gain || gradients_.bias.data;
    const float gain = apart ? 1.0f : plan_.levels[shared.all - 1].gain;
    if constexpr (kNarrow) {
      if (!apart && !dropout_.active()) {
        for_each_grad(scores, grads, rows, factor, gain, lse, delta,
                      [&](int64_t i, int64_t j, const Vec(&p)[2], const Vec(&grad)[2]) {
                        narrow(i, s * stride + j, p, grad);
                      });
        return;
      }
    }
    for_each_grad(scores, grads, rows, factor, gain, lse, delta,
                  [&](int64_t i, int64_t j, const Vec (&p)[2], const Vec (&grad)[2]) {
                    for (int64_t k = 0; k < std::min<int64_t>(2, rows - i); ++k) {
                      store(scores + (i + k) * row_ + j, p[k]);
                      store(grads + (i + k) * row_ + j, grad[k]);
                    }
                  });
    if (gradients_.bias.data) add_bias_grad(pair, grads);
    if (apart) scores_of_.multiply_gains(pair, shared, 1.0f, grads, row_);
    if (dropout_.active()) dropout_.drop(pair, scores, row_, 1.0f);
    if constexpr (kNarrow)
      for (int64_t i = 0; i < rows; i += 2)
        for (int64_t j = 0; j < stride; j += kLanes)
          narrow(i, s * stride + j, {load(scores + i * row_ + j), load(scores + (i + 1) * row_ + j)},
                 {load(grads + i * row_ + j), load(grads + (i + 1) * row_ + j)});
  }

  // Probabilities and gradients of scores, from scores and gradients of probabilities, two rows at a time:
  // body(first row, column, probabilities, gradients).
  template <class Body>
  void for_each_grad(const float* scores, const float* grads, int64_t rows, float factor, float gain, const float* lse,
                     const float* delta, const Body& body) const {
    for (int64_t j = 0; j < plan_.query_stride; j += kLanes) {
      const Vec shift = load(lse + j), mean = load(delta + j);
      for (int64_t i = 0; i < rows; i += 2) {
        Vec p[2] = {}, grad[2] = {};
        for (int64_t k = 0; k < 2 && i + k < rows; ++k) {
          p[k] = exp2(load(scores + (i + k) * row_ + j) * factor - shift);
          grad[k] = p[k] * (load(grads + (i + k) * row_ + j) - mean) * gain;
        }
        body(i, j, p, grad);
      }
    }
  }

  // Rounds probabilities and score gradients of two rows, from a column of the chunk on.
  void narrow(int64_t i, int64_t column, const Vec (&p)[2], const Vec (&grad)[2]) {
    if constexpr (kNarrow) {
      for (int64_t k = 0; k < 2; ++k) {
        store(probabilities_ + (i + k) * row_ + column, p[k]);
        store(narrow_grads_ + (i + k) * row_ + column, grad[k]);
      }
      store_pairs(paired_grads_ + i * row_ + 2 * column, grad[0], grad[1]);
    }
  }

  // Adds the products of tiles `from … to` of a chunk over the levels that all pairs share; `first_tile` is the
  // first's. Later tiles are taken whole: pairs that are hidden there have probability 0.
  void add_shared(const Pair& first_tile, const TileDepth& shared, int64_t slot, int64_t share, int64_t rows,
                  int64_t first, int64_t from, int64_t to) {
    const int64_t stride = plan_.query_stride, rank = plan_.rank, width = plan_.value_width;
    const Level& finest = plan_.levels[shared.all - 1];
    const int64_t prefix = finest.key.prefix, value_prefix = finest.value.prefix;
    for_each_strip<T>(plan_, first_tile, is_cut(plan_, first_tile), rows, [&](int64_t i, int64_t strip, Span seen) {
      const int64_t place = packed_.at(slot, first + from) + seen.start, inner = (to - from) * stride - seen.start;
      const int64_t first_pair = i * row_ + from * stride + seen.start;
      if (value_prefix)
        gemm(strip, value_prefix, inner, Left<T>{probabilities() + first_pair, row_}, packed_.grad + place * width,
             width, value_grad_ + i * width, width, true);
      gemm(strip, prefix, inner, Left<T>{grads() + first_pair, row_}, packed_.query + place * rank, rank,
           key_grad_ + i * rank, rank, true);
    });
    for (int64_t t = from; t < to; ++t)
      gemm(prefix, stride, rows, turned_key(), right_grads() + kPaired<T> * t * stride, row_,
           packed_.query_grad_at(share, slot, first + t), stride, true);
  }

  // Adds the products of query tile `index`, number s of a chunk, over the levels that some pairs share.
  void add_partial(Tile keys, Tile queries, const TileDepth& shared, int64_t slot, int64_t share, int64_t index,
                   int64_t s) {
    const int64_t place = packed_.at(slot, index), column = s * plan_.query_stride;
    for (int64_t l = shared.all; l < shared.some; ++l) {
      const Level& level = plan_.levels[l];
      partial_.add_to_rows(level, level.value, keys, queries, {probabilities() + column, row_},
                           {packed_.grad + place * plan_.value_width, plan_.value_width},
                           {value_grad_, plan_.value_width});
      partial_.add_to_rows(level, level.key, keys, queries, {grads() + column, row_},
                           {packed_.query + place * plan_.rank, plan_.rank}, {key_grad_, plan_.rank});
      partial_.add_to_columns(level, level.key, keys, queries, turned_key(),
                              {right_grads() + kPaired<T> * column, row_}, packed_.query_grad_at(share, slot, index));
    }
  }

  Left<T> turned_key() const {
    if constexpr (kNarrow) return {key_turned_, plan_.key_stride};
    else return {key_, 1, plan_.rank};
  }

  // Probabilities and gradients of scores as left operands, and the latter as right ones.
  const T* probabilities() const {
    if constexpr (kNarrow) return probabilities_;
    else return scores_;
  }
  const T* grads() const {
    if constexpr (kNarrow) return narrow_grads_;
    else return score_grads_;
  }
  const T* right_grads() const {
    if constexpr (kNarrow) return paired_grads_;
    else return score_grads_;
  }

  void add_bias_grad(const Pair& pair, const float* grads) const {
    const View& bias = gradients_.bias;
    float* to = at<float>(bias, pair.b, pair.h, pair.query_index(), pair.key_index());
    const int64_t key_step = bias.stride[3], query_step = bias.stride[2];
    double all = 0;  // numbers that share a place are summed first: one by one, each would be rounded to the whole sum
    for (int64_t i = 0; i < pair.keys.count; ++i) {
      const float* row = grads + i * row_;
      if (query_step != 0) {
        for (int64_t j = 0; j < pair.queries.count; ++j) to[i * key_step + j * query_step] += row[j];
        continue;
      }
      double sum = 0;
      for (int64_t j = 0; j < pair.queries.count; ++j) sum += row[j];
      if (key_step != 0) to[i * key_step] += static_cast<float>(sum);
      else all += sum;
    }
    to[0] += static_cast<float>(all);
  }

  const Call& call_;
  const Gradients& gradients_;
  const Plan& plan_;
  const PackedQueries<T>& packed_;
  const int64_t first_head_;  // query heads before this wave
  const Columns columns_, value_columns_;
  const Dropout dropout_;
  PartialProducts<T> partial_;
  Scores<T> scores_of_;
  const int64_t row_;
  Buffer<float> floats_, turned_;
  Buffer<T> key_, key_turned_, value_;  // all but key_ and value_ for bfloat16 alone
  Buffer<float> scores_, score_grads_;
  Buffer<T> probabilities_, narrow_grads_, paired_grads_;  // bfloat16 alone: as left operands, and the latter as right
  Buffer<float> key_grad_, value_grad_;
};

// Sums the shares of the gradient of queries, transposes the sum and writes it.
template <class T>
class QueryGradWriter {
 public:
  QueryGradWriter(const Call& call, const Gradients& gradients, const Plan& plan, const PackedQueries<T>& packed,
                  int64_t first_head)
      : call_(call),
        gradients_(gradients),
        plan_(plan),
        packed_(packed),
        first_head_(first_head),
        columns_(Columns::of_keys(plan)),
        rows_(plan.query_stride * plan.rank) {}

  void operator()(int64_t task) {
    const QueryTask at(call_, plan_, first_head_, task);
    if (at.tile.count <= 0) return;
    float* sum = packed_.query_grad_at(0, at.slot, at.index);
    for (int64_t share = 1; share < packed_.shares; ++share) {
      const float* other = packed_.query_grad_at(share, at.slot, at.index);
      for (int64_t i = 0; i < plan_.query_stride * plan_.rank; ++i) sum[i] += other[i];
    }
    transpose(sum, plan_.query_stride, plan_.rank, plan_.query_stride, rows_, plan_.rank);
    write_tile(gradients_.query, at.b, at.h, at.query_index, at.tile.count, columns_, rows_,
               static_cast<float>(call_.scale));
  }

 private:
  const Call& call_;
  const Gradients& gradients_;
  const Plan& plan_;
  const PackedQueries<T>& packed_;
  const int64_t first_head_;
  const Columns columns_;
  Buffer<float> rows_;
};

// Number of shares of each head's keys, so that no thread idles for long; each share costs a copy of query gradients.
inline int64_t shares_per_head(int64_t heads) {
  const int64_t threads = num_threads();
  int64_t shares = 1;
  const auto busy = [&](int64_t tasks) {
    return static_cast<double>(tasks) / static_cast<double>(round_up(tasks, threads));
  };
  while (shares < threads && busy(heads * shares) < 0.85) ++shares;
  return shares;
}

template <class T>
void backward(const Call& call, const Gradients& gradients) {
  const Plan plan(call, std::is_same_v<T, float> ? 1 : 2);
  const int64_t all_heads = call.batch * call.key_heads, group = call.heads / call.key_heads;
  const int64_t tile = plan.query_stride * group * plan.query_tiles;
  const View& bias = gradients.bias;
  // Tasks of one wave must not add to the same numbers of a bias: rows of the batch go one by one where it has one row,
  // and keys stay together where it has one column.
  const int64_t bytes = tile * (2 * (plan.rank + plan.value_width) * sizeof(T) + 4 * plan.rank);
  const int64_t heads = bias.data && bias.stride[0] == 0 ? call.key_heads : heads_per_wave(all_heads, bytes);
  const int64_t most_shares = bias.data && bias.stride[3] == 0 ? 1 : std::max<int64_t>(plan.key_tiles, 1);
  const int64_t shares = std::min(shares_per_head(heads), most_shares);
  const PackedQueries<T> packed(plan, heads * group, shares);
  const bool cheap = is_cheap(call);
  for (int64_t first = 0; first < all_heads; first += heads) {
    const int64_t count = std::min(heads, all_heads - first), tasks = count * group * plan.query_tiles;
    for_each_task(tasks, cheap, [&] { return QueryPacker<T>(call, gradients, plan, packed, first * group); });
    for_each_task(count * shares, cheap, [&] { return Backward<T>(call, gradients, plan, packed, first * group); });
    for_each_task(tasks, cheap, [&] { return QueryGradWriter<T>(call, gradients, plan, packed, first * group); });
  }
}

}  // namespace structattn
