// The functions that Python calls. No exception crosses into C: a failure comes back as its message.
#include <cstdio>
#include <exception>

#include "backward.h"
#include "decode.h"
#include "forward.h"
#include "layout.h"

namespace {

// Runs body; returns false and writes what went wrong to `message` (1024 characters) where it throws.
template <class Body>
bool guarded(char* message, const Body& body) {
  try {
    body();
    return true;
  } catch (const std::exception& error) {
    std::snprintf(message, 1024, "%s", error.what());
    return false;
  }
}

// Products are taken in bfloat16 where the machine multiplies it (AMX, AVX512_BF16), else in float.
template <class Body>
void with_product_type(const structattn::Call& call, const Body& body) {
#if defined(__AVX512BF16__)
  if (call.query.dtype == structattn::kBFloat16) return body(structattn::BFloat16());
#endif
  (void)call;
  body(float());
}

}  // namespace

extern "C" {

const char* structattn_layout() {
  static const std::string text = structattn::layout();
  return text.c_str();
}

bool structattn_forward(const structattn::Call* call, char* message) {
  return guarded(message, [&] {
    with_product_type(*call, [&](auto type) { structattn::forward<decltype(type)>(*call); });
  });
}

bool structattn_backward(const structattn::Call* call, const structattn::Gradients* gradients, char* message) {
  return guarded(message, [&] {
    with_product_type(*call, [&](auto type) { structattn::backward<decltype(type)>(*call, *gradients); });
  });
}

bool structattn_decode(const structattn::Decode* call, char* message) {
  return guarded(message, [&] {
    structattn::with_dtype(call->query, [&](auto* type) {
      structattn::decode<std::remove_pointer_t<decltype(type)>>(*call);
    });
  });
}

}  // extern "C"
