// The parts of the host code that call the CUDA runtime from plain C++.

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "kernels.h"

namespace oprd {
namespace cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("oprd CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

Facts facts() {
  Facts facts;
  cudaRuntimeGetVersion(&facts.runtime);
  cudaDriverGetVersion(&facts.driver);
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) facts.problem = cudaGetErrorString(error);
  cudaGetLastError();  // clears the error, so that it is not reported for a later launch
  return facts;
}

}  // namespace cuda
}  // namespace oprd
