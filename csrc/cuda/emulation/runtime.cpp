// The CUDA runtime of the emulation, which has no devices to choose from.

#include "kernels.h"

namespace oprd {
namespace cuda {

DeviceGuard::DeviceGuard(int device) : previous_(device) {}
DeviceGuard::~DeviceGuard() = default;

Facts facts() { return {0, 0, "emulated on the host"}; }

}  // namespace cuda
}  // namespace oprd
