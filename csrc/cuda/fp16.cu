#include "rows.cuh"

namespace oprd {
namespace cuda {

template void forward_rows<DType::kFloat16>(const Problem*, const ForwardOut*, int, const Scale&, double*,
                                      const Room&,
                                      const Stream&);
template void backward_rows<DType::kFloat16>(const Problem*, const BackwardIn*, int, const Stream&);

}  // namespace cuda
}  // namespace oprd
