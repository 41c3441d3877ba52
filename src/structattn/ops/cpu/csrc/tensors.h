// Tensors of PyTorch's stable ABI: checks, views for the kernel, and memory for results.
//
// The checks make every call safe. Python has checks of its own, whose messages name what a user passed; these here
// stand where a compiled graph, or anyone, calls an operator with no Python in between.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "call.h"
#include "hierarchy.h"

namespace structattn {

using torch::stable::Tensor;

// The kernel's number of a dtype, or -1 if it does not serve it.
inline int64_t dtype_of(const Tensor& tensor) {
  static const int32_t known[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  for (int64_t number : {kFloat32, kBFloat16, kFloat16})
    if (dtype == known[number]) return number;
  return -1;
}

// True for int64 alone.
inline bool is_integer(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype == aoti_torch_dtype_int64();
}

// Sizes as Python writes a tuple.
inline std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (const int64_t size : tensor.sizes()) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

inline void expect_on_cpu(const char* name, const Tensor& tensor) {
  STRUCTATTN_EXPECT(tensor.defined() && tensor.is_cpu(), name, " must be a tensor on the CPU");
}

// A tensor on the CPU of these sizes, of a dtype that the kernel serves; -1 stands for any size.
inline void expect_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  expect_on_cpu(name, tensor);
  STRUCTATTN_EXPECT(dtype_of(tensor) >= 0, name, " must be float32, bfloat16 or float16");
  const auto given = tensor.sizes();
  bool fits = given.size() == sizes.size();
  for (size_t axis = 0; fits && axis < sizes.size(); ++axis) {
    const int64_t wanted = sizes.begin()[axis];
    fits = wanted < 0 || given[axis] == wanted;
  }
  if (fits) return;
  std::string wanted;
  for (const int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  refuse(name, " must have shape (", wanted, "), got ", shape_of(tensor));
}

inline void expect_dtype_of(const char* name, const Tensor& tensor, const Tensor& query) {
  STRUCTATTN_EXPECT(dtype_of(tensor) == dtype_of(query), name, " must have the query's dtype");
}

inline View view_of(const Tensor& tensor) {
  View view{tensor.data_ptr(), dtype_of(tensor), {}};
  std::copy_n(tensor.strides().begin(), 4, view.stride);
  return view;
}

// The same with stride 0 along the axes of size 1, which broadcast.
inline View broadcast_view_of(const Tensor& tensor) {
  View view = view_of(tensor);
  for (int axis = 0; axis < 4; ++axis)
    if (tensor.size(axis) == 1) view.stride[axis] = 0;
  return view;
}

// Memory that nothing has written, or zeros, in the query's dtype or float32.
inline Tensor new_tensor(const Tensor& query, std::vector<int64_t> sizes, bool zeros = false, bool in_float32 = false) {
  int32_t dtype, layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(query.get(), &dtype));
  if (in_float32) dtype = aoti_torch_dtype_float32();
  const auto make = zeros ? &aoti_torch_aten_new_zeros : &aoti_torch_aten_new_empty;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(make(query.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, &layout,
                                     &device, 0, nullptr, &result));
  return Tensor(result);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// Integers (B), one after another in memory.
class Numbers {
 public:
  Numbers(const char* name, const std::optional<Tensor>& tensor, int64_t count) {
    if (!tensor) return;
    expect_on_cpu(name, *tensor);
    STRUCTATTN_EXPECT(is_integer(*tensor), name, " must be int64");
    STRUCTATTN_EXPECT(tensor->dim() == 1 && tensor->size(0) == count, name, " must have one entry per row, (", count,
                      ",), got ", shape_of(*tensor));
    const auto* from = static_cast<const int64_t*>(tensor->data_ptr());
    values_.reserve(count + 1);  // a row of none still has an address
    for (int64_t row = 0; row < count; ++row) values_.push_back(from[row * tensor->stride(0)]);
    given_ = true;
  }

  const int64_t* data() const { return given_ ? values_.data() : nullptr; }

 private:
  std::vector<int64_t> values_;
  bool given_ = false;
};

}  // namespace structattn
