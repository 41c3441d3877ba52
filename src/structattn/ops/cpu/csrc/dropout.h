// Which probabilities dropout keeps: the hash of ops/dropout.py, in 32-bit arithmetic.
#pragma once

#include "scores.h"

namespace structattn {

class Dropout {
 public:
  explicit Dropout(const Call& call)
      : threshold_(static_cast<uint32_t>(call.dropout_p * 4294967296.0)),
        rescale_(static_cast<float>(1.0 / (1.0 - call.dropout_p))),
        heads_(call.heads),
        state_(mix(mix(static_cast<uint32_t>(call.seed)) ^ static_cast<uint32_t>(call.seed >> 32))) {}

  bool active() const { return threshold_ > 0; }
  float rescale() const { return rescale_; }

  // Multiplies a score tile, rows `row` apart, by `factor`, and drops pairs.
  void drop(const Pair& pair, float* tile, int64_t row, float factor) const {
    uint32_t queries[kMostTile];
    for (int64_t j = 0; j < pair.queries.count; ++j)
      queries[j] = query_term(pair.b * heads_ + pair.h, pair.query_index() + j);
    for (int64_t i = 0; i < pair.keys.count; ++i) {
      const uint32_t key = key_term(pair.key_index() + i);
      for (int64_t j = 0; j < pair.queries.count; ++j)
        tile[i * row + j] = keeps(queries[j], key) ? tile[i * row + j] * factor : 0.0f;
    }
  }

 private:
  // The term of the hash for query `query` of head `batch_head`; key_term is that of a key.
  uint32_t query_term(int64_t batch_head, int64_t query) const {
    return mix(mix(state_ + static_cast<uint32_t>(batch_head) * 0x9E3779B9u) +
               static_cast<uint32_t>(query) * 0x85EBCA6Bu);
  }
  static uint32_t key_term(int64_t key) { return static_cast<uint32_t>(key) * 0xC2B2AE35u; }

  bool keeps(uint32_t query_term, uint32_t key_term) const { return mix(query_term + key_term) >= threshold_; }

  static uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  uint32_t threshold_;
  float rescale_;
  int64_t heads_;
  uint32_t state_;
};

}  // namespace structattn
