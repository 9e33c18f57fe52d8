// One pair of rows: its loss, its statistics, and the gradient of the loss with respect to the
// first. The formulas, and the reasons for them, are those of csrc/cpu/pair.h; the arithmetic
// differs where a GPU's does: a group of threads sums in float, over few elements each, and rows
// whose squares overflow are summed again scaled by a power of two, not in double.
//
// A Pair has width() and each(f), which calls f(s, t) on the elements of this thread.
#pragma once

#include <cfloat>

#include "storage.cuh"

namespace oprd {
namespace cuda {

struct PairStats {
  float loss;
  float inv_s;  // 1 / |s|, or 0 for a row of norm <= kEps: such a row gets gradient 0
  float inv_t;
  float one_minus_cos;
};

// s.s and t.t; for mse also s.t and |s - t|^2. Each factor is applied before squaring.
enum Square { kSS = 0, kTT = 1, kST = 2, kDiff = 3 };

struct Factors {
  float s, t, diff;
};

constexpr float kShrink = 0x1p-96f;  // brings any float's square, summed over any row, into range

template <class Pair>
__device__ __forceinline__ Floats<4> squares(const Pair& pair, bool mse) {
  Floats<4> sum{};
  if (mse) {
    pair.each([&](float s, float t) {
      const float e = s - t;
      sum.v[kSS] = fma(s, s, sum.v[kSS]);
      sum.v[kTT] = fma(t, t, sum.v[kTT]);
      sum.v[kST] = fma(s, t, sum.v[kST]);
      sum.v[kDiff] = fma(e, e, sum.v[kDiff]);
    });
  } else {
    pair.each([&](float s, float t) {
      sum.v[kSS] = fma(s, s, sum.v[kSS]);
      sum.v[kTT] = fma(t, t, sum.v[kTT]);
    });
  }
  return sum;
}

template <class Pair>
__device__ __forceinline__ Floats<4> scaled_squares(const Pair& pair, const Factors& by) {
  Floats<4> sum{};
  pair.each([&](float s, float t) {
    const float a = s * by.s, b = t * by.t, e = s * by.diff - t * by.diff;
    sum.v[kSS] = fma(a, a, sum.v[kSS]);
    sum.v[kTT] = fma(b, b, sum.v[kTT]);
    sum.v[kST] = fma(a, b, sum.v[kST]);
    sum.v[kDiff] = fma(e, e, sum.v[kDiff]);
  });
  return sum;
}

// Written so that NaN is neither clamped nor taken for a zero row.
__device__ __forceinline__ bool is_zero_row(double square) { return square <= kEps * kEps; }

__device__ __forceinline__ float inverse_norm(double square) {
  return static_cast<float>(1.0 / (is_zero_row(square) ? kEps : sqrt(square)));
}

// {|s^ - t^|^2, s^ . (s^ - t^)}: the second is 1 - cos without cancellation.
template <class Pair>
__device__ __forceinline__ Floats<2> directions(const Pair& pair, float inv_s, float inv_t) {
  Floats<2> sum{};
  pair.each([&](float s, float t) {
    const float unit = s * inv_s;
    const float e = unit - t * inv_t;
    sum.v[0] = fma(e, e, sum.v[0]);
    sum.v[1] = fma(unit, e, sum.v[1]);
  });
  return sum;
}

// For the threads that lead the group; all of it must call.
template <class Pair, class Group>
__device__ __forceinline__ PairStats pair_stats(const Pair& pair, const Group& group, Kind kind) {
  const bool mse = kind == Kind::kMse;
  Doubles<4> sum = group.sum(squares(pair, mse));
  Floats<5> known{};  // 1 / |s|, 1 / |t|, and what to scale by where squares overflowed
  if (group.leads()) {
    auto factor = [](double square) { return square <= FLT_MAX ? 1.f : kShrink; };
    known = {{inverse_norm(sum.v[kSS]), inverse_norm(sum.v[kTT]), factor(sum.v[kSS]),
              factor(sum.v[kTT]), factor(sum.v[kDiff])}};
  }
  known = group.template share<0>(known);
  const Factors by{known.v[2], known.v[3], known.v[4]};
  if (by.s != 1.f || by.t != 1.f || by.diff != 1.f) {
    sum = group.sum(scaled_squares(pair, by));
    Floats<2> inverse{};
    if (group.leads()) {
      const double s = by.s, t = by.t, diff = by.diff;
      sum.v[kSS] /= s * s;
      sum.v[kTT] /= t * t;
      sum.v[kST] /= s * t;
      sum.v[kDiff] /= diff * diff;
      inverse = {{inverse_norm(sum.v[kSS]), inverse_norm(sum.v[kTT])}};
    }
    inverse = group.template share<1>(inverse);
    known.v[0] = inverse.v[0];
    known.v[1] = inverse.v[1];
  }
  PairStats stats{0.f, known.v[0], known.v[1], 0.f};
  const double width = static_cast<double>(pair.width());
  if (mse) {
    stats.loss = static_cast<float>(sum.v[kDiff] / width);
    stats.one_minus_cos = static_cast<float>(1.0 - sum.v[kST] * stats.inv_s * stats.inv_t);
  } else {
    const Doubles<2> unit = group.sum(directions(pair, stats.inv_s, stats.inv_t));
    stats.loss = static_cast<float>(unit.v[0] / (kind == Kind::kNmse ? width : 2.0));
    stats.one_minus_cos = static_cast<float>(unit.v[1]);
  }
  if (is_zero_row(sum.v[kSS])) {  // no direction: cosine 0, gradient 0
    stats.inv_s = 0.f;
    stats.one_minus_cos = 1.f;
  }
  return stats;
}

// coefficient * d loss / d s, element by element, from factors formed in double once a row; see
// PairGradient in csrc/cpu/pair.h.
struct PairGradient {
  bool mse;
  float to_s, to_s_rest, to_t;

  __device__ __forceinline__ float of(float s, float t) const {
    if (mse) return (s - t) * to_s;
    return fma(s, to_s_rest, s * to_s - t * to_t);  // equal rows: equal products, exactly 0
  }
};

__device__ __forceinline__ PairGradient pair_gradient(i64 width, const PairStats& stats, Kind kind,
                                                      float coefficient) {
  const double per_width = 2.0 / static_cast<double>(width);
  PairGradient g{kind == Kind::kMse, 0.f, 0.f, 0.f};
  if (g.mse) {
    g.to_s = static_cast<float>(coefficient * per_width);
    return g;
  }
  const double outer =
      static_cast<double>(coefficient) * (kind == Kind::kNmse ? per_width : 1.0) * stats.inv_s;
  const double cos = 1.0 - static_cast<double>(stats.one_minus_cos);
  const double exact_t = outer * stats.inv_t;
  const double exact_s = outer * stats.inv_s * cos;
  g.to_t = static_cast<float>(exact_t);
  g.to_s = static_cast<float>(exact_s);
  // What rounding took from to_t counts as a multiple of s too: along s^, t is |t| / |s| of it.
  const double t_per_s = stats.inv_t > 0.f ? stats.inv_s / static_cast<double>(stats.inv_t) : 0.0;
  g.to_s_rest = static_cast<float>((exact_s - g.to_s) - (exact_t - g.to_t) * t_per_s * cos);
  if (!(g.to_s_rest == g.to_s_rest)) g.to_s_rest = 0.f;
  return g;
}

__device__ __forceinline__ void put_stats(const Problem& p, const ForwardOut& out, i64 i,
                                          const PairStats& stats) {
  store(out.row_loss + i, stats.loss);
  store(out.row_stats + kInvStudentNorm * p.rows + i, stats.inv_s);
  store(out.row_stats + kInvTeacherNorm * p.rows + i, stats.inv_t);
  store(out.row_stats + kOneMinusCos * p.rows + i, stats.one_minus_cos);
}

__device__ __forceinline__ PairStats get_stats(const Problem& p, const BackwardIn& in, i64 i) {
  auto stat = [&](i64 which) { return load(in.row_stats + which * p.rows + i); };
  return {0.f, stat(kInvStudentNorm), stat(kInvTeacherNorm), stat(kOneMinusCos)};
}

// What the chain rule multiplies row i's gradient by; false: the row gets gradient 0 whatever it
// holds, because it is masked or the denominator was 0.
__device__ __forceinline__ bool coefficient_of(const Problem& p, const BackwardIn& in, i64 i,
                                               float* coefficient) {
  const float w = weight(p, i), scale = load(in.scale);
  if (w == 0.f || scale == 0.f) return false;
  *coefficient = load(in.grad_loss + i * in.grad_loss_stride) * scale * w;
  return true;
}

}  // namespace cuda
}  // namespace oprd
