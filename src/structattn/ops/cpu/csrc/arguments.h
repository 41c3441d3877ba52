// From the arguments of the operators to the structures of the kernel. Every number that the kernel trusts is checked.
#pragma once

#include "decode.h"
#include "tensors.h"

namespace structattn {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// The arguments of attention, in the order of `TENSORS` and `OPTIONS` in schema.py.
struct AttentionArguments {
  const Tensor &query, &key, &value;
  const MaybeTensor &bias, &key_start, &key_end, &seed;
  const std::string& hierarchy;
  bool is_causal;
  double scale;
  int64_t query_offset;
  double dropout_p;
};

// A checked call; it holds the numbers that `call` points to, and refers to the tensors.
class CheckedCall {
 public:
  explicit CheckedCall(const AttentionArguments& arguments) : given_(arguments) {
    check_tensors();
    hierarchy_ = hierarchy_of(given_.hierarchy);
    STRUCTATTN_EXPECT(hierarchy_->rank == given_.query.size(3), "the hierarchy's ranks must sum to the query's width ",
                      given_.query.size(3), ", got ", hierarchy_->rank);
    value_widths_ = hierarchy_->value_widths(given_.value.size(3));
    const int64_t queries = given_.query.size(2), keys = given_.key.size(2),
                  last = std::max<int64_t>(keys - queries, 0);
    STRUCTATTN_EXPECT(given_.query_offset >= 0 && given_.query_offset <= last, "query_offset must be between 0 and ",
                      last, ", got ", given_.query_offset);
    start_.emplace("key_start", given_.key_start, given_.query.size(0));
    end_.emplace("key_end", given_.key_end, given_.query.size(0));
    check_bounds(keys);
    fill();
  }
  CheckedCall(const CheckedCall&) = delete;
  CheckedCall& operator=(const CheckedCall&) = delete;

  Call call{};

  // Adds the tensors that forward writes and backward reads.
  void set_results(const Tensor& out, const Tensor& lse) {
    call.out = view_of(out);
    call.lse = static_cast<float*>(lse.data_ptr());
  }

  std::vector<int64_t> lse_shape() const { return {call.batch, call.heads, call.query_length}; }

 private:
  void check_tensors() const {
    expect_shape("query", given_.query, {-1, -1, -1, -1});
    const int64_t batch = given_.query.size(0), heads = given_.query.size(1), rank = given_.query.size(3);
    STRUCTATTN_EXPECT(rank > 0, "query must have a width of at least 1, got shape ", shape_of(given_.query));
    expect_shape("key", given_.key, {batch, -1, -1, rank});
    expect_dtype_of("key", given_.key, given_.query);
    const int64_t key_heads = given_.key.size(1), keys = given_.key.size(2);
    STRUCTATTN_EXPECT(key_heads > 0 && heads % key_heads == 0, "key heads must divide the query's ", heads,
                      " heads, got ", key_heads);
    expect_shape("value", given_.value, {batch, key_heads, keys, -1});
    expect_dtype_of("value", given_.value, given_.query);
    if (given_.bias) check_bias(*given_.bias);
    STRUCTATTN_EXPECT(given_.dropout_p >= 0 && given_.dropout_p < 1, "dropout_p must be at least 0 and below 1, got ",
                      given_.dropout_p);
    STRUCTATTN_EXPECT(given_.dropout_p == 0 || given_.seed, "dropout needs a seed");
    if (!given_.seed) return;
    expect_on_cpu("seed", *given_.seed);
    STRUCTATTN_EXPECT(is_integer(*given_.seed) && given_.seed->numel() == 1, "seed must be one int64");
  }

  void check_bias(const Tensor& bias) const {
    expect_shape("bias", bias, {-1, -1, -1, -1});
    STRUCTATTN_EXPECT(dtype_of(bias) == kFloat32 || dtype_of(bias) == dtype_of(given_.query),
                      "bias must be float32 or have the query's dtype");
    const int64_t full[4] = {given_.query.size(0), given_.query.size(1), given_.query.size(2), given_.key.size(2)};
    for (int axis = 0; axis < 4; ++axis)
      STRUCTATTN_EXPECT(bias.size(axis) == 1 || bias.size(axis) == full[axis], "bias must broadcast to (", full[0],
                        ", ", full[1], ", ", full[2], ", ", full[3], "), got ", shape_of(bias));
  }

  // The message is that of `check_key_bounds` in arguments.py: a compiled graph has it from here.
  void check_bounds(int64_t keys) const {
    if (!start_->data() && !end_->data()) return;
    for (int64_t row = 0; row < given_.query.size(0); ++row) {
      const int64_t start = start_->data() ? start_->data()[row] : 0, end = end_->data() ? end_->data()[row] : keys;
      STRUCTATTN_EXPECT(0 <= start && start <= end && end <= keys, "expected 0 <= key_start <= key_end <= Tk = ", keys,
                        " in every row, got key_start = ", start, ", key_end = ", end, " in row ", row);
    }
  }

  void fill() {
    call.query = view_of(given_.query);
    call.key = view_of(given_.key);
    call.value = view_of(given_.value);
    if (given_.bias) call.bias = broadcast_view_of(*given_.bias);
    call.key_start = start_->data();
    call.key_end = end_->data();
    call.ranks = hierarchy_->ranks.data();
    call.sizes = hierarchy_->sizes.data();
    call.value_widths = value_widths_.data();
    call.gains = hierarchy_->gains.data();
    call.batch = given_.query.size(0);
    call.heads = given_.query.size(1);
    call.key_heads = given_.key.size(1);
    call.query_length = given_.query.size(2);
    call.key_length = given_.key.size(2);
    call.rank = hierarchy_->rank;
    call.value_width = given_.value.size(3);
    call.levels = hierarchy_->levels();
    call.by_window = hierarchy_->by_window;
    call.query_offset = given_.query_offset;
    call.is_causal = given_.is_causal;
    call.seed = given_.seed ? *static_cast<const int64_t*>(given_.seed->data_ptr()) : 0;
    call.scale = given_.scale;
    call.dropout_p = given_.dropout_p;
  }

  const AttentionArguments& given_;
  std::shared_ptr<const Hierarchy> hierarchy_;
  std::vector<int64_t> value_widths_;
  std::optional<Numbers> start_, end_;
};

// A checked call of decode, likewise. Key buffers whose positions do not follow one another in memory are copied.
class CheckedDecode {
 public:
  CheckedDecode(const Tensor& query, const Tensors& key_levels, const Tensors& value_levels,
                const MaybeTensor& key_start, const std::string& hierarchy, int64_t key_length,
                const std::vector<int64_t>& level_starts, double scale)
      : hierarchy_(hierarchy_of(hierarchy)), keys_(key_levels), values_(value_levels), level_starts_(level_starts) {
    check_query(query, key_length);
    call.query = view_of(query);
    call.batch = query.size(0);
    call.heads = query.size(1);
    call.queries = query.size(2);
    call.rank = query.size(3);
    call.key_length = key_length;
    call.scale = scale;
    call.levels = hierarchy_->levels();
    call.by_window = hierarchy_->by_window;
    start_.emplace("key_start", key_start, call.batch);
    check_starts();
    check_levels(query);
    call.key_start = start_->data();
    call.key_levels = key_views_.data();
    call.value_levels = value_views_.data();
    call.level_starts = level_starts_.data();
    call.ranks = hierarchy_->ranks.data();
    call.sizes = hierarchy_->sizes.data();
    call.value_widths = value_widths_.data();
    call.gains = hierarchy_->gains.data();
  }
  CheckedDecode(const CheckedDecode&) = delete;
  CheckedDecode& operator=(const CheckedDecode&) = delete;

  Decode call{};

 private:
  void check_query(const Tensor& query, int64_t key_length) const {
    const auto levels = static_cast<size_t>(hierarchy_->levels());
    expect_shape("query", query, {-1, -1, -1, hierarchy_->rank});
    const bool one_value = values_.size() == 1;  // level 1 owns all value dimensions
    STRUCTATTN_EXPECT(
        keys_.size() == levels && (one_value || values_.size() == levels) && level_starts_.size() == levels,
        "key_levels, value_levels and level_starts must have one entry per level (", levels, ")");
    STRUCTATTN_EXPECT(key_length >= query.size(2), "key_length must be at least Tq = ", query.size(2), ", got ",
                      key_length);
    expect_shape("value_levels[0]", values_[0], {query.size(0), -1, -1, -1});
    const int64_t heads = query.size(1), key_heads = values_[0].size(1);
    STRUCTATTN_EXPECT(key_heads > 0 && heads % key_heads == 0, "key heads must divide the query's ", heads,
                      " heads, got ", key_heads);
  }

  // Each level has room for the keys from its start to `key_length`.
  void check_levels(const Tensor& query) {
    call.key_heads = values_[0].size(1);
    call.value_width = 0;
    for (const Tensor& values : values_) {
      expect_shape("value_levels", values, {call.batch, call.key_heads, -1, -1});
      call.value_width += values.size(3);
    }
    value_widths_ = hierarchy_->value_widths(call.value_width);
    for (size_t level = 0; level < keys_.size(); ++level) {
      Tensor& keys = keys_[level];
      const int64_t needed = call.key_length - level_starts_[level], width = value_widths_[level];
      expect_shape("key_levels", keys, {call.batch, call.key_heads, hierarchy_->ranks[level], -1});
      expect_dtype_of("key_levels", keys, query);
      STRUCTATTN_EXPECT(keys.size(3) >= needed, "key_levels[", level, "] must hold key_length - ", level_starts_[level],
                        " = ", needed, " tokens, got shape ", shape_of(keys));
      if (keys.stride(3) != 1) keys = torch::stable::contiguous(keys);
      key_views_.push_back(view_of(keys));
      if (level >= values_.size()) {
        STRUCTATTN_EXPECT(width == 0, "value_levels must have one entry per level, got one alone");
        value_views_.push_back({});
        continue;
      }
      const Tensor& values = values_[level];
      expect_dtype_of("value_levels", values, query);
      STRUCTATTN_EXPECT(values.size(3) == width && (width == 0 || values.size(2) >= needed), "value_levels[", level,
                        "] must have width ", width, " and hold ", needed, " tokens, got shape ", shape_of(values));
      value_views_.push_back(view_of(values));
    }
  }

  // Each level's buffers hold all that the first query reads; the messages are those of decode.py.
  void check_starts() const {
    const int64_t rows = start_->data() ? call.batch : 1;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t start = start_->data() ? start_->data()[row] : 0;
      STRUCTATTN_EXPECT(0 <= start && start <= call.key_length,
                        "key_start must be between 0 and key_length = ", call.key_length, ", got ", start, " in row ",
                        row);
      const int64_t position = std::max<int64_t>(call.key_length - call.queries - start, 0);
      for (int64_t level = 0; level < call.levels; ++level) {
        const Span reach = reach_of(hierarchy_->sizes[level], call.by_window, position);
        const int64_t needed = start + std::max<int64_t>(reach.start, 0), first = level_starts_[level];
        STRUCTATTN_EXPECT(0 <= first && first <= needed, "level_starts[", level, "] must be between 0 and ", needed,
                          ", the first key that the level reaches from the first query, got ", first, " in row ", row);
      }
    }
  }

  std::shared_ptr<const Hierarchy> hierarchy_;
  Tensors keys_;
  const Tensors& values_;
  std::vector<int64_t> level_starts_, value_widths_;
  std::vector<View> key_views_, value_views_;
  std::optional<Numbers> start_;
};

}  // namespace structattn
