// The arguments of a call as the kernel takes them: plain data, filled and checked by arguments.h.
#pragma once

#include <cstdint>

namespace structattn {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor of four axes; strides in elements, 0 where an axis is broadcast. `data` is null where there is none.
struct View {
  void* data;
  int64_t dtype;
  int64_t stride[4];
};

struct Call {
  View query, key, value, bias;  // (B, Hq, Tq, r), (B, Hkv, Tk, r), (B, Hkv, Tk, dv), (B, Hq, Tq, Tk)
  View out;                      // (B, Hq, Tq, dv): written by forward, read by backward
  float* lse;                    // (B, Hq, Tq), contiguous: likewise
  const int64_t *key_start, *key_end;  // (B), or null
  const int64_t *ranks, *sizes, *value_widths;  // (levels); sizes are blocks or windows, 0: the whole sequence
  const double* gains;                          // (levels)
  int64_t batch, heads, key_heads, query_length, key_length, rank, value_width, levels, by_window;
  int64_t query_offset, is_causal, seed;
  double scale, dropout_p;
};

struct Gradients {
  View grad_out, query, key, value;  // shapes as in Call; the last three are written
  View bias;                         // float32, added to; data is null where it is not asked for
};

}  // namespace structattn
