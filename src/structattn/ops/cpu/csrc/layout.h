// A description of the structures that cross from Python. library.py writes the same lines for its own structures and
// compares them when it loads the library, so that a field added, moved or retyped on one side alone is an error.
//
// One line for each structure: name, size, then each field as name:type@offset. Types: i int64, d double, p pointer,
// v View, a array.
#pragma once

#include <cstddef>
#include <string>
#include <type_traits>

#include "call.h"
#include "decode.h"

namespace structattn {

template <class Field>
constexpr char field_type() {
  if (std::is_pointer_v<Field>) return 'p';
  if (std::is_array_v<Field>) return 'a';
  if (std::is_same_v<Field, View>) return 'v';
  return std::is_floating_point_v<Field> ? 'd' : 'i';
}

inline std::string layout() {
  std::string text;
#define BEGIN(name) { using S = name; text += #name " " + std::to_string(sizeof(S))
#define FIELD(name) \
  text += std::string(" " #name ":") + field_type<decltype(S::name)>() + "@" + std::to_string(offsetof(S, name))
#define END text += "\n"; }
  // clang-format off
  BEGIN(View);
    FIELD(data); FIELD(dtype); FIELD(stride);
  END
  BEGIN(Call);
    FIELD(query); FIELD(key); FIELD(value); FIELD(bias); FIELD(out); FIELD(lse); FIELD(key_start); FIELD(key_end);
    FIELD(ranks); FIELD(sizes); FIELD(value_widths); FIELD(gains); FIELD(batch); FIELD(heads); FIELD(key_heads);
    FIELD(query_length); FIELD(key_length); FIELD(rank); FIELD(value_width); FIELD(levels); FIELD(by_window);
    FIELD(query_offset); FIELD(is_causal);
    FIELD(seed); FIELD(scale); FIELD(dropout_p);
  END
  BEGIN(Gradients);
    FIELD(grad_out); FIELD(query); FIELD(key); FIELD(value); FIELD(bias);
  END
  BEGIN(Decode);
    FIELD(query); FIELD(out); FIELD(key_levels); FIELD(value_levels); FIELD(level_starts); FIELD(key_start);
    FIELD(ranks); FIELD(sizes); FIELD(value_widths); FIELD(gains); FIELD(batch); FIELD(heads); FIELD(key_heads);
    FIELD(queries); FIELD(key_length); FIELD(rank); FIELD(value_width); FIELD(levels); FIELD(by_window); FIELD(scale);
  END
  // clang-format on
#undef BEGIN
#undef FIELD
#undef END
  return text;
}

}  // namespace structattn
