// Rows compared as they are. Forward: a warp or a block holds a pair of rows in registers between
// its uses, so that global memory is read once; rows too wide for that are read once a use.
// Backward needs no sums over a row: warps take pieces of rows.
#pragma once

#include "pair.cuh"

namespace oprd {
namespace cuda {

// The units of a pair that thread `thread` of `threads` takes: thread, thread + threads, ..
template <DType D, bool Vector>
struct PairAt {
  using U = Unit<D, Vector>;
  using type = typename U::type;

  const type* s;
  const type* t;
  i64 elements;
  int thread, threads;

  __device__ i64 width() const { return elements; }
  __device__ i64 units() const { return elements / U::kElements; }
};

template <DType D, bool Vector>
struct HeldPair : PairAt<D, Vector> {
  using typename PairAt<D, Vector>::U;

  typename U::Raw s_raw[U::kHeld], t_raw[U::kHeld];

  __device__ __forceinline__ explicit HeldPair(const PairAt<D, Vector>& at)
      : PairAt<D, Vector>(at) {
#pragma unroll
    for (int n = 0; n < U::kHeld; ++n) {
      const int u = this->thread + n * this->threads;
      const bool inside = u < this->units();
      s_raw[n] = inside ? U::load(this->s, u) : typename U::Raw{};  // adds 0 to every sum
      t_raw[n] = inside ? U::load(this->t, u) : typename U::Raw{};
    }
  }

  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int n = 0; n < U::kHeld; ++n) {
      const auto s = U::floats(s_raw[n]), t = U::floats(t_raw[n]);
#pragma unroll
      for (int e = 0; e < U::kElements; ++e) f(s.v[e], t.v[e]);
    }
  }

  // f(u, s, t) on the units there are.
  template <class F>
  __device__ __forceinline__ void each_unit(F f) const {
#pragma unroll
    for (int n = 0; n < U::kHeld; ++n) {
      const int u = this->thread + n * this->threads;
      if (u < this->units()) f(u, U::floats(s_raw[n]), U::floats(t_raw[n]));
    }
  }
};

template <DType D, bool Vector>
struct StreamedPair : PairAt<D, Vector> {
  using typename PairAt<D, Vector>::U;

  __device__ __forceinline__ explicit StreamedPair(const PairAt<D, Vector>& at)
      : PairAt<D, Vector>(at) {}

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    each_unit([&](i64, const auto& s, const auto& t) {
#pragma unroll
      for (int e = 0; e < U::kElements; ++e) f(s.v[e], t.v[e]);
    });
  }

  template <class F>
  __device__ __forceinline__ void each_unit(F f) const {
#pragma unroll 2
    for (i64 u = this->thread; u < this->units(); u += this->threads) {
      f(u, U::floats(U::load(this->s, u)), U::floats(U::load(this->t, u)));
    }
  }
};

template <class U, class Group>
__device__ __forceinline__ void put_zeros(typename U::type* row, i64 width, const Group& group) {
#pragma unroll 1
  for (i64 u = group.thread(); u < width / U::kElements; u += group.threads()) {
    U::store(row, u, Floats<U::kElements>{});
  }
}

template <DType D, bool Vector, class Group, template <DType, bool> class Pair>
__global__ void __launch_bounds__(Group::kMaxThreads)
    identity_forward(Problem p, ForwardOut out, Scale scale) {
  using U = Unit<D, Vector>;
  using type = typename U::type;
  const Group group;
  const i64 i = group.row();
  if (i >= p.rows) return;  // a whole warp that shares nothing
  const float w = weight(p, i);
  type* grad = out.grad.data ? row_of<type>(out.grad, i) : nullptr;
  if (w == 0.f) {
    if (group.is_first()) put_stats(p, out, i, PairStats{0.f, 0.f, 0.f, 0.f});
    if (grad) put_zeros<U>(grad, p.student_width, group);
    return;
  }
  const Pair<D, Vector> pair({row_of<const type>(p.student, student_row(p, i)),
                              row_of<const type>(p.teacher, teacher_row(p, i)), p.student_width,
                              group.thread(), group.threads()});
  const PairStats stats = pair_stats(pair, group, p.kind);
  if (group.is_first()) put_stats(p, out, i, stats);
  if (!grad) return;
  const float coefficient = value_of(scale) * w;
  if (coefficient == 0.f) return put_zeros<U>(grad, p.student_width, group);
  PairGradient gradient{};
  if (group.leads()) gradient = pair_gradient(p.student_width, stats, p.kind, coefficient);
  const Floats<3> factors = group.template share<2>(
      Floats<3>{{gradient.to_s, gradient.to_s_rest, gradient.to_t}});
  gradient = {p.kind == Kind::kMse, factors.v[0], factors.v[1], factors.v[2]};
  pair.each_unit([&](i64 u, const auto& s, const auto& t) {
    Floats<U::kElements> value;
#pragma unroll
    for (int e = 0; e < U::kElements; ++e) value.v[e] = gradient.of(s.v[e], t.v[e]);
    U::store(grad, u, value);
  });
}

// Warp `job` of the launch takes kHeld units a lane of one row.
template <DType D, bool Vector>
__global__ void __launch_bounds__(WarpGroup::kMaxThreads)
    identity_backward(Problem p, BackwardIn in, unsigned jobs_per_row) {
  using U = Unit<D, Vector>;
  using type = typename U::type;
  const WarpGroup warp;
  const unsigned job = static_cast<unsigned>(warp.row());
  const i64 i = job / jobs_per_row;
  if (i >= p.rows) return;
  const i64 units = p.student_width / U::kElements;
  const i64 first = i64{job % jobs_per_row} * (kWarp * U::kHeld) + warp.thread();
  const i64 n = student_row(p, i);
  type* grad = row_of<type>(in.grad, n);
  float coefficient;
  if (!coefficient_of(p, in, i, &coefficient)) {
    if (in.accumulate) return;
#pragma unroll
    for (int k = 0; k < U::kHeld; ++k) {
      if (first + k * kWarp < units) {
        U::store(grad, first + k * kWarp, Floats<U::kElements>{});
      }
    }
    return;
  }
  const type* student = row_of<const type>(p.student, n);
  const type* teacher = row_of<const type>(p.teacher, teacher_row(p, i));
  typename U::Raw s[U::kHeld], t[U::kHeld], old[U::kHeld];
#pragma unroll
  for (int k = 0; k < U::kHeld; ++k) {
    const i64 u = first + k * kWarp;
    const bool inside = u < units;
    s[k] = inside ? U::load(student, u) : typename U::Raw{};
    t[k] = inside ? U::load(teacher, u) : typename U::Raw{};
    old[k] = inside && in.accumulate ? U::load(grad, u) : typename U::Raw{};
  }
  const PairGradient gradient =
      pair_gradient(p.student_width, get_stats(p, in, i), p.kind, coefficient);
#pragma unroll
  for (int k = 0; k < U::kHeld; ++k) {
    const i64 u = first + k * kWarp;
    if (u >= units) continue;
    const auto a = U::floats(s[k]), b = U::floats(t[k]);
    auto value = U::floats(old[k]);
#pragma unroll
    for (int e = 0; e < U::kElements; ++e) {
      const float g = gradient.of(a.v[e], b.v[e]);
      value.v[e] = in.accumulate ? value.v[e] + g : g;
    }
    U::store(grad, u, value);
  }
}

template <DType D, bool Vector>
void launch_identity_forward(const Problem& p, const ForwardOut& out, const Scale& scale,
                             const Stream& stream) {
  using U = Unit<D, Vector>;
  const i64 units = p.student_width / U::kElements;
  if (units <= kWarp * U::kHeld) {
    const i64 blocks = (p.rows + kWarpRows - 1) / kWarpRows;
    launch({"identity_forward (a warp a row)", p, stream, blocks, WarpGroup::kMaxThreads},
           identity_forward<D, Vector, WarpGroup, HeldPair>, p, out, scale);
    return;
  }
  const i64 held = (units + U::kHeld - 1) / U::kHeld;
  const i64 threads = (held + kWarp - 1) / kWarp * kWarp;
  if (threads <= BlockGroup::kMaxThreads) {
    launch({"identity_forward (a block a row)", p, stream, p.rows, static_cast<int>(threads)},
           identity_forward<D, Vector, BlockGroup, HeldPair>, p, out, scale);
  } else {
    launch({"identity_forward (wide rows)", p, stream, p.rows, BlockGroup::kMaxThreads},
           identity_forward<D, Vector, BlockGroup, StreamedPair>, p, out, scale);
  }
}

template <DType D, bool Vector>
void launch_identity_backward(const Problem& p, const BackwardIn& in, const Stream& stream) {
  using U = Unit<D, Vector>;
  constexpr i64 kElementsPerJob = kWarp * U::kHeld * U::kElements;
  const i64 jobs_per_row = (p.student_width + kElementsPerJob - 1) / kElementsPerJob;
  const i64 blocks = (p.rows * jobs_per_row + kWarpRows - 1) / kWarpRows;
  launch({"identity_backward", p, stream, blocks, WarpGroup::kMaxThreads},
         identity_backward<D, Vector>, p, in, static_cast<unsigned>(jobs_per_row));
}

}  // namespace cuda
}  // namespace oprd
