// The Python module cac_fast._C: facts of the build and of this CPU. Importing it registers the
// operators.

#include <ATen/Context.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#define CAC_FAST_TEXT_OF(...) #__VA_ARGS__
#define CAC_FAST_TEXT(...) CAC_FAST_TEXT_OF(__VA_ARGS__)

namespace {

// Whether PyTorch's product of bfloat16 matrices with float32 sums, which is MKL's, is made in
// hardware (AVX-512 BF16, AMX). MKL picks its kernels for Intel's CPUs.
bool bfloat16_units() {
#if defined(__x86_64__) && defined(__GNUC__)
  return at::hasMKL() && __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
#if defined(__clang__)
  module.attr("compiler") = "Clang " __clang_version__;
#elif defined(__GNUC__)
  module.attr("compiler") = "GCC " __VERSION__;
#else
  module.attr("compiler") = "unknown";
#endif
  module.attr("standard") = static_cast<int64_t>(__cplusplus);
  module.attr("flags") = CAC_FAST_TEXT(CAC_FAST_FLAGS);
  module.attr("torch") = TORCH_VERSION;
  module.attr("bfloat16_units") = bfloat16_units();
  // To be raised, here and in cac_fast/_extension.py, with every change of what the two exchange.
  module.attr("interface") = 3;
}
