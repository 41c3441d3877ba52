// The hierarchy of a call, read from the text form of `structattn.Hierarchy`. What Python checks is checked again:
// operators may be called with any text, and the kernel trusts these numbers.
#pragma once

#include <cstdint>
#include <locale>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace structattn {

// Raises ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  message.imbue(std::locale::classic());
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define STRUCTATTN_EXPECT(condition, ...)                \
  do {                                                   \
    if (!(condition)) ::structattn::refuse(__VA_ARGS__); \
  } while (false)

struct Hierarchy {
  std::vector<int64_t> ranks, sizes;  // sizes are blocks or windows; 0 is the whole sequence
  std::vector<int64_t> value_ranks;   // empty: level 1 owns all value dimensions
  std::vector<double> gains;
  bool by_window = false;
  int64_t rank = 0;

  int64_t levels() const { return static_cast<int64_t>(ranks.size()); }

  // Value dimensions that each level owns.
  std::vector<int64_t> value_widths(int64_t value_width) const {
    if (value_ranks.empty()) {
      std::vector<int64_t> widths(ranks.size());
      widths[0] = value_width;
      return widths;
    }
    const int64_t sum = std::accumulate(value_ranks.begin(), value_ranks.end(), int64_t{0});
    STRUCTATTN_EXPECT(sum == value_width, "value_ranks must sum to the values' width ", value_width, ", got ", sum);
    return value_ranks;
  }
};

namespace parsing {

// An integer of `least` or more, small enough that sums and positions do not overflow.
inline int64_t integer(const std::string& part, const std::string& text, int64_t least) {
  constexpr size_t kMostDigits = 15;
  const bool digits = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
  STRUCTATTN_EXPECT(digits && part.size() <= kMostDigits, "expected an integer, got '", part, "' in '", text, "'");
  const int64_t value = std::stoll(part);
  STRUCTATTN_EXPECT(value >= least, "expected at least ", least, ", got ", value, " in '", text, "'");
  return value;
}

inline double number(const std::string& part, const std::string& text) {
  std::istringstream stream(part);
  stream.imbue(std::locale::classic());
  double value;
  STRUCTATTN_EXPECT(stream >> value && stream.eof(), "expected a number, got '", part, "' in '", text, "'");
  return value;
}

inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char character : text) {
    if (character == separator) parts.emplace_back();
    else parts.back() += character;
  }
  return parts;
}

// What stands before `separator`, or everything; `text` keeps what comes after, and `found` tells whether it is there.
inline std::string take_until(std::string& text, char separator, bool& found) {
  const size_t at = text.find(separator);
  found = at != std::string::npos;
  const std::string before = text.substr(0, at);
  text = found ? text.substr(at + 1) : "";
  return before;
}

inline std::vector<int64_t> integers(const std::string& part, const std::string& text, int64_t least) {
  std::vector<int64_t> values;
  for (const std::string& each : split(part, '|'))
    values.push_back(each == "*" && least == 1 ? 0 : integer(each, text, least));
  return values;
}

// Blocks that halve from a context length.
inline std::vector<int64_t> dyadic_blocks(int64_t context, int64_t levels) {
  STRUCTATTN_EXPECT(levels <= 48, "expected at most 48 levels of blocks that halve, got ", levels);
  const int64_t finest = int64_t{1} << (levels - 1), smallest = (context + finest - 1) / finest;
  std::vector<int64_t> sizes{0};
  for (int64_t level = levels - 2; level >= 0; --level) sizes.push_back(smallest << level);
  return sizes;
}

inline void check_sizes(const Hierarchy& hierarchy, const std::string& text) {
  const std::vector<int64_t>& sizes = hierarchy.sizes;
  STRUCTATTN_EXPECT(sizes.size() == hierarchy.ranks.size(), "expected one block or window per level in '", text, "'");
  STRUCTATTN_EXPECT(hierarchy.by_window || sizes[0] == 0, "level 1 must reach the whole sequence in '", text, "'");
  for (size_t level = 1; level < sizes.size(); ++level) {
    const int64_t size = sizes[level], coarser = sizes[level - 1];
    const bool shrinks = coarser == 0 || (size < coarser && (hierarchy.by_window || coarser % size == 0));
    STRUCTATTN_EXPECT(size > 0 && shrinks, "blocks must shrink and nest, and windows shrink, in '", text, "'");
  }
}

// The form is RANKS[vVALUE_RANKS][@REACH][/GAINS] as `str(hierarchy)` writes it.
inline Hierarchy parse(const std::string& text) {
  Hierarchy hierarchy;
  bool has_gains, has_reach, has_values;
  std::string rest = text;
  std::string body = take_until(rest, '/', has_gains);
  const std::string gains = rest;
  std::string ranks = take_until(body, '@', has_reach);
  std::string reach = body;
  const std::string own_ranks = take_until(ranks, 'v', has_values);
  for (const std::string& each : split(own_ranks, '|')) hierarchy.ranks.push_back(integer(each, text, 1));
  hierarchy.rank = std::accumulate(hierarchy.ranks.begin(), hierarchy.ranks.end(), int64_t{0});
  if (has_values) hierarchy.value_ranks = ranks.empty() ? hierarchy.ranks : integers(ranks, text, 0);
  hierarchy.by_window = !reach.empty() && reach[0] == 'w';
  if (hierarchy.by_window) hierarchy.sizes = integers(reach.substr(1), text, 1);
  else if (!has_reach) hierarchy.sizes = {0};
  else hierarchy.sizes = integers(reach, text, 1);
  if (!hierarchy.by_window && hierarchy.sizes.size() == 1 && hierarchy.sizes[0])
    hierarchy.sizes = dyadic_blocks(hierarchy.sizes[0], hierarchy.levels());
  check_sizes(hierarchy, text);
  STRUCTATTN_EXPECT(hierarchy.value_ranks.empty() || hierarchy.value_ranks.size() == hierarchy.ranks.size(),
                    "expected one value rank per level in '", text, "'");
  if (has_gains && gains != "mean")
    for (const std::string& each : split(gains, '|')) hierarchy.gains.push_back(number(each, text));
  else
    for (int64_t depth = 1; depth <= hierarchy.levels(); ++depth)
      hierarchy.gains.push_back(has_gains ? 1.0 / static_cast<double>(depth) : 1.0);
  STRUCTATTN_EXPECT(hierarchy.gains.size() == hierarchy.ranks.size(), "expected one gain per level in '", text, "'");
  return hierarchy;
}

}  // namespace parsing

// The hierarchy that `text` describes, the inverse of Python's `str`; read once.
inline std::shared_ptr<const Hierarchy> hierarchy_of(const std::string& text) {
  constexpr size_t kMost = 256;
  static std::mutex mutex;
  static auto* known =
      new std::unordered_map<std::string, std::shared_ptr<const Hierarchy>>;  // as long as threads live
  const std::lock_guard lock(mutex);
  if (const auto found = known->find(text); found != known->end()) return found->second;
  auto hierarchy = std::make_shared<const Hierarchy>(parsing::parse(text));
  if (known->size() >= kMost) known->clear();
  known->emplace(text, hierarchy);
  return hierarchy;
}

}  // namespace structattn
