// Geometry: how the score matrix is cut into tiles, and which levels two tiles share.
//
// Positions count from a row's first valid key. A tile is a run of at most `width` positions that starts at a multiple
// of it (a row's first query tile may start later). Tiles nest in the blocks of coarse levels wherever a divisor lets
// them, so that a pair of tiles has one depth; where none does, and in tiles wider than fine blocks, levels beyond the
// common prefix are added rectangle by rectangle.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace structattn {

constexpr int64_t kMostTile = 64;
// Distances between tiles in memory are whole vectors, whatever the machine's width.
constexpr int64_t kAlign = 16;

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Level {
  int64_t block;   // positions per block; 0: all
  int64_t column;  // first of its columns in query and key
  int64_t width;   // how many
  int64_t packed;  // first of its columns in packed tiles
  int64_t prefix;  // packed columns of this level and all coarser ones
  float gain;      // of pairs whose finest shared level this is

  int64_t block_of(int64_t position) const { return block ? position / block : 0; }
};

// A run of positions.
struct Tile {
  int64_t first, count;
  int64_t last() const { return first + count - 1; }
};

// One row of the batch without its padding: indices in the tensors, and the position of its first query.
struct Row {
  int64_t first_query, queries, first_key, keys, position;
};

// The depth of all pairs of two tiles, and whether some pairs are deeper.
struct TileDepth {
  int depth;        // number of levels that all pairs share
  bool mixed;       // some pairs share finer levels
  bool mixed_gain;  // and have another gain
};

struct Plan {
  std::vector<Level> levels;
  std::vector<Row> rows;
  int64_t width;          // positions per tile
  int64_t stride;         // distance between tiles in memory, in positions
  int64_t rank;           // packed columns of query and key
  int64_t value_width;    // packed columns of value
  int64_t query_tiles, key_tiles;  // the most that any row has

  // Levels are packed to multiples of `pair` columns: products in bfloat16 take pairs.
  Plan(const Call& call, int64_t pair);

  TileDepth tile_depth(Tile a, Tile b) const;

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

// Positions per tile: whole blocks of the coarsest level that fits kMostTile, as many as divide a block of the next
// coarser level; if no number above half of what fits divides it, as many as fit.
inline int64_t tile_width(const Call& call) {
  int64_t base = 1, coarser = 0;
  for (int64_t l = 1; l < call.levels; ++l) {
    const int64_t block = call.block_sizes[l];
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
      stride(round_up(std::min(width, std::max<int64_t>({call.query_length, call.key_length, 1})), kAlign)) {
  rank = 0;
  for (int64_t l = 0, column = 0; l < call.levels; ++l) {
    const int64_t packed = rank;
    rank += round_up(call.ranks[l], pair);
    levels.push_back({call.block_sizes[l], column, call.ranks[l], packed, rank, static_cast<float>(call.gains[l])});
    column += call.ranks[l];
  }
  value_width = round_up(call.value_width, kAlign);
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
  const int count = static_cast<int>(levels.size());
  const auto whole = [&](const Level& level) {
    const int64_t block = level.block_of(a.first);
    return block == level.block_of(a.last()) && block == level.block_of(b.first) && block == level.block_of(b.last());
  };
  int depth = 1;
  while (depth < count && whole(levels[depth])) ++depth;
  TileDepth shared{depth, false, false};
  if (depth < count) {
    const Level& next = levels[depth];
    const int64_t low = std::max(next.block_of(a.first), next.block_of(b.first));
    shared.mixed = low <= std::min(next.block_of(a.last()), next.block_of(b.last()));
    for (int finer = depth; shared.mixed && finer < count; ++finer)
      shared.mixed_gain |= levels[finer].gain != levels[depth - 1].gain;
  }
  return shared;
}

// Calls body(rows, columns), offsets into the tiles, for each block of a level that both tiles touch.
template <class Body>
void for_each_rectangle(const Level& level, Tile rows, Tile columns, const Body& body) {
  const int64_t first = std::max(level.block_of(rows.first), level.block_of(columns.first));
  const int64_t last = std::min(level.block_of(rows.last()), level.block_of(columns.last()));
  const auto within = [&](Tile tile, int64_t block) {
    const int64_t start = std::max(block * level.block, tile.first);
    const int64_t stop = std::min((block + 1) * level.block, tile.first + tile.count);
    return Tile{start - tile.first, stop - start};
  };
  for (int64_t block = first; block <= last; ++block) body(within(rows, block), within(columns, block));
}

}  // namespace structattn
