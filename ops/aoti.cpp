// Turns an operator's cpu.cpp, included after this file, into C functions that an AOTInductor package links:
// its kernels are found by name here, and not registered with PyTorch.
#include <cstdio>
#include <exception>

#include "kernel.h"

#undef STABLE_TORCH_LIBRARY_FRAGMENT
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_FRAGMENT(ns, m) void linzoo::schemas(linzoo::Kernels& m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, device, m) void linzoo::kernels(linzoo::Kernels& m)

namespace linzoo {

struct Kernels {
  using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
  const char* wanted;
  Boxed found = nullptr;
  void def(const char*) {}
  void impl(const char* name, Boxed kernel) {
    if (!std::strcmp(name, wanted)) found = kernel;
  }
};

[[maybe_unused]] static void schemas(Kernels&);
static void kernels(Kernels&);

// A boxed kernel takes ownership of its arguments, which the package keeps.
inline Tensor shared(AtenTensorHandle x) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x, &handle));
  return Tensor(handle);
}

inline StableIValue box(AtenTensorHandle x) { return torch::stable::detail::from(shared(x)); }
inline StableIValue box(AtenTensorHandle* x) {
  return torch::stable::detail::from(x ? std::optional<Tensor>(shared(*x)) : std::nullopt);
}
inline StableIValue box(int32_t x) { return torch::stable::detail::from(x != 0); }
inline StableIValue box(int64_t x) { return torch::stable::detail::from(x); }
inline StableIValue box(double x) { return torch::stable::detail::from(x); }

// Static, as each operator has its own table of kernels.
template <class... Arguments>
static AOTITorchError call(const char* name, Arguments... arguments) {
  try {
    Kernels table{name};
    kernels(table);
    StableIValue stack[] = {box(arguments)...};
    table.found(stack, sizeof...(Arguments), 0);
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace linzoo
