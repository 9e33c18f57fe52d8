// The functions that the translation unit of each instruction set provides to the dispatcher.
#pragma once

#include "../rep_loss.h"

namespace oprd {
namespace cpu {

struct Kernels {
  const char* name;
  // The number of floats of scratch per thread.
  std::int64_t (*forward_scratch)(const Problem&);
  std::int64_t (*backward_scratch)(const Problem&);
  // These process rows [begin, end) of the batch. The result of a row depends on that row alone.
  void (*forward)(const Problem&, const ForwardOut&, std::int64_t begin, std::int64_t end,
                  float* scratch);
  void (*backward)(const Problem&, const BackwardIn&, std::int64_t begin, std::int64_t end,
                   float* scratch);
  void (*gather)(const Rows& x, const std::int64_t* index, std::int64_t begin, std::int64_t end,
                 std::int64_t width, const float* mean, float* out);
  void (*scatter)(const Problem&, const float* values, std::int64_t begin, std::int64_t end,
                  const Rows& grad, bool accumulate);
};

extern const Kernels kPortable;
extern const Kernels kAvx2;

}  // namespace cpu
}  // namespace oprd
