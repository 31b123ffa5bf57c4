// The Python module cac_fast._C: facts of the build and of this CPU. Importing it registers the
// operators.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#define CAC_FAST_TEXT_OF(...) #__VA_ARGS__
#define CAC_FAST_TEXT(...) CAC_FAST_TEXT_OF(__VA_ARGS__)

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
#if defined(__x86_64__) && defined(__GNUC__)
  module.attr("bfloat16_units") = __builtin_cpu_supports("avx512bf16") != 0;  // AMX's too have it
#else
  module.attr("bfloat16_units") = false;
#endif
}
