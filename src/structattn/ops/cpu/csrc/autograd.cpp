// Derivatives of the operators of operator.py and decode.py for tensors on the CPU, as transforms.py defines them for
// all devices, but with no Python between autograd and the kernel. It needs torch's own C++ headers, which change from
// version to version: only a build from source has this file.
//
// The kernels are boxed: arguments stay on the stack they came on, so that a call without gradients is passed on as is.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

namespace structattn {
namespace {

using at::Tensor;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// The arguments of `mlr_attention` (schema.py): query, key, value, bias, three tensors without gradients, and options.
constexpr size_t kDifferentiable = 4, kTensors = 7;

bool needs_grad(const IValue& argument) {
  if (argument.isTensor()) return argument.toTensor().requires_grad();
  if (!argument.isTensorList()) return false;
  const std::vector<Tensor> tensors = argument.toTensorVector();
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return tensor.requires_grad(); });
}

// The arguments are the last on the stack; an interpreter has other values below them.
c10::ArrayRef<IValue> arguments_of(const OperatorHandle& op, const Stack& stack) {
  return torch::jit::last(stack, op.schema().arguments().size());
}

bool any_needs_grad(c10::ArrayRef<IValue> arguments) {
  return at::GradMode::is_enabled() && std::any_of(arguments.begin(), arguments.end(), needs_grad);
}

// Runs what lies below autograd: the arguments on the stack make way for the results.
void run_below(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

Tensor tensor_or_none(const IValue& argument) { return argument.isTensor() ? argument.toTensor() : Tensor(); }

std::optional<Tensor> if_defined(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// --- the first derivative ---

struct Attention : torch::autograd::Function<Attention> {
  static variable_list forward(AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value,
                               const std::optional<Tensor>& bias, const OperatorHandle& op, DispatchKeySet keys,
                               Stack* stack) {
    const std::vector<IValue> options(stack->begin() + kTensors, stack->end());
    variable_list saved{Tensor(), Tensor(), query, key, value, bias.value_or(Tensor())};
    for (size_t at = kDifferentiable; at < kTensors; ++at) saved.push_back(tensor_or_none((*stack)[at]));
    run_below(op, keys, stack);
    const Tensor out = (*stack)[0].toTensor(), lse = (*stack)[1].toTensor();
    saved[0] = out;
    saved[1] = lse;
    ctx->save_for_backward(saved);
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(options);
    ctx->set_materialize_grads(false);
    return {out};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kDifferentiable + 3);  // one for each argument of forward
    if (!grads[0].defined()) return result;
    const variable_list saved = ctx->get_saved_variables();
    const bool needs_bias_grad = saved[5].defined() && ctx->needs_input_grad(3);
    Stack stack{grads[0], saved[0], saved[1], needs_bias_grad};
    for (size_t at = 0; at < kTensors; ++at) stack.emplace_back(if_defined(saved[2 + at]));
    const auto& options = ctx->saved_data.at("options").toTupleRef().elements();
    stack.insert(stack.end(), options.begin(), options.end());
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("structattn::mlr_attention_backward", "");
    op.callBoxed(&stack);
    const std::vector<Tensor> computed = stack[0].toTensorVector();
    std::copy(computed.begin(), computed.end(), result.begin());
    return result;
  }
};

void mlr_attention(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  if (!any_needs_grad(arguments_of(op, *stack).slice(0, kDifferentiable))) return run_below(op, keys, stack);
  Stack own = torch::jit::pop(*stack, op.schema().arguments().size());
  const auto given = [&](size_t at) { return tensor_or_none(own[at]); };
  const variable_list results = Attention::apply(given(0), given(1), given(2), if_defined(given(3)), op, keys, &own);
  torch::jit::push(*stack, results[0], own[1]);  // log-sum-exp has no derivative
}

// --- derivatives that do not exist ---

// Results whose derivative raises when it is asked for.
struct NoDerivative : torch::autograd::Function<NoDerivative> {
  static variable_list forward(AutogradContext* ctx, at::TensorList, const OperatorHandle& op, DispatchKeySet keys,
                               Stack* stack) {
    ctx->saved_data["name"] = op.schema().name();
    run_below(op, keys, stack);
    return (*stack)[0].isTensor() ? variable_list{(*stack)[0].toTensor()} : (*stack)[0].toTensorVector();
  }

  static variable_list backward(AutogradContext* ctx, variable_list) {
    TORCH_CHECK(false, "Trying to backward through ", ctx->saved_data.at("name").toStringRef(),
                " but no autograd formula was registered.");
  }
};

// For an operator that returns one tensor or one list.
void without_derivative(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  if (!any_needs_grad(arguments_of(op, *stack))) return run_below(op, keys, stack);
  Stack own = torch::jit::pop(*stack, op.schema().arguments().size());
  variable_list inputs;
  for (const IValue& argument : own) {
    if (argument.isTensor()) inputs.push_back(argument.toTensor());
    if (!argument.isTensorList()) continue;
    for (const Tensor& tensor : argument.toTensorVector()) inputs.push_back(tensor);
  }
  variable_list results = NoDerivative::apply(at::TensorList(inputs), op, keys, &own);
  if (op.schema().returns()[0].type()->kind() == c10::TypeKind::ListType) torch::jit::push(*stack, std::move(results));
  else torch::jit::push(*stack, results[0]);
}

}  // namespace
}  // namespace structattn

TORCH_LIBRARY_IMPL(structattn, AutogradCPU, m) {
  m.impl("mlr_attention", torch::CppFunction::makeFromBoxedFunction<&structattn::mlr_attention>());
  for (const char* name : {"mlr_attention_backward", "mlr_decode"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&structattn::without_derivative>());
}
