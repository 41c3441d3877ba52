// The operators of the CPU kernel, on PyTorch's stable ABI: one library serves every version of torch from 2.11 on.
//
// `structattn_cpu::attention`, `attention_backward` and `decode` are the kernel itself. The operators that users call,
// `structattn::mlr_attention` and the like (operator.py, decode.py), get a kernel for the CPU here. It serves float32,
// bfloat16 and float16, and hands other dtypes and other backends back to Python.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "arguments.h"
#include "backward.h"
#include "forward.h"

namespace structattn {
namespace {

// Products are taken in bfloat16 where the machine multiplies it (AMX, AVX512_BF16), else in float.
template <class Body>
void with_product_type(const Call& call, const Body& body) {
#if defined(__AVX512BF16__)
  if (call.query.dtype == kBFloat16) return body(BFloat16());
#endif
  (void)call;
  body(float());
}

using OutputAndLse = std::tuple<Tensor, Tensor>;

OutputAndLse attend(const AttentionArguments& arguments) {
  CheckedCall checked(arguments);
  const Call& call = checked.call;
  const Tensor out = new_tensor(arguments.query, {call.batch, call.heads, call.query_length, call.value_width});
  const Tensor lse = new_tensor(arguments.query, checked.lse_shape(), false, true);
  checked.set_results(out, lse);
  with_product_type(call, [&](auto type) { forward<decltype(type)>(call); });
  return {out, lse};
}

// The gradient of the bias: each head adds to a slice of its own, since threads take heads.
Tensor new_bias_grad(const Call& call, const Tensor& query, const Tensor& bias) {
  return new_tensor(query, {bias.size(0), call.heads, bias.size(2), bias.size(3)}, true, true);
}

Tensor sum_like(const Tensor& grad, const Tensor& bias) {
  const int64_t head_axis = 1;
  const Tensor sum = bias.size(1) == grad.size(1) ? grad : torch::stable::sum(grad, {{&head_axis, 1}}, true);
  return dtype_of(bias) == kFloat32 ? sum : torch::stable::to(sum, bias.scalar_type());
}

Tensors differentiate(const Tensor& grad_out, const Tensor& out, const Tensor& given_lse, bool needs_bias_grad,
                      const AttentionArguments& arguments) {
  CheckedCall checked(arguments);
  const Call& call = checked.call;
  for (const auto& [name, tensor] : {std::pair{"grad_out", &grad_out}, std::pair{"out", &out}})
    expect_shape(name, *tensor, {call.batch, call.heads, call.query_length, call.value_width});
  expect_shape("lse", given_lse, {call.batch, call.heads, call.query_length});
  STRUCTATTN_EXPECT(dtype_of(given_lse) == kFloat32, "lse must be float32");
  const Tensor lse = given_lse.is_contiguous() ? given_lse : torch::stable::contiguous(given_lse);
  checked.set_results(out, lse);
  // The kernel writes only the valid range of each row; padding has gradient 0.
  const bool padded = call.key_start || call.key_end || call.query_length == 0 || call.heads == 0;
  Tensors grads;
  for (const Tensor* tensor : {&arguments.query, &arguments.key, &arguments.value})
    grads.push_back(new_tensor(arguments.query, sizes_of(*tensor), padded));
  if (needs_bias_grad && arguments.bias) grads.push_back(new_bias_grad(call, arguments.query, *arguments.bias));
  Gradients gradients{view_of(grad_out), view_of(grads[0]), view_of(grads[1]), view_of(grads[2]), {}};
  if (grads.size() == 4) gradients.bias = broadcast_view_of(grads[3]);
  if (call.heads) with_product_type(call, [&](auto type) { backward<decltype(type)>(call, gradients); });
  if (grads.size() == 4) grads[3] = sum_like(grads[3], *arguments.bias);
  return grads;
}

Tensor attend_to_cache(const Tensor& query, const Tensors& key_levels, const Tensors& value_levels,
                       const MaybeTensor& key_start, const std::string& hierarchy, int64_t key_length,
                       const std::vector<int64_t>& level_starts, double scale) {
  CheckedDecode checked(query, key_levels, value_levels, key_start, hierarchy, key_length, level_starts, scale);
  Decode& call = checked.call;
  const Tensor out = new_tensor(query, {call.batch, call.heads, call.queries, call.value_width});
  call.out = view_of(out);
  with_dtype(call.query, [&](auto* type) { decode<std::remove_pointer_t<decltype(type)>>(call); });
  return out;
}

// --- operators ---

#define STRUCTATTN_ATTENTION_PARAMETERS                                                                                \
  const Tensor &query, const Tensor &key, const Tensor &value, const MaybeTensor &bias, const MaybeTensor &key_start,  \
      const MaybeTensor &key_end, const MaybeTensor &seed, const std::string &hierarchy, bool is_causal, double scale, \
      int64_t query_offset, double dropout_p
#define STRUCTATTN_ATTENTION_ARGUMENTS \
  query, key, value, bias, key_start, key_end, seed, hierarchy, is_causal, scale, query_offset, dropout_p
#define STRUCTATTN_DECODE_PARAMETERS                                                                         \
  const Tensor &query, const Tensors &key_levels, const Tensors &value_levels, const MaybeTensor &key_start, \
      const std::string &hierarchy, int64_t key_length, const std::vector<int64_t>&level_starts, double scale
#define STRUCTATTN_DECODE_ARGUMENTS \
  query, key_levels, value_levels, key_start, hierarchy, key_length, level_starts, scale

OutputAndLse attention_kernel(STRUCTATTN_ATTENTION_PARAMETERS) { return attend({STRUCTATTN_ATTENTION_ARGUMENTS}); }

Tensors backward_kernel(const Tensor& grad_out, const Tensor& out, const Tensor& lse, bool needs_bias_grad,
                        STRUCTATTN_ATTENTION_PARAMETERS) {
  return differentiate(grad_out, out, lse, needs_bias_grad, {STRUCTATTN_ATTENTION_ARGUMENTS});
}

Tensor decode_kernel(STRUCTATTN_DECODE_PARAMETERS) { return attend_to_cache(STRUCTATTN_DECODE_ARGUMENTS); }

// Sinks stand behind the windows of a hierarchy's text, `64v@w192+4/0.5`; a gain may be `1e+20`. Python serves them, by
// two calls of the kernel.
bool has_sinks(const std::string& hierarchy) { return hierarchy.find('+') < hierarchy.find('/'); }

bool serves(const Tensor& query, const std::string& hierarchy, const std::string& backend) {
  return (backend == "auto" || backend == "cpu") && dtype_of(query) >= 0 && !has_sinks(hierarchy);
}

// What the Python operator of that name returns. No exception crosses the stable ABI: its text comes as bytes, behind
// the results.
template <class... Arguments>
Tensors in_python(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  Tensors results = torch::stable::detail::to<Tensors>(stack[0]);
  const Tensor text = results.back();
  const std::string error(static_cast<const char*>(text.data_ptr()), text.numel());
  results.pop_back();
  const std::string value_error = "ValueError: ", runtime_error = "RuntimeError: ";
  if (error.rfind(value_error, 0) == 0) throw std::invalid_argument(error.substr(value_error.size()));
  if (error.rfind(runtime_error, 0) == 0) throw std::runtime_error(error.substr(runtime_error.size()));
  if (!error.empty()) throw std::runtime_error(error);
  return results;
}

OutputAndLse mlr_attention(STRUCTATTN_ATTENTION_PARAMETERS, const std::string& backend) {
  if (serves(query, hierarchy, backend)) return attend({STRUCTATTN_ATTENTION_ARGUMENTS});
  const Tensors results = in_python("structattn::mlr_attention_in_python", STRUCTATTN_ATTENTION_ARGUMENTS, backend);
  return {results.at(0), results.at(1)};
}

Tensors mlr_attention_backward(const Tensor& grad_out, const Tensor& out, const Tensor& lse, bool needs_bias_grad,
                               STRUCTATTN_ATTENTION_PARAMETERS, const std::string& backend) {
  if (serves(query, hierarchy, backend))
    return differentiate(grad_out, out, lse, needs_bias_grad, {STRUCTATTN_ATTENTION_ARGUMENTS});
  return in_python("structattn::mlr_attention_backward_in_python", grad_out, out, lse, needs_bias_grad,
                   STRUCTATTN_ATTENTION_ARGUMENTS, backend);
}

Tensor mlr_decode(STRUCTATTN_DECODE_PARAMETERS, const std::string& backend) {
  if (serves(query, hierarchy, backend)) return attend_to_cache(STRUCTATTN_DECODE_ARGUMENTS);
  return in_python("structattn::mlr_decode_in_python", STRUCTATTN_DECODE_ARGUMENTS, backend).at(0);
}

}  // namespace
}  // namespace structattn

#define STRUCTATTN_ATTENTION_SCHEMA                                                                          \
  "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_start, Tensor? key_end, Tensor? seed, " \
  "str hierarchy, bool is_causal, float scale, int query_offset, float dropout_p"

STABLE_TORCH_LIBRARY(structattn_cpu, m) {
  m.def("attention(" STRUCTATTN_ATTENTION_SCHEMA ") -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor grad_out, Tensor out, Tensor lse, bool needs_bias_grad, " STRUCTATTN_ATTENTION_SCHEMA
        ") -> Tensor[]");
  m.def(
      "decode(Tensor query, Tensor[] key_levels, Tensor[] value_levels, Tensor? key_start, str hierarchy, "
      "int key_length, int[] level_starts, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(structattn_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&structattn::attention_kernel));
  m.impl("attention_backward", TORCH_BOX(&structattn::backward_kernel));
  m.impl("decode", TORCH_BOX(&structattn::decode_kernel));
}

STABLE_TORCH_LIBRARY_IMPL(structattn, CPU, m) {
  m.impl("mlr_attention", TORCH_BOX(&structattn::mlr_attention));
  m.impl("mlr_attention_backward", TORCH_BOX(&structattn::mlr_attention_backward));
  m.impl("mlr_decode", TORCH_BOX(&structattn::mlr_decode));
}
