// Python's view of the native backends: tensors arrive as addresses, sizes and strides (see
// oprd_kernels/validate.py, which owns all checking), the GIL is released while the kernels run.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "arguments.h"
#if defined(OPRD_CUDA_ARCHITECTURES)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using namespace oprd;

void forward(const std::vector<Layer>& layers, const Shared& shared, Address denominator,
             bool mean, bool each, Address loss, Address saved, std::int64_t saved_per_layer) {
  std::vector<Problem> problems;
  std::vector<ForwardOut> outs;
  for (const Layer& layer : layers) {
    problems.push_back(make_problem(layer, shared));
    const Problem& p = problems.back();
    outs.push_back(forward_out(layer, p, static_cast<std::int64_t>(outs.size()), each, loss, saved,
                               saved_per_layer));
    outs.back().grad_scale =
        cpu::reduction_scale(p, pointer<const float>(denominator), mean);
  }
  cpu::forward(problems.data(), outs.data(), static_cast<int>(layers.size()));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    cpu::reduce(problems[i], outs[i], outs[i].grad_scale,
                each ? nullptr : pointer<float>(loss) + i,
                pointer<float>(saved) + i * saved_per_layer);
  }
}

// The same for one layer in slices: z_S and z_T (r wide) of rows [first, first + count).
void forward_slice(const Layer& layer, const Shared& shared, std::int64_t total_rows,
                   std::int64_t first, bool each, Address loss, Address saved) {
  const Problem slice = make_problem(layer, shared);
  Problem whole = slice;
  whole.rows = total_rows;
  const Saved parts = saved_parts(pointer<float>(saved), whole, !each);
  ForwardOut out;
  out.row_loss = (each ? pointer<float>(loss) : parts.row_loss) + first;
  out.row_stats = parts.row_stats + first;
  out.stats_rows = total_rows;
  out.dz = parts.dz + slice.rank * first;
  cpu::forward(&slice, &out, 1);
}

// What `forward` does after its rows: loss and batch statistics of a layer done in slices.
void reduce(const Shared& shared, Address denominator, bool mean, bool each, Address loss,
            Address saved) {
  Problem p;
  p.rows = std::get<0>(shared);
  p.weights = pointer<const float>(std::get<3>(shared));
  const Saved parts = saved_parts(pointer<float>(saved), p, !each);
  ForwardOut out;
  out.row_loss = each ? pointer<float>(loss) : parts.row_loss;
  out.row_stats = parts.row_stats;
  const float scale = cpu::reduction_scale(p, pointer<const float>(denominator), mean);
  cpu::reduce(p, out, scale, each ? nullptr : pointer<float>(loss), parts.stats);
}

void backward(const std::vector<Layer>& layers, const Shared& shared, Address grad_loss,
              std::int64_t row_stride, std::int64_t layer_stride, bool each, Address saved,
              std::int64_t saved_per_layer, bool accumulate) {
  std::vector<Problem> problems;
  std::vector<BackwardIn> ins;
  for (const Layer& layer : layers) {
    problems.push_back(make_problem(layer, shared));
    ins.push_back(backward_in(layer, problems.back(), static_cast<std::int64_t>(ins.size()),
                              grad_loss, row_stride, layer_stride, each, saved, saved_per_layer,
                              accumulate));
  }
  cpu::backward(problems.data(), ins.data(), static_cast<int>(layers.size()));
}

void gather(const RowsTuple& x, Address index, std::int64_t first, std::int64_t count,
            std::int64_t width, Address mean, Address out, int threads) {
  cpu::gather(as_rows(x), pointer<const std::int64_t>(index), first, count, width,
                    pointer<const float>(mean), pointer<float>(out), threads);
}

void scatter(const Layer& layer, const Shared& shared, Address values, std::int64_t first,
             std::int64_t count, bool accumulate) {
  cpu::scatter(make_problem(layer, shared), pointer<const float>(values), first, count,
                     as_rows(std::get<8>(layer)), accumulate);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "oprd's native kernels; use them through oprd_kernels.fused_rep_loss.";
  using released = py::call_guard<py::gil_scoped_release>;
  m.def("simd_name", &cpu::simd_name);
  m.def("forward", &forward, released());
  m.def("forward_slice", &forward_slice, released());
  m.def("reduce", &reduce, released());
  m.def("backward", &backward, released());
  m.def("gather", &gather, released());
  m.def("scatter", &scatter, released());
#if defined(OPRD_CUDA_ARCHITECTURES)
  bind_cuda(m);
  m.attr("cuda_architectures") = OPRD_CUDA_ARCHITECTURES;
#endif
}
