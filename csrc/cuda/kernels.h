// What the host side of the CUDA backend shares: one entry per storage type, and how a launch
// describes itself. No CUDA header here, so that plain C++ can include it.
#pragma once

#include <cstdint>
#include <string>

#include "../rep_loss.h"

namespace oprd {
namespace cuda {

using i64 = std::int64_t;

// Where kernels find the factor of a reduction: a value the host knows, or one value on the
// device, of which it may be the inverse.
struct Scale {
  float value = 1.f;
  const float* device = nullptr;
  bool inverse = false;
};

// A launch, for the launcher and for the message if it fails.
struct Launch {
  const char* kernel;
  const Problem& problem;
  const Stream& stream;
  i64 blocks;
  int threads;
};

[[noreturn]] void fail(const Launch& launch, const std::string& reason);

// More is refused: the warps of a launch are counted in 32 bits.
constexpr i64 kMaxBlocks = (1 << 30) - 1;

template <DType>
void forward_rows(const Problem& problem, const ForwardOut& out, const Scale& scale,
                  const Stream& stream);
template <DType>
void backward_rows(const Problem& problem, const BackwardIn& in, const Stream& stream);

// reduce.cu: the sum of the weights as a scale into `layers` places; the ordered reduction.
void scale_by_weights(const Problem& problem, float* scale, i64 stride, int layers,
                      const Stream& stream);
void reduce(const Problem& problem, const ForwardOut& out, const Scale& scale, float* loss,
            float* stats, double* partials, const Stream& stream);

// Makes a device current, and on destruction the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

// What the doctor reports: the runtime that is linked in, the driver's version (0: none), and why
// no kernel could be launched here, or nothing.
struct Facts {
  int runtime = 0;
  int driver = 0;
  std::string problem;
};
Facts facts();

}  // namespace cuda
}  // namespace oprd
