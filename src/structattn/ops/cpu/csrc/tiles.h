// Geometry: how the score matrix is cut into tiles, and which levels two tiles share.
//
// Positions count from a row's first valid key. A tile is a run of at most `width` positions that starts at a multiple
// of it (a row's first query tile may start later). By block, tiles nest in the blocks of coarse levels wherever a
// divisor lets them, so that a pair of tiles has one depth. Where the depth differs within a pair of tiles, the levels
// beyond the common prefix are partial (partial.h).
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace structattn {

constexpr int64_t kMostTile = 64;
// Distances between tiles in memory are whole vectors, whatever the machine's width.
constexpr int64_t kAlign = 16;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// From `start` up to `stop`.
struct Span {
  int64_t start, stop;

  // The part in `first … first + count`, counted from `first`.
  Span within(int64_t first, int64_t count) const {
    const int64_t from = std::clamp<int64_t>(start - first, 0, count);
    return {from, std::clamp<int64_t>(stop - first, from, count)};
  }
};

// A run of positions.
struct Tile {
  int64_t first, count;
  int64_t last() const { return first + count - 1; }
};

// Positions that a level of `size` reaches from `position`.
inline Span reach_of(int64_t size, bool by_window, int64_t position) {
  constexpr int64_t kFar = int64_t{1} << 62;
  if (!size) return {-kFar, kFar};
  if (by_window) return {position - size + 1, position + size};
  const int64_t first = position / size * size;
  return {first, first + size};
}

// The dimensions that a level owns.
struct Dims {
  int64_t column;  // first in the tensor
  int64_t width;   // how many
  int64_t packed;  // first in packed tiles
  int64_t prefix;  // packed dimensions of this level and all coarser ones

  int64_t packed_width() const { return prefix - packed; }
};

struct Level {
  int64_t size;  // positions per block, or the window; 0: all
  bool by_window;
  Dims key, value;
  float gain;  // of pairs whose finest shared level this is

  Span reach(int64_t position) const { return reach_of(size, by_window, position); }
  // Columns that the level reaches from row i.
  Span columns(Tile rows, Tile columns, int64_t i) const {
    return i < rows.count ? reach(rows.first + i).within(columns.first, columns.count) : Span{0, 0};
  }
  bool reaches_all(Tile a, Tile b) const {
    return reach(a.last()).start <= b.first && b.last() < reach(a.first).stop;
  }
  bool reaches_some(Tile a, Tile b) const {
    return reach(a.first).start <= b.last() && b.first < reach(a.last()).stop;
  }
};

// One row of the batch without its padding: indices in the tensors, and the position of its first query.
struct Row {
  int64_t first_query, queries, first_key, keys, position;
};

// The levels that two tiles share.
struct TileDepth {
  int64_t all;      // number of levels that reach all visible pairs, at least 1
  int64_t some;     // number of levels that reach some; those in between are partial
  bool mixed_gain;  // some pairs have another gain than those of depth `all`
};

struct Plan {
  std::vector<Level> levels;
  std::vector<Row> rows;
  int64_t width;                     // positions per tile
  int64_t key_stride, query_stride;  // positions of a tile in memory
  int64_t rank;           // packed columns of query and key
  int64_t value_width;    // packed columns of value
  bool is_causal;
  int64_t query_tiles, key_tiles;  // the most that any row has

  // Levels are packed to multiples of `pair` columns: products in bfloat16 take pairs.
  Plan(const Call& call, int64_t pair);

  TileDepth tile_depth(Tile a, Tile b) const;

  // Keys that a tile of queries may see, and queries that may see a tile of keys.
  Span keys_seen(Tile queries) const {
    const int64_t start = levels[0].reach(queries.first).start, stop = levels[0].reach(queries.last()).stop;
    return {std::max<int64_t>(start, 0), is_causal ? queries.last() + 1 : stop};
  }
  Span queries_seeing(Tile keys) const {
    const int64_t start = levels[0].reach(keys.first).start, stop = levels[0].reach(keys.last()).stop;
    return {is_causal ? keys.first : std::max<int64_t>(start, 0), stop};
  }

  // Query tile `index` of a row, or one without positions where the row has no such tile.
  Tile query_tile(const Row& row, int64_t index) const {
    const int64_t at = (row.position / width + index) * width;
    const int64_t first = std::max(at, row.position);
    return {first, std::min(at + width, row.position + row.queries) - first};
  }
  Tile key_tile(const Row& row, int64_t index) const {
    return {index * width, std::min(width, row.keys - index * width)};
  }
};

// Positions per tile. By block: whole blocks of the coarsest level that fits kMostTile, as many as divide a block of
// the next coarser level; if no number above half of what fits divides it, as many as fit.
inline int64_t tile_width(const Call& call) {
  if (call.by_window) return kMostTile;
  int64_t base = 1, coarser = 0;
  for (int64_t l = 1; l < call.levels; ++l) {
    const int64_t block = call.sizes[l];
    if (block > kMostTile) coarser = block;
    else {
      base = block;
      break;
    }
  }
  const int64_t most = kMostTile / base;
  for (int64_t count = most; count > most / 2; --count)
    if (coarser % (base * count) == 0) return base * count;
  return base * most;
}

inline Plan::Plan(const Call& call, int64_t pair)
    : width(tile_width(call)),
      // One tile of a short sequence need not be padded to its whole width.
      key_stride(round_up(std::clamp<int64_t>(call.key_length, 1, width), kAlign)),
      query_stride(round_up(std::clamp<int64_t>(call.query_length, 1, width), kAlign)) {
  rank = value_width = 0;
  is_causal = call.is_causal;
  const auto add = [&](int64_t& column, int64_t& packed, int64_t width) {
    const Dims dims{column, width, packed, packed + round_up(width, pair)};
    column += width;
    packed = dims.prefix;
    return dims;
  };
  for (int64_t l = 0, column = 0, value_column = 0; l < call.levels; ++l) {
    const Dims key = add(column, rank, call.ranks[l]), value = add(value_column, value_width, call.value_widths[l]);
    levels.push_back({call.sizes[l], call.by_window != 0, key, value, static_cast<float>(call.gains[l])});
  }
  value_width = round_up(value_width, kAlign);
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t start = call.key_start ? call.key_start[b] : 0;
    const int64_t end = call.key_end ? call.key_end[b] : call.key_length;
    const int64_t first = std::min(std::max<int64_t>(start - call.query_offset, 0), call.query_length);
    rows.push_back({first, call.query_length - first, start, end - start, call.query_offset + first - start});
  }
  query_tiles = key_tiles = 0;
  for (const Row& row : rows) {
    const int64_t last = row.position + row.queries - 1;
    if (row.queries) query_tiles = std::max(query_tiles, last / width - row.position / width + 1);
    key_tiles = std::max(key_tiles, (row.keys + width - 1) / width);
  }
}

inline TileDepth Plan::tile_depth(Tile a, Tile b) const {
  const int64_t count = static_cast<int64_t>(levels.size());
  TileDepth shared{1, 1, false};  // pairs that level 1 does not reach are hidden
  while (shared.all < count && levels[shared.all].reaches_all(a, b)) ++shared.all;
  for (shared.some = shared.all; shared.some < count && levels[shared.some].reaches_some(a, b); ++shared.some)
    shared.mixed_gain |= levels[shared.some].gain != levels[shared.all - 1].gain;
  return shared;
}

}  // namespace structattn
