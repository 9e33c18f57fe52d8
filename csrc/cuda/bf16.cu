#include "rows.cuh"

namespace oprd {
namespace cuda {

template void forward_rows<DType::kBFloat16>(const Problem&, const ForwardOut&, const Scale&,
                                      const Stream&);
template void backward_rows<DType::kBFloat16>(const Problem&, const BackwardIn&, const Stream&);

}  // namespace cuda
}  // namespace oprd
