// What each storage type's translation unit instantiates.
#pragma once

#include "identity.cuh"
#include "projected.cuh"

namespace oprd {
namespace cuda {

template <DType D>
void forward_rows(const Problem& p, const ForwardOut& out, const Scale& scale,
                  const Stream& stream) {
  if (p.rank > 0) {
    launch_projected_forward<D>(p, out, stream);
  } else if (takes_vectors(p.student, p.student_width) &&
             takes_vectors(p.teacher, p.teacher_width) &&
             (!out.grad.data || takes_vectors(out.grad, p.student_width))) {
    launch_identity_forward<D, true>(p, out, scale, stream);
  } else {
    launch_identity_forward<D, false>(p, out, scale, stream);
  }
}

template <DType D>
void backward_rows(const Problem& p, const BackwardIn& in, const Stream& stream) {
  if (p.rank > 0) {
    launch_projected_backward<D>(p, in, stream);
  } else if (takes_vectors(p.student, p.student_width) &&
             takes_vectors(p.teacher, p.teacher_width) &&
             takes_vectors(in.grad, p.student_width)) {
    launch_identity_backward<D, true>(p, in, stream);
  } else {
    launch_identity_backward<D, false>(p, in, stream);
  }
}

}  // namespace cuda
}  // namespace oprd
