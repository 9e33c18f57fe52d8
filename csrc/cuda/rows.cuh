// The templates that the translation unit of each storage type instantiates.
#pragma once

#include "identity.cuh"
#include "projected_backward.cuh"
#include "projected_forward.cuh"

namespace oprd {
namespace cuda {

template <DType D>
void forward_rows(const Problem* problems, const ForwardOut* outs, int layers, const Scale& scale,
                  double* tickets, const Room& terms, const Stream& stream) {
  if (problems->rank > 0) {
    launch_projected_forward<D>(problems, outs, layers, tickets, terms, stream);
  } else {
    launch_identity_forward<D>(problems, outs, layers, scale, tickets, stream);
  }
}

template <DType D>
void backward_rows(const Problem* problems, const BackwardIn* ins, int layers,
                   const Stream& stream) {
  if (problems->rank > 0) {
    launch_projected_backward<D>(problems, ins, layers, stream);
  } else {
    launch_identity_backward<D>(problems, ins, layers, stream);
  }
}

}  // namespace cuda
}  // namespace oprd
