#include "bindings.h"

#include <pybind11/stl.h>

#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace py = pybind11;

namespace oprd {
namespace {

cuda::Stream as_stream(int device, Address handle) { return {device, pointer<void>(handle)}; }

// As _native's forward; scratch: room for cuda_scratch(..) doubles.
void forward(const std::vector<Layer>& layers, const Shared& shared, Address denominator,
             bool mean, bool each, Address loss, Address saved, std::int64_t saved_per_layer,
             Address scratch, int device, Address stream) {
  std::vector<Problem> problems;
  std::vector<ForwardOut> outs;
  for (const Layer& layer : layers) {
    problems.push_back(make_problem(layer, shared));
    outs.push_back(forward_out(layer, problems.back(), static_cast<std::int64_t>(outs.size()), each,
                               loss, saved, saved_per_layer));
  }
  cuda::Reduction reduction;
  reduction.denominator = pointer<const float>(denominator);
  reduction.mean = mean;
  reduction.each = each;
  reduction.losses = pointer<float>(loss);
  reduction.stats = pointer<float>(saved);
  reduction.stats_stride = saved_per_layer;
  reduction.scratch = pointer<double>(scratch);
  cuda::forward(problems.data(), outs.data(), static_cast<int>(layers.size()), reduction,
                as_stream(device, stream));
}

// As _native's backward.
void backward(const std::vector<Layer>& layers, const Shared& shared, Address grad_loss,
              std::int64_t row_stride, std::int64_t layer_stride, bool each, Address saved,
              std::int64_t saved_per_layer, bool accumulate, int device, Address stream) {
  std::vector<Problem> problems;
  std::vector<BackwardIn> ins;
  for (const Layer& layer : layers) {
    problems.push_back(make_problem(layer, shared));
    ins.push_back(backward_in(layer, problems.back(), static_cast<std::int64_t>(ins.size()),
                              grad_loss, row_stride, layer_stride, each, saved, saved_per_layer,
                              accumulate));
  }
  cuda::backward(problems.data(), ins.data(), static_cast<int>(layers.size()),
                 as_stream(device, stream));
}

// (runtime version, driver version or 0, why no kernel can be launched here or "").
py::tuple facts() {
  const cuda::Facts facts = cuda::facts();
  return py::make_tuple(facts.runtime, facts.driver, facts.problem);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using released = py::call_guard<py::gil_scoped_release>;
  m.attr("cuda_max_rank") = cuda::kMaxRank;
  m.def("cuda_facts", &facts);
  m.def("cuda_scratch", [](std::int64_t rows, std::int64_t layers, std::int64_t rank,
                           std::int64_t student_width, std::int64_t teacher_width, int dtype) {
    return cuda::scratch(rows, layers, rank, student_width, teacher_width,
                         static_cast<DType>(dtype));
  });
  m.def("cuda_forward", &forward, released());
  m.def("cuda_backward", &backward, released());
}

}  // namespace oprd
