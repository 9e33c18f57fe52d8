// Kernels without a projection. In forward, a warp, or a block for wider rows, holds a pair of rows
// in registers between uses. Global memory is thus read once, and all loads are issued before the
// first use. Rows that are too wide for this are read again for every use. Backward needs no sums
// over a row, so warps process chunks of rows.
#pragma once

#include "pair.cuh"

namespace oprd {
namespace cuda {

// The units of a pair that lane `lane` of warp `warp` processes: every step-th unit, so that
// neighbouring lanes have neighbouring units, and all lanes have about as many.
template <DType D, bool Vector>
struct PairAt {
  using U = Unit<D, Vector>;
  using type = typename U::type;

  const type *s, *t;
  int units;
  int lane, warp, warps;

  __device__ int first() const { return warp * kWarp + lane; }
  __device__ int step() const { return warps * kWarp; }
};

template <DType D, bool Vector, int Held>
struct HeldPair : PairAt<D, Vector> {
  using typename PairAt<D, Vector>::U;
  using Raw = typename U::Raw;

  Raw s_raw[Held], t_raw[Held];

  __device__ __forceinline__ explicit HeldPair(const PairAt<D, Vector>& at)
      : PairAt<D, Vector>(at) {
#pragma unroll
    for (int n = 0; n < Held; ++n) s_raw[n] = has(n) ? U::load(this->s, unit(n)) : Raw{};
#pragma unroll
    for (int n = 0; n < Held; ++n) t_raw[n] = has(n) ? U::load(this->t, unit(n)) : Raw{};
  }

  __device__ __forceinline__ int unit(int n) const { return this->first() + n * this->step(); }
  __device__ __forceinline__ bool has(int n) const { return unit(n) < this->units; }
  // Whether any lane of the warp has unit n. A lane without it adds 0 to every sum. This branch
  // also stops the compiler from keeping the elements of one pass for the next, which would take
  // twice the registers.
  __device__ __forceinline__ bool warp_has(int n) const {
    return this->warp * kWarp + n * this->step() < this->units;
  }

  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int n = 0; n < Held; ++n) {
      if (!warp_has(n)) continue;
      const auto s = U::floats(s_raw[n]), t = U::floats(t_raw[n]);
#pragma unroll
      for (int e = 0; e < U::kElements; ++e) f(U::kElements == 1 ? n : e, s.v[e], t.v[e]);
    }
  }

  // Calls f(u, s, t) on all units of this lane.
  template <class F>
  __device__ __forceinline__ void each_unit(F f) const {
#pragma unroll
    for (int n = 0; n < Held; ++n) {
      if (has(n)) f(unit(n), U::floats(s_raw[n]), U::floats(t_raw[n]));
    }
  }
};

template <DType D, bool Vector, int>
struct StreamedPair : PairAt<D, Vector> {
  using typename PairAt<D, Vector>::U;

  __device__ __forceinline__ explicit StreamedPair(const PairAt<D, Vector>& at)
      : PairAt<D, Vector>(at) {}

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    each_unit([&](int, const auto& s, const auto& t) {
#pragma unroll
      for (int e = 0; e < U::kElements; ++e) f(e, s.v[e], t.v[e]);
    });
  }

  template <class F>
  __device__ __forceinline__ void each_unit(F f) const {
#pragma unroll 2
    for (int u = this->first(); u < this->units; u += this->step()) {
      f(u, U::floats(U::load(this->s, u)), U::floats(U::load(this->t, u)));
    }
  }
};

template <class U, class Group>
__device__ __forceinline__ void put_zeros(typename U::type* row, int units, const Group& group) {
#pragma unroll 1
  for (int u = group.warp() * kWarp + group.lane(); u < units; u += group.warps() * kWarp) {
    U::store(row, u, Floats<U::kElements>{});
  }
}

template <DType D, bool Vector, int Held, class Group, template <DType, bool, int> class Pair>
__global__ void
__launch_bounds__(Group::kMaxThreads, Group::kMinBlocks)
    identity_forward(const __grid_constant__ Parameter<IdentityForward> call) {
  using U = Unit<D, Vector>;
  using type = typename U::type;
  const Group group;
  const auto& layer = call.layers[blockIdx.y];
  const Batch& batch = call.batch;
  reset_ticket(call.tickets);
  const i64 i = group.row();
  if (i >= batch.rows) return;  // this affects whole warps, which share nothing with other warps
  const float w = weight(batch, i);
  const int width = layer.width;
  type* grad = layer.grad.data ? row_of<type>(layer.grad, i) : nullptr;
  if (w == 0.f) {
    if (group.is_first()) {
      put_stats(layer.row_loss, layer.row_stats, batch.rows, i, PairStats{0.f, 0.f, 0.f, 0.f});
    }
    if (grad) put_zeros<U>(grad, width / U::kElements, group);
    return;
  }
  const Pair<D, Vector, Held> pair(
      {row_of<const type>(layer.student, student_row(batch, i)),
       row_of<const type>(layer.teacher, teacher_row(batch, i)), width / U::kElements, group.lane(),
       group.warp(), group.warps()});
  const float coefficient = grad ? value_of(call.scale) * w : 0.f;
  const float inv_width = 1.f / static_cast<float>(width);
  const PairStats stats = pair_stats(pair, group, batch.kind, inv_width);
  if (group.is_first()) put_stats(layer.row_loss, layer.row_stats, batch.rows, i, stats);
  if (!grad) return;
  if (coefficient == 0.f) return put_zeros<U>(grad, width / U::kElements, group);
  const PairGradient gradient(stats, batch.kind, inv_width, coefficient);
  pair.each_unit([&](int u, const auto& s, const auto& t) {
    Floats<U::kElements> value;
#pragma unroll
    for (int e = 0; e < U::kElements; ++e) value.v[e] = gradient.of(s.v[e], t.v[e]);
    U::store(grad, u, value);
  });
}


// 1 << log_split warps share a row, usually a chunk each, so that all loads are issued before the
// first use. Whole says that rows consist of whole chunks.
template <DType D, bool Vector, int Chunk, bool Whole>
__global__ void __launch_bounds__(WarpGroup::kMaxThreads)
    identity_backward(const __grid_constant__ Parameter<IdentityBackward> call) {
  using U = Unit<D, Vector>;
  using type = typename U::type;
  using Raw = typename U::Raw;
  const auto& layer = call.layers[blockIdx.y];
  const Batch& batch = call.batch;
  const i64 warp = WarpGroup{}.row();
  const i64 i = warp >> call.log_split;
  const int units = layer.width / U::kElements;
  const int first = (static_cast<int>(warp) & ((1 << call.log_split) - 1)) * (kWarp * Chunk);
  if (i >= batch.rows || first >= units) return;
  const float w = weight(batch, i);
  const i64 n = student_row(batch, i);
  type* grad = row_of<type>(layer.grad, n);
  const float scale = load(call.scale);
  const int step = (kWarp * Chunk) << call.log_split;
  const int lane = threadIdx.x % kWarp;
  if (w == 0.f || scale == 0.f) {  // gradient 0, whatever the row holds
    if (call.accumulate) return;
#pragma unroll 1
    for (int begin = first; begin < units; begin += step) {
#pragma unroll
      for (int k = 0; k < Chunk; ++k) {
        const int u = begin + k * kWarp + lane;
        if (u < units) U::store(grad, u, Floats<U::kElements>{});
      }
    }
    return;
  }
  const type* student = row_of<const type>(layer.student, n);
  const type* teacher = row_of<const type>(layer.teacher, teacher_row(batch, i));
  const float g = load(layer.grad_loss + i * call.grad_loss_stride);
  const PairGradient gradient(get_stats(layer.row_stats, batch.rows, i), batch.kind,
                              1.f / static_cast<float>(layer.width), g * scale * w);
#pragma unroll 1
  for (int begin = first; begin < units; begin += step) {
    const auto has = [&](int k) { return Whole || begin + k * kWarp + lane < units; };
    const int at = begin + lane;
    Raw s[Chunk], t[Chunk], old[Chunk];
#pragma unroll
    for (int k = 0; k < Chunk; ++k) {
      s[k] = has(k) ? U::load(student, at + k * kWarp) : Raw{};
      t[k] = has(k) ? U::load(teacher, at + k * kWarp) : Raw{};
    }
    if (call.accumulate) {
#pragma unroll
      for (int k = 0; k < Chunk; ++k) {
        old[k] = has(k) ? U::load(grad, at + k * kWarp) : Raw{};
      }
    }
#pragma unroll
    for (int k = 0; k < Chunk; ++k) {
      if (!has(k)) continue;
      const auto a = U::floats(s[k]), b = U::floats(t[k]);
      Floats<U::kElements> value;
#pragma unroll
      for (int e = 0; e < U::kElements; ++e) value.v[e] = gradient.of(a.v[e], b.v[e]);
      if (call.accumulate) {
        const auto c = U::floats(old[k]);
#pragma unroll
        for (int e = 0; e < U::kElements; ++e) value.v[e] = c.v[e] + value.v[e];
      }
      U::store(grad, at + k * kWarp, value);
    }
  }
}

// warps_for: the number of warps that hold a row of `units` units, or 0 if the row is too wide.
template <bool Vector>
constexpr int kHeld = Vector ? 8 : 16;  // units per lane
inline int warps_for(bool vector, i64 units) {
  const i64 of_warp = (vector ? kHeld<true> : kHeld<false>) * kWarp;
  const i64 warps = units > of_warp ? (units + of_warp - 1) / of_warp : 1;
  return warps > BlockGroup::kMaxThreads / kWarp ? 0 : static_cast<int>(warps);
}

template <DType D, bool Vector>
void launch_forward_as(const IdentityForward& call, int warps, Launch as) {
  constexpr int kUnits = kHeld<Vector>;
  if (warps == 0) {
    as.kernel = "identity_forward (wide rows)";
    as.threads = BlockGroup::kMaxThreads;
    launch(as, identity_forward<D, Vector, 1, BlockGroup, StreamedPair>, call);
  } else if (warps == 1) {
    as.kernel = "identity_forward (a warp a row)";
    as.blocks = (call.batch.rows + kWarpRows - 1) / kWarpRows;
    as.threads = WarpGroup::kMaxThreads;
    launch(as, identity_forward<D, Vector, kUnits, WarpGroup, HeldPair>, call);
  } else {
    as.kernel = "identity_forward (a block a row)";
    as.threads = warps * kWarp;
    launch(as, identity_forward<D, Vector, kUnits, BlockGroup, HeldPair>, call);
  }
}

template <DType D>
void launch_identity_forward(const Problem* problems, const ForwardOut* outs, int layers,
                             const Scale& scale, double* tickets, const Stream& stream) {
  auto vectors = [&](int layer) {
    const Problem& p = problems[layer];
    const i64 width = p.student_width;
    return takes_vectors(p.student, width) && takes_vectors(p.teacher, width) &&
           (!outs[layer].grad.data || takes_vectors(outs[layer].grad, width));
  };
  auto warps = [&](int layer) {
    const i64 width = problems[layer].student_width;
    return vectors(layer) ? warps_for(true, width / Unit<D, true>::kElements)
                          : warps_for(false, width);
  };
  auto same = [&](int a, int b) { return vectors(a) == vectors(b) && warps(a) == warps(b); };
  for_runs(layers, same, [&](int first, int count) {
    IdentityForward call;
    call.batch = batch(problems[first]);
    call.scale = scale;
    call.tickets = tickets ? tickets + first : nullptr;
    for (int n = 0; n < count; ++n) {
      const Problem& p = problems[first + n];
      const ForwardOut& out = outs[first + n];
      call.layers[n] = {strided(p.student), strided(p.teacher), strided(out.grad), out.row_loss,
                        out.row_stats, static_cast<std::int32_t>(p.student_width)};
    }
    const Launch as{"", problems[first], stream, call.batch.rows, 0, count};
    if (vectors(first)) {
      launch_forward_as<D, true>(call, warps(first), as);
    } else {
      launch_forward_as<D, false>(call, warps(first), as);
    }
  });
}

template <DType D, bool Vector, int Chunk, bool Whole>
void launch_chunks_backward(IdentityBackward& call, int units, Launch launch_as) {
  const i64 rows = call.batch.rows;
  call.log_split = 0;
  const auto blocks = [&](int log_split) {
    return ((rows << log_split) + kWarpRows - 1) / kWarpRows;
  };
  while (i64{kWarp * Chunk} << call.log_split < units && blocks(call.log_split + 1) <= kMaxBlocks) {
    ++call.log_split;
  }
  launch_as.kernel = "identity_backward";
  launch_as.blocks = blocks(call.log_split);
  launch_as.threads = WarpGroup::kMaxThreads;
  launch(launch_as, identity_backward<D, Vector, Chunk, Whole>, call);
}

template <DType D>
void launch_identity_backward(const Problem* problems, const BackwardIn* ins, int layers,
                              const Stream& stream) {
  auto vectors = [&](int layer) {
    const Problem& p = problems[layer];
    const i64 width = p.student_width;
    return takes_vectors(p.student, width) && takes_vectors(p.teacher, width) &&
           takes_vectors(ins[layer].grad, width);
  };
  auto same = [&](int a, int b) {
    return problems[a].student_width == problems[b].student_width && vectors(a) == vectors(b);
  };
  for_runs(layers, same, [&](int first, int count) {
    IdentityBackward call;
    call.batch = batch(problems[first]);
    call.scale = ins[first].scale;
    call.grad_loss_stride = ins[first].grad_loss_stride;
    call.accumulate = ins[first].accumulate;
    for (int n = 0; n < count; ++n) {
      const Problem& p = problems[first + n];
      const BackwardIn& in = ins[first + n];
      call.layers[n] = {strided(p.student), strided(p.teacher), strided(in.grad), in.row_stats,
                        in.grad_loss, static_cast<std::int32_t>(p.student_width)};
    }
    const int width = static_cast<int>(problems[first].student_width);
    const int units = width / Unit<D, true>::kElements;
    const Launch as{"", problems[first], stream, 0, 0, count};
    if (!vectors(first)) return launch_chunks_backward<D, false, 16, false>(call, width, as);
    if (units % (4 * kWarp) == 0) return launch_chunks_backward<D, true, 4, true>(call, units, as);
    if (units % (3 * kWarp) == 0) return launch_chunks_backward<D, true, 3, true>(call, units, as);
    return launch_chunks_backward<D, true, 4, false>(call, units, as);
  });
}

}  // namespace cuda
}  // namespace oprd
