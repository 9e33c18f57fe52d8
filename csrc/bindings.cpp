// Python's view of the native backends: tensors arrive as addresses, sizes and strides (see
// oprd_kernels/cpu.py, which owns all checking), the GIL is released while the kernels run.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "rep_loss.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
// (address, dtype, rows per outer index, outer stride, inner stride, last stride), in elements.
using RowsTuple =
    std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

oprd::Rows as_rows(const RowsTuple& t) {
  oprd::Rows rows;
  rows.data = pointer<void>(std::get<0>(t));
  rows.dtype = static_cast<oprd::DType>(std::get<1>(t));
  rows.inner = std::get<2>(t);
  rows.stride_outer = std::get<3>(t);
  rows.stride_inner = std::get<4>(t);
  rows.stride_last = std::get<5>(t);
  return rows;
}

oprd::Problem make_problem(const RowsTuple& student, const RowsTuple& teacher, std::int64_t rows,
                           std::int64_t student_width, std::int64_t teacher_width,
                           std::int64_t rank, Address student_proj, Address student_rows,
                           Address teacher_rows, Address weights, int kind, int threads) {
  oprd::Problem p;
  p.student = as_rows(student);
  p.teacher = as_rows(teacher);
  p.rows = rows;
  p.student_width = student_width;
  p.teacher_width = teacher_width;
  p.rank = rank;
  p.student_proj = pointer<const float>(student_proj);
  p.student_rows = pointer<const std::int64_t>(student_rows);
  p.teacher_rows = pointer<const std::int64_t>(teacher_rows);
  p.weights = pointer<const float>(weights);
  p.kind = static_cast<oprd::Kind>(kind);
  p.threads = threads;
  return p;
}

// grad with address 0: no gradient in forward. loss 0: reduction "none".
void forward(const RowsTuple& student, const RowsTuple& teacher, std::int64_t rows,
             std::int64_t student_width, std::int64_t teacher_width, std::int64_t rank,
             Address student_proj, Address teacher_proj, Address teacher_mean,
             Address student_rows, Address teacher_rows, Address weights, int kind, int threads,
             Address row_loss, Address row_stats, Address dz, const RowsTuple& grad,
             Address denominator, bool mean, Address loss, Address stats) {
  oprd::Problem problem =
      make_problem(student, teacher, rows, student_width, teacher_width, rank, student_proj,
                   student_rows, teacher_rows, weights, kind, threads);
  problem.teacher_proj = pointer<const float>(teacher_proj);
  problem.teacher_mean = pointer<const float>(teacher_mean);
  oprd::ForwardOut out;
  out.row_loss = pointer<float>(row_loss);
  out.row_stats = pointer<float>(row_stats);
  out.dz = pointer<float>(dz);
  out.grad = as_rows(grad);
  out.grad_scale = oprd::cpu::reduction_scale(problem, pointer<const float>(denominator), mean);
  oprd::cpu::forward(problem, out);
  oprd::cpu::reduce(problem, out, out.grad_scale, pointer<float>(loss), pointer<float>(stats));
}

void backward(const RowsTuple& student, const RowsTuple& teacher, std::int64_t rows,
              std::int64_t student_width, std::int64_t teacher_width, std::int64_t rank,
              Address student_proj, Address student_rows, Address teacher_rows, Address weights,
              int kind, int threads, Address row_stats, Address dz, Address grad_loss,
              std::int64_t grad_loss_stride, Address scale, const RowsTuple& grad,
              bool accumulate) {
  const oprd::Problem problem =
      make_problem(student, teacher, rows, student_width, teacher_width, rank, student_proj,
                   student_rows, teacher_rows, weights, kind, threads);
  oprd::BackwardIn in;
  in.row_stats = pointer<const float>(row_stats);
  in.dz = pointer<const float>(dz);
  in.grad_loss = pointer<const float>(grad_loss);
  in.grad_loss_stride = grad_loss_stride;
  in.scale = pointer<const float>(scale);
  in.grad = as_rows(grad);
  in.accumulate = accumulate;
  oprd::cpu::backward(problem, in);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "oprd's native kernels; use them through oprd_kernels.fused_rep_loss.";
  m.def("simd_name", &oprd::cpu::simd_name);
  m.def("forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("backward", &backward, py::call_guard<py::gil_scoped_release>());
}
