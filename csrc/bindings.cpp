// The Python functions of the native backends. They receive the tensors themselves (arguments.h),
// which oprd_kernels/validate.py has checked. The GIL is released while kernels run.

#include <pybind11/pybind11.h>

#include "arguments.h"
#if defined(OPRD_CUDA_ARCHITECTURES)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using namespace oprd;

int number(PyObject* x) { return static_cast<int>(integer(x)); }

// forward(calls, grad, loss, saved, threads)
void forward(PyObject* const (&x)[5]) {
  Forward f(x[0], x[1], x[2], x[3], number(x[4]));
  const py::gil_scoped_release released;
  for (int i = 0; i < f.layers(); ++i) {
    f.outs[i].grad_scale = cpu::reduction_scale(f.problems[i], f.denominator, f.mean);
  }
  cpu::forward(f.problems.data(), f.outs.data(), f.layers());
  for (int i = 0; i < f.layers(); ++i) {
    cpu::reduce(f.problems[i], f.outs[i], f.outs[i].grad_scale, f.each ? nullptr : f.losses + i,
                f.saved + i * f.saved_stride);
  }
}

// forward_slice(call, loss, saved, first, total_rows, threads): forward of rows [first, first + M)
// of total_rows, without the reduction. The student and teacher of the call are z_S and z_T.
void forward_slice(PyObject* const (&x)[6]) {
  const Fields call(x[0], kLossFields);
  Problem slice = loss_problem(call, number(x[5]), nullptr);
  slice.rank = slice.student_width;
  const bool each = is(call[kLossReduction], "none");
  const std::int64_t first = integer(x[3]);
  const Saved parts = saved_parts(data<float>(x[2]), integer(x[4]), !each);
  ForwardOut out;
  out.row_loss = (each ? data<float>(x[1]) : parts.row_loss) + first;
  out.row_stats = parts.row_stats + first;
  out.stats_rows = integer(x[4]);
  out.dz = parts.dz + slice.rank * first;
  const py::gil_scoped_release released;
  cpu::forward(&slice, &out, 1);
}

// reduce(calls, loss, saved): the reduction that `forward` includes, for a forward done in slices.
void reduce(PyObject* const (&x)[3]) {
  const Forward f(x[0], Py_None, x[1], x[2], 1);
  const py::gil_scoped_release released;
  const float scale = cpu::reduction_scale(f.problems[0], f.denominator, f.mean);
  cpu::reduce(f.problems[0], f.outs[0], scale, f.each ? nullptr : f.losses, f.saved);
}

// backward(calls, grads, accumulate, grad_losses, threads)
void backward(PyObject* const (&x)[5]) {
  const Backward b(x[0], x[1], x[2], x[3], number(x[4]));
  const py::gil_scoped_release released;
  cpu::backward(b.problems.data(), b.ins.data(), b.layers());
}

// gather(x, index, mean, first, out, threads): copies as many rows of x as out has.
void gather(PyObject* const (&x)[6]) {
  const Matrix from(x[0]);
  const auto* index = data<const std::int64_t>(x[1]);
  const auto* mean = data<const float>(x[2]);
  const std::int64_t first = integer(x[3]), count = shape(x[4])[0];
  auto* out = data<float>(x[4]);
  const int threads = number(x[5]);
  const py::gil_scoped_release released;
  cpu::gather(from.rows, index, first, count, from.width, mean, out, threads);
}

// scatter(call, grad, accumulate, values, first, threads): writes or adds values to rows of grad.
void scatter(PyObject* const (&x)[6]) {
  const Matrix grad(x[1]);
  const Problem problem =
      grad_problem(Fields(x[0], kGradFields), grad, number(x[5]), nullptr);
  const auto* values = data<const float>(x[3]);
  const std::int64_t first = integer(x[4]), count = shape(x[3])[0];
  const bool accumulate = x[2] == Py_True;
  const py::gil_scoped_release released;
  cpu::scatter(problem, values, first, count, grad.rows, accumulate);
}

// need_no_check(students, teachers): a fast check of layers without projectors. Returns 0 if
// validate.py has to check them itself; 1 if all are valid as given and like the first; 2 if, in
// addition, student and teacher have the same number of rows.
int need_no_check(PyObject* const (&x)[2]) {
  const Sequence students(x[0]), teachers(x[1]);
  const Look student(students[0]), teacher(teachers[0]);
  if (!student.plain || !teacher.plain || student.width() != teacher.width()) return 0;
  if (!student.device.equal(teacher.device)) return 0;
  if (!Look::has(students[0], names().is_meta, Py_False)) return 0;
  for (int i = 0; i < students.size(); ++i) {
    if (i && !(Look(students[i]).like(student) && Look(teachers[i]).like(teacher))) return 0;
    if (!Look::has(teachers[i], names().requires_grad, Py_False)) return 0;
    if (students[i] == teachers[i]) return 0;
  }
  return student.count() == teacher.count() ? 2 : 1;
}

PyMethodDef methods[] = {
    method<5, forward>("forward"), method<6, forward_slice>("forward_slice"),
    method<3, reduce>("reduce"),   method<5, backward>("backward"),
    method<6, gather>("gather"),   method<6, scatter>("scatter"),
    method<2, need_no_check>("need_no_check"),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "oprd's native kernels; use them through oprd_kernels.fused_rep_loss.";
  m.def("simd_name", &cpu::simd_name);
  m.attr("LOSS_FIELDS") = field_names(kLossFieldNames);
  m.attr("GRAD_FIELDS") = field_names(kGradFieldNames);
  add_methods(m, methods);
#if defined(OPRD_CUDA_ARCHITECTURES)
  bind_cuda(m);
  m.attr("cuda_architectures") = OPRD_CUDA_ARCHITECTURES;
#endif
}
