#include "bindings.h"

#include "../arguments.h"
#include "kernels.h"

namespace py = pybind11;

namespace oprd {
namespace {

cuda::Stream as_stream(PyObject* device, PyObject* handle) {
  void* stream = PyLong_AsVoidPtr(handle);
  if (!stream && PyErr_Occurred()) throw py::error_already_set();
  return {static_cast<int>(integer(device)), stream};
}

// cuda_forward(calls, grad, loss, saved, scratch, device, stream): like forward of _native. scratch
// has cuda_scratch(..) doubles, or is None.
void forward(PyObject* const (&x)[7]) {
  const Forward f(x[0], x[1], x[2], x[3], 1);
  cuda::Reduction reduction;
  reduction.denominator = f.denominator;
  reduction.mean = f.mean;
  reduction.each = f.each;
  reduction.losses = f.losses;
  reduction.stats = f.saved;
  reduction.stats_stride = f.saved_stride;
  reduction.scratch = data<double>(x[4]);
  const cuda::Stream stream = as_stream(x[5], x[6]);
  const py::gil_scoped_release released;
  cuda::forward(f.problems.data(), f.outs.data(), f.layers(), reduction, stream);
}

// cuda_backward(calls, grads, accumulate, grad_losses, device, stream): like backward of _native.
void backward(PyObject* const (&x)[6]) {
  const Backward b(x[0], x[1], x[2], x[3], 1);
  const cuda::Stream stream = as_stream(x[4], x[5]);
  const py::gil_scoped_release released;
  cuda::backward(b.problems.data(), b.ins.data(), b.layers(), stream);
}

PyMethodDef methods[] = {method<7, forward>("cuda_forward"),
                         method<6, backward>("cuda_backward"),
                         {nullptr, nullptr, 0, nullptr}};

// (runtime version, driver version or 0, the reason why no kernel can be launched or "").
py::tuple facts() {
  const cuda::Facts facts = cuda::facts();
  return py::make_tuple(facts.runtime, facts.driver, facts.problem);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_max_rank") = cuda::kMaxRank;
  m.def("cuda_facts", &facts);
  m.def("cuda_scratch", [](std::int64_t rows, std::int64_t layers, std::int64_t rank,
                           std::int64_t student_width, std::int64_t teacher_width, int dtype) {
    return cuda::scratch(rows, layers, rank, student_width, teacher_width,
                         static_cast<DType>(dtype));
  });
  add_methods(m, methods);
}

}  // namespace oprd
