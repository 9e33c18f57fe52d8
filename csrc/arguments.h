// How Python passes a call to native code: tensors as addresses, sizes and strides, in tuples.
#pragma once

#include <cstdint>
#include <tuple>

#include "rep_loss.h"

namespace oprd {

using Address = std::uintptr_t;
// (address, dtype, rows per outer index, outer stride, inner stride, last stride), in elements.
using RowsTuple =
    std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Rows as_rows(const RowsTuple& t) {
  Rows rows;
  rows.data = pointer<void>(std::get<0>(t));
  rows.dtype = static_cast<DType>(std::get<1>(t));
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

inline Problem make_problem(const Layer& layer, const Shared& shared) {
  Problem p;
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
  p.kind = static_cast<Kind>(std::get<4>(shared));
  p.threads = std::get<5>(shared);
  return p;
}

// Where a layer's part of the buffer `saved` begins, and what is in it (see
// oprd_kernels/layout.py).
struct Saved {
  float* stats;
  float* row_stats;
  float* row_loss;
  float* dz;
};

inline Saved saved_parts(float* saved, const Problem& p, bool row_losses_inside) {
  Saved parts;
  parts.stats = saved;
  parts.row_stats = parts.stats + kBatchStats;
  parts.row_loss = parts.row_stats + kRowStats * p.rows;
  parts.dz = parts.row_loss + (row_losses_inside ? p.rows : 0);
  return parts;
}

// What forward writes for layer number `index`. `each`: reduction "none", loss is (M); else one
// loss a layer. A layer's grad with address 0: no gradient in forward.
inline ForwardOut forward_out(const Layer& layer, const Problem& p, std::int64_t index, bool each,
                              Address loss, Address saved, std::int64_t saved_per_layer) {
  const Saved parts = saved_parts(pointer<float>(saved) + index * saved_per_layer, p, !each);
  ForwardOut out;
  out.row_loss = each ? pointer<float>(loss) : parts.row_loss;
  out.row_stats = parts.row_stats;
  out.dz = parts.dz;
  out.grad = as_rows(std::get<8>(layer));
  return out;
}

// grad_loss: one value a layer, `layer_stride` apart, or with `each` one a row, `row_stride` apart.
inline BackwardIn backward_in(const Layer& layer, const Problem& p, std::int64_t index,
                              Address grad_loss, std::int64_t row_stride,
                              std::int64_t layer_stride, bool each, Address saved,
                              std::int64_t saved_per_layer, bool accumulate) {
  const Saved parts = saved_parts(pointer<float>(saved) + index * saved_per_layer, p, !each);
  BackwardIn in;
  in.row_stats = parts.row_stats;
  in.dz = parts.dz;
  in.grad_loss = pointer<const float>(grad_loss) + index * layer_stride;
  in.grad_loss_stride = row_stride;
  in.scale = parts.stats + kScale;
  in.grad = as_rows(std::get<8>(layer));
  in.accumulate = accumulate;
  return in;
}

}  // namespace oprd
