// One pair of float rows: its loss, its statistics, and the gradient of the loss with respect to
// the first. Used on the hidden states themselves and, after projection, on z_S and z_T.
#pragma once

#include <cfloat>

#include "simd.h"

namespace oprd {
namespace {

struct PairStats {
  float loss;
  float inv_s;  // 1 / |s|, or 0 for a row of norm <= kEps: such a row gets gradient 0
  float inv_t;
  float one_minus_cos;
};

// Lanes are summed in float over this many elements, then the blocks in double.
constexpr i64 kBlock = 2048;

// s.s and t.t; with Pair also s.t and |s - t|^2.
struct Squares {
  double ss, tt, st, diff;
};

OPRD_INLINE Squares squares_in_double(const float* s, const float* t, i64 width) {
  Squares sum{0, 0, 0, 0};
  for (i64 k = 0; k < width; ++k) {
    const double a = s[k], b = t[k];
    sum.ss += a * a;
    sum.tt += b * b;
    sum.st += a * b;
    sum.diff += (a - b) * (a - b);
  }
  return sum;
}

template <bool Pair>
OPRD_INLINE Squares squares(const float* s, const float* t, i64 width) {
  Squares sum{0, 0, 0, 0};
  i64 k = 0;
  while (k + kLanes <= width) {
    const i64 end = width - k < kBlock ? width : k + kBlock;
    F8 ss[2] = {}, tt[2] = {}, st[2] = {}, dd[2] = {};
    auto step = [&](int n, i64 at) __attribute__((always_inline)) {
      const F8 a = Float::load(s + at), b = Float::load(t + at);
      ss[n] = fma(a, a, ss[n]);
      tt[n] = fma(b, b, tt[n]);
      if (Pair) {
        st[n] = fma(a, b, st[n]);
        dd[n] = fma(a - b, a - b, dd[n]);
      }
    };
    for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
      step(0, k);
      step(1, k + kLanes);
    }
    for (; k + kLanes <= end; k += kLanes) step(0, k);
    sum.ss += sum_lanes(ss[0] + ss[1]);
    sum.tt += sum_lanes(tt[0] + tt[1]);
    sum.st += sum_lanes(st[0] + st[1]);
    sum.diff += sum_lanes(dd[0] + dd[1]);
  }
  const Squares tail = squares_in_double(s + k, t + k, width - k);
  sum = {sum.ss + tail.ss, sum.tt + tail.tt, sum.st + tail.st, sum.diff + tail.diff};
  // The squares of floats may overflow float.
  const bool finite = sum.ss <= FLT_MAX && sum.tt <= FLT_MAX && sum.diff <= FLT_MAX;
  return finite ? sum : squares_in_double(s, t, width);
}

// {|s^ - t^|^2, s^ . (s^ - t^)}. The second is 1 - cos without cancellation, and because it is
// measured with the very s^ that the gradient uses, it takes the radial part out of the gradient
// to rounding: 1/|s| itself is only good to half an ulp.
struct Directions {
  double distance, one_minus_cos;
};

OPRD_INLINE Directions directions(const float* s, const float* t, i64 width, float inv_s,
                                  float inv_t) {
  Directions sum{0, 0};
  const F8 inv_s8 = broadcast(inv_s), inv_t8 = broadcast(inv_t);
  i64 k = 0;
  while (k + kLanes <= width) {
    const i64 end = width - k < kBlock ? width : k + kBlock;
    F8 distance[2] = {}, radial[2] = {};
    auto step = [&](int n, i64 at) __attribute__((always_inline)) {
      const F8 unit = Float::load(s + at) * inv_s8;
      const F8 e = unit - Float::load(t + at) * inv_t8;
      distance[n] = fma(e, e, distance[n]);
      radial[n] = fma(unit, e, radial[n]);
    };
    for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
      step(0, k);
      step(1, k + kLanes);
    }
    for (; k + kLanes <= end; k += kLanes) step(0, k);
    sum.distance += sum_lanes(distance[0] + distance[1]);
    sum.one_minus_cos += sum_lanes(radial[0] + radial[1]);
  }
  for (; k < width; ++k) {
    const float unit = s[k] * inv_s;
    const float e = unit - t[k] * inv_t;
    sum.distance += e * e;
    sum.one_minus_cos += unit * e;
  }
  return sum;
}

OPRD_INLINE PairStats pair_stats(const float* s, const float* t, i64 width, Kind kind) {
  const Squares sum =
      kind == Kind::kMse ? squares<true>(s, t, width) : squares<false>(s, t, width);
  const double norm_s = std::sqrt(sum.ss), norm_t = std::sqrt(sum.tt);
  PairStats stats;
  // Written so that NaN is neither clamped nor taken for a zero row.
  stats.inv_s = static_cast<float>(1.0 / (norm_s <= kEps ? kEps : norm_s));
  stats.inv_t = static_cast<float>(1.0 / (norm_t <= kEps ? kEps : norm_t));
  if (kind == Kind::kMse) {
    stats.loss = static_cast<float>(sum.diff / static_cast<double>(width));
    stats.one_minus_cos = static_cast<float>(1.0 - sum.st * stats.inv_s * stats.inv_t);
  } else {
    const Directions unit = directions(s, t, width, stats.inv_s, stats.inv_t);
    const double divisor = kind == Kind::kNmse ? static_cast<double>(width) : 2.0;
    stats.loss = static_cast<float>(unit.distance / divisor);
    stats.one_minus_cos = static_cast<float>(unit.one_minus_cos);
  }
  if (norm_s <= kEps) {  // no direction: cosine 0, gradient 0
    stats.inv_s = 0.f;
    stats.one_minus_cos = 1.f;
  }
  return stats;
}

// coefficient * d loss / d s, element by element: `at8` gives lanes, `at1` a single one.
//   mse:     2 (s - t) / D
//   cosine:  ((s^ - t^) - (1 - cos) s^) / |s|;  nmse: 2 / D times that
struct PairGradient {
  const float* s;
  const float* t;
  float s_scale, t_scale, radial, outer;

  PairGradient(const float* s, const float* t, i64 width, const PairStats& stats, Kind kind,
               float coefficient)
      : s(s), t(t) {
    const float per_width = 2.f / static_cast<float>(width);
    if (kind == Kind::kMse) {
      s_scale = t_scale = 1.f;
      radial = 0.f;
      outer = coefficient * per_width;
    } else {
      s_scale = stats.inv_s;
      t_scale = stats.inv_t;
      radial = stats.one_minus_cos;
      outer = coefficient * (kind == Kind::kNmse ? per_width : 1.f) * stats.inv_s;
    }
  }

  OPRD_INLINE F8 combine(F8 unit_s, F8 unit_t, const PairGradient& g) {
    return ((unit_s - unit_t) - unit_s * broadcast(g.radial)) * broadcast(g.outer);
  }
  __attribute__((always_inline)) F8 at8(i64 k) const {
    return combine(Float::load(s + k) * broadcast(s_scale), Float::load(t + k) * broadcast(t_scale),
                   *this);
  }
  __attribute__((always_inline)) float at1(i64 k) const {
    const float unit_s = s[k] * s_scale;
    return ((unit_s - t[k] * t_scale) - unit_s * radial) * outer;
  }
};

}  // namespace
}  // namespace oprd
