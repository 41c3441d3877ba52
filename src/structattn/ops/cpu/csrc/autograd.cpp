// Derivatives of the operators of operator.py and decode.py for tensors on the CPU, as transforms.py defines them for
// all devices, but with no Python between autograd and the kernel. It needs torch's own C++ headers, which change from
// version to version: only a build from source has this file.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace structattn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using OutputAndLse = std::tuple<Tensor, Tensor>;
using Tensors = std::vector<Tensor>;
using Text = std::string_view;

#define PARAMETERS                                                                                                  \
  const Tensor &query, const Tensor &key, const Tensor &value, const MaybeTensor &bias,                             \
      const MaybeTensor &key_start, const MaybeTensor &key_end, const MaybeTensor &seed, Text hierarchy,            \
      bool is_causal, double scale, c10::SymInt query_offset, double dropout_p, Text backend
#define ARGUMENTS                                                                                                   \
  query, key, value, bias, key_start, key_end, seed, hierarchy, is_causal, scale, query_offset, dropout_p, backend
#define BACKWARD_PARAMETERS const Tensor &grad_out, const Tensor &out, const Tensor &lse, bool needs_bias_grad, PARAMETERS
#define BACKWARD_ARGUMENTS grad_out, out, lse, needs_bias_grad, ARGUMENTS
#define DECODE_PARAMETERS                                                                                           \
  const Tensor &query, at::TensorList key_levels, at::TensorList value_levels, const MaybeTensor &key_start,        \
      Text hierarchy, c10::SymInt key_length, c10::SymIntArrayRef level_starts, double scale, Text backend
#define DECODE_ARGUMENTS query, key_levels, value_levels, key_start, hierarchy, key_length, level_starts, scale, backend

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const auto& attention() {
  static const auto found = find<OutputAndLse(PARAMETERS)>("structattn::mlr_attention");
  return found;
}

const auto& attention_backward() {
  static const auto found = find<Tensors(BACKWARD_PARAMETERS)>("structattn::mlr_attention_backward");
  return found;
}

const auto& decode() {
  static const auto found = find<Tensor(DECODE_PARAMETERS)>("structattn::mlr_decode");
  return found;
}

bool needs_grad(const Tensor& tensor) { return tensor.requires_grad(); }
bool needs_grad(const MaybeTensor& tensor) { return tensor && tensor->defined() && tensor->requires_grad(); }
bool needs_grad(at::TensorList tensors) {
  for (const Tensor& tensor : tensors)
    if (tensor.requires_grad()) return true;
  return false;
}

template <class... Inputs>
bool any_needs_grad(const Inputs&... inputs) {
  return at::GradMode::is_enabled() && (needs_grad(inputs) || ...);
}

constexpr c10::DispatchKeySet after_autograd(c10::DispatchKeySet keys) { return keys & c10::after_autograd_keyset; }

// --- the first derivative ---------------------------------------------------------------------------------------------

struct Attention : torch::autograd::Function<Attention> {
  static constexpr int64_t kArguments = 14;  // of forward

  static variable_list forward(AutogradContext* ctx, c10::DispatchKeySet keys, PARAMETERS) {
    auto [out, lse] = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return attention().redispatch(after_autograd(keys), ARGUMENTS);
    }();
    const auto or_none = [](const MaybeTensor& tensor) { return tensor.value_or(Tensor()); };
    ctx->save_for_backward({out, lse, query, key, value, or_none(bias), or_none(key_start), or_none(key_end), or_none(seed)});
    ctx->mark_non_differentiable({lse});
    ctx->set_materialize_grads(false);
    auto& saved = ctx->saved_data;
    saved["hierarchy"] = std::string(hierarchy);
    saved["is_causal"] = is_causal;
    saved["scale"] = scale;
    saved["query_offset"] = query_offset;
    saved["dropout_p"] = dropout_p;
    saved["backend"] = std::string(backend);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kArguments);
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const auto maybe = [&](size_t at) { return saved[at].defined() ? MaybeTensor(saved[at]) : std::nullopt; };
    const MaybeTensor bias = maybe(5);
    const auto& options = ctx->saved_data;
    // The inputs that may require gradients are query, key, value and, where there is one, the bias.
    const Tensors computed = attention_backward().call(
        grads[0], saved[0], saved[1], bias && ctx->needs_input_grad(3), saved[2], saved[3], saved[4], bias, maybe(6), maybe(7),
        maybe(8), options.at("hierarchy").toStringView(), options.at("is_causal").toBool(), options.at("scale").toDouble(),
        options.at("query_offset").toSymInt(), options.at("dropout_p").toDouble(), options.at("backend").toStringView());
    std::copy(computed.begin(), computed.end(), result.begin() + 1);  // after the dispatch keys
    return result;
  }
};

OutputAndLse mlr_attention(c10::DispatchKeySet keys, PARAMETERS) {
  if (any_needs_grad(query, key, value, bias)) {
    const variable_list results = Attention::apply(keys, ARGUMENTS);
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return attention().redispatch(after_autograd(keys), ARGUMENTS);
}

// --- derivatives that do not exist ------------------------------------------------------------------------------------

// Results whose derivative raises when it is asked for.
struct NoDerivative : torch::autograd::Function<NoDerivative> {
  template <class Compute>
  static variable_list forward(AutogradContext* ctx, at::TensorList, const char* name, const Compute& compute) {
    ctx->saved_data["name"] = std::string(name);
    return compute();
  }

  static variable_list backward(AutogradContext* ctx, variable_list) {
    TORCH_CHECK(false, "Trying to backward through ", ctx->saved_data.at("name").toStringRef(),
                " but no autograd formula was registered.");
  }
};

Tensors mlr_attention_backward(c10::DispatchKeySet keys, BACKWARD_PARAMETERS) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return attention_backward().redispatch(after_autograd(keys), BACKWARD_ARGUMENTS);
  };
  if (!any_needs_grad(grad_out, out, lse, query, key, value, bias)) return compute();
  Tensors inputs{grad_out, out, lse, query, key, value};
  if (bias) inputs.push_back(*bias);
  return NoDerivative::apply(at::TensorList(inputs), "structattn::mlr_attention_backward", compute);
}

Tensor mlr_decode(c10::DispatchKeySet keys, DECODE_PARAMETERS) {
  const auto compute = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return Tensors{decode().redispatch(after_autograd(keys), DECODE_ARGUMENTS)};
  };
  if (!any_needs_grad(query, key_levels, value_levels)) return compute()[0];
  Tensors inputs{query};
  inputs.insert(inputs.end(), key_levels.begin(), key_levels.end());
  inputs.insert(inputs.end(), value_levels.begin(), value_levels.end());
  return NoDerivative::apply(at::TensorList(inputs), "structattn::mlr_decode", compute)[0];
}

}  // namespace
}  // namespace structattn

TORCH_LIBRARY_IMPL(structattn, AutogradCPU, m) {
  m.impl("mlr_attention", TORCH_FN(structattn::mlr_attention));
  m.impl("mlr_attention_backward", TORCH_FN(structattn::mlr_attention_backward));
  m.impl("mlr_decode", TORCH_FN(structattn::mlr_decode));
}
