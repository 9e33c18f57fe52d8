// Kernels with the mistakes that the emulation is there to find.
#pragma once

#include <string>

namespace oprd {
namespace emulation {

// Runs the kernel of that name on n floats, with shared memory for one a thread; what is
// wrong with it comes as a Fault.
void run_faulty(const std::string& name, float* data, int n);

}  // namespace emulation
}  // namespace oprd
