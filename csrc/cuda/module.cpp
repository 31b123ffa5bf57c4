// The Python module cac_fast._C_cuda: facts of the build. Importing it registers the operators.

#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>

#include "launch.h"

#define CAC_FAST_TEXT_OF(...) #__VA_ARGS__
#define CAC_FAST_TEXT(...) CAC_FAST_TEXT_OF(__VA_ARGS__)

// Here, since the header would take nvcc longer than a kernel.
void* cac_fast::cuda::current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.attr("archs") = CAC_FAST_TEXT(CAC_FAST_CUDA_ARCHS);
  module.attr("nvcc") = CAC_FAST_TEXT(CAC_FAST_NVCC);
}
