// Python's view of the native backends: tensors arrive as addresses, sizes and strides (see
// oprd_kernels/cpu.py, which owns all checking), the GIL is released while the kernels run.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

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

// What layers share: (M, student rows, teacher rows, weights, kind, threads).
using Shared = std::tuple<std::int64_t, Address, Address, Address, int, int>;
// A layer: (student, teacher, dS, dT, rank, student_proj, teacher_proj, teacher_mean, grad).
using Layer = std::tuple<RowsTuple, RowsTuple, std::int64_t, std::int64_t, std::int64_t, Address,
                         Address, Address, RowsTuple>;

oprd::Problem make_problem(const Layer& layer, const Shared& shared) {
  oprd::Problem p;
  p.student = as_rows(std::get<0>(layer));
  p.teacher = as_rows(std::get<1>(layer));
  p.student_width = std::get<2>(layer);
  p.teacher_width = std::get<3>(layer);
  p.rank = std::get<4>(layer);
  p.student_proj = pointer<const float>(std::get<5>(layer));
  p.teacher_proj = pointer<const float>(std::get<6>(layer));
  p.teacher_mean = pointer<const float>(std::get<7>(layer));
  p.rows = std::get<0>(shared);
  p.student_rows = pointer<const std::int64_t>(std::get<1>(shared));
  p.teacher_rows = pointer<const std::int64_t>(std::get<2>(shared));
  p.weights = pointer<const float>(std::get<3>(shared));
  p.kind = static_cast<oprd::Kind>(std::get<4>(shared));
  p.threads = std::get<5>(shared);
  return p;
}

// Where a layer's part of the buffer `saved` begins, and what is in it (see oprd_kernels/cpu.py).
struct Saved {
  float* stats;
  float* row_stats;
  float* row_loss;
  float* dz;
};

Saved saved_parts(float* saved, const oprd::Problem& p, bool row_losses_inside) {
  Saved parts;
  parts.stats = saved;
  parts.row_stats = parts.stats + oprd::kBatchStats;
  parts.row_loss = parts.row_stats + oprd::kRowStats * p.rows;
  parts.dz = parts.row_loss + (row_losses_inside ? p.rows : 0);
  return parts;
}

// A layer's grad with address 0: no gradient in forward. `each`: reduction "none", loss is (M);
// otherwise one loss a layer.
void forward(const std::vector<Layer>& layers, const Shared& shared, Address denominator,
             bool mean, bool each, Address loss, Address saved, std::int64_t saved_per_layer) {
  std::vector<oprd::Problem> problems;
  std::vector<oprd::ForwardOut> outs;
  for (const Layer& layer : layers) {
    problems.push_back(make_problem(layer, shared));
    const oprd::Problem& p = problems.back();
    const Saved parts =
        saved_parts(pointer<float>(saved) + outs.size() * saved_per_layer, p, !each);
    oprd::ForwardOut out;
    out.row_loss = each ? pointer<float>(loss) : parts.row_loss;
    out.row_stats = parts.row_stats;
    out.dz = parts.dz;
    out.grad = as_rows(std::get<8>(layer));
    out.grad_scale = oprd::cpu::reduction_scale(p, pointer<const float>(denominator), mean);
    outs.push_back(out);
  }
  oprd::cpu::forward(problems.data(), outs.data(), static_cast<int>(layers.size()));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    oprd::cpu::reduce(problems[i], outs[i], outs[i].grad_scale,
                      each ? nullptr : pointer<float>(loss) + i,
                      pointer<float>(saved) + i * saved_per_layer);
  }
}

// The same for one layer in slices: z_S and z_T (r wide) of rows [first, first + count).
void forward_slice(const Layer& layer, const Shared& shared, std::int64_t total_rows,
                   std::int64_t first, bool each, Address loss, Address saved) {
  const oprd::Problem slice = make_problem(layer, shared);
  oprd::Problem whole = slice;
  whole.rows = total_rows;
  const Saved parts = saved_parts(pointer<float>(saved), whole, !each);
  oprd::ForwardOut out;
  out.row_loss = (each ? pointer<float>(loss) : parts.row_loss) + first;
  out.row_stats = parts.row_stats + oprd::kRowStats * first;
  out.dz = parts.dz + slice.rank * first;
  oprd::cpu::forward(&slice, &out, 1);
}

// What `forward` does after its rows: loss and batch statistics of a layer done in slices.
void reduce(const Shared& shared, Address denominator, bool mean, bool each, Address loss,
            Address saved) {
  oprd::Problem p;
  p.rows = std::get<0>(shared);
  p.weights = pointer<const float>(std::get<3>(shared));
  const Saved parts = saved_parts(pointer<float>(saved), p, !each);
  oprd::ForwardOut out;
  out.row_loss = each ? pointer<float>(loss) : parts.row_loss;
  out.row_stats = parts.row_stats;
  const float scale = oprd::cpu::reduction_scale(p, pointer<const float>(denominator), mean);
  oprd::cpu::reduce(p, out, scale, each ? nullptr : pointer<float>(loss), parts.stats);
}

// grad_loss: one value a layer, `layer_stride` apart, or with `each` one a row, `row_stride` apart.
void backward(const std::vector<Layer>& layers, const Shared& shared, Address grad_loss,
              std::int64_t row_stride, std::int64_t layer_stride, bool each, Address saved,
              std::int64_t saved_per_layer, bool accumulate) {
  std::vector<oprd::Problem> problems;
  std::vector<oprd::BackwardIn> ins;
  for (const Layer& layer : layers) {
    const std::int64_t i = static_cast<std::int64_t>(ins.size());
    problems.push_back(make_problem(layer, shared));
    const Saved parts =
        saved_parts(pointer<float>(saved) + i * saved_per_layer, problems.back(), !each);
    oprd::BackwardIn in;
    in.row_stats = parts.row_stats;
    in.dz = parts.dz;
    in.grad_loss = pointer<const float>(grad_loss) + i * layer_stride;
    in.grad_loss_stride = row_stride;
    in.scale = parts.stats + oprd::kScale;
    in.grad = as_rows(std::get<8>(layer));
    in.accumulate = accumulate;
    ins.push_back(in);
  }
  oprd::cpu::backward(problems.data(), ins.data(), static_cast<int>(layers.size()));
}

void gather(const RowsTuple& x, Address index, std::int64_t first, std::int64_t count,
            std::int64_t width, Address mean, Address out, int threads) {
  oprd::cpu::gather(as_rows(x), pointer<const std::int64_t>(index), first, count, width,
                    pointer<const float>(mean), pointer<float>(out), threads);
}

void scatter(const Layer& layer, const Shared& shared, Address values, std::int64_t first,
             std::int64_t count, bool accumulate) {
  oprd::cpu::scatter(make_problem(layer, shared), pointer<const float>(values), first, count,
                     as_rows(std::get<8>(layer)), accumulate);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "oprd's native kernels; use them through oprd_kernels.fused_rep_loss.";
  using released = py::call_guard<py::gil_scoped_release>;
  m.def("simd_name", &oprd::cpu::simd_name);
  m.def("forward", &forward, released());
  m.def("forward_slice", &forward_slice, released());
  m.def("reduce", &reduce, released());
  m.def("backward", &backward, released());
  m.def("gather", &gather, released());
  m.def("scatter", &scatter, released());
}
