// One pair of rows: its loss, its statistics, and the gradient of the loss with respect to the
// first row. Used on the hidden states themselves and, after projection, on z_S and z_T.
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

// Lanes are summed in float over blocks of this many elements. The blocks are summed in double.
constexpr i64 kBlock = 2048;

// s.s and t.t, and with Pair also s.t and |s - t|^2.
struct Squares {
  double ss, tt, st, diff;
};

// A pair of contiguous rows of one storage type, and the addresses of the pair to prefetch.
template <class S>
struct Source {
  const typename S::type* s;
  const typename S::type* t;
  const char* next_s;
  const char* next_t;
};

// Sums in double, for the elements after the last whole step, and for rows whose squares overflow
// float.
template <class S>
OPRD_INLINE Squares squares_in_double(const Source<S>& in, i64 begin, i64 end) {
  Squares sum{0, 0, 0, 0};
  for (i64 k = begin; k < end; ++k) {
    const double a = S::get(in.s[k]), b = S::get(in.t[k]);
    sum.ss += a * a;
    sum.tt += b * b;
    sum.st += a * b;
    sum.diff += (a - b) * (a - b);
  }
  return sum;
}

// The pass that brings both rows into L1. The last pass over a pair prefetches the next pair. With
// Pair this is the last pass; otherwise it is `directions`.
template <bool Pair, class S>
OPRD_INLINE Squares squares(const Source<S>& in, i64 width) {
  Squares sum{0, 0, 0, 0};
  constexpr i64 kBytes = sizeof(typename S::type);
  i64 k = 0;
  while (k + kStep <= width) {
    const i64 end = width - k < kBlock ? width : k + kBlock;
    F8 ss[2] = {}, tt[2] = {}, st[2] = {}, dd[2] = {};
    auto add = [&](int n, F8 a, F8 b) __attribute__((always_inline)) {
      ss[n] = fma(a, a, ss[n]);
      tt[n] = fma(b, b, tt[n]);
      if (Pair) {
        st[n] = fma(a, b, st[n]);
        dd[n] = fma(a - b, a - b, dd[n]);
      }
    };
    for (; k + kStep <= end; k += kStep) {
      if (Pair) {
        prefetch(in.next_s + k * kBytes);
        prefetch(in.next_t + k * kBytes);
      }
      const F16 s = S::load16(in.s + k), t = S::load16(in.t + k);
      add(0, s.a, t.a);
      add(1, s.b, t.b);
    }
    sum.ss += sum_lanes(ss[0] + ss[1]);
    sum.tt += sum_lanes(tt[0] + tt[1]);
    sum.st += sum_lanes(st[0] + st[1]);
    sum.diff += sum_lanes(dd[0] + dd[1]);
  }
  const Squares tail = squares_in_double(in, k, width);
  sum = {sum.ss + tail.ss, sum.tt + tail.tt, sum.st + tail.st, sum.diff + tail.diff};
  const bool finite = sum.ss <= FLT_MAX && sum.tt <= FLT_MAX && sum.diff <= FLT_MAX;
  return finite ? sum : squares_in_double(in, 0, width);
}

// {|s^ - t^|^2, s^ . (s^ - t^)}. The second is 1 - cos without cancellation. It uses the same
// rounded s^ as the gradient, because 1/|s| itself is only accurate to half an ulp. So it removes
// the radial part of the gradient up to rounding.
struct Directions {
  double distance, one_minus_cos;
};

template <class S>
OPRD_INLINE Directions directions(const Source<S>& in, i64 width, float inv_s, float inv_t) {
  Directions sum{0, 0};
  constexpr i64 kBytes = sizeof(typename S::type);
  const F8 inv_s8 = broadcast(inv_s), inv_t8 = broadcast(inv_t);
  i64 k = 0;
  while (k + kStep <= width) {
    const i64 end = width - k < kBlock ? width : k + kBlock;
    F8 distance[2] = {}, radial[2] = {};
    auto add = [&](int n, F8 a, F8 b) __attribute__((always_inline)) {
      const F8 unit = a * inv_s8;
      const F8 e = unit - b * inv_t8;
      distance[n] = fma(e, e, distance[n]);
      radial[n] = fma(unit, e, radial[n]);
    };
    for (; k + kStep <= end; k += kStep) {
      prefetch(in.next_s + k * kBytes);
      prefetch(in.next_t + k * kBytes);
      const F16 s = S::load16(in.s + k), t = S::load16(in.t + k);
      add(0, s.a, t.a);
      add(1, s.b, t.b);
    }
    sum.distance += sum_lanes(distance[0] + distance[1]);
    sum.one_minus_cos += sum_lanes(radial[0] + radial[1]);
  }
  for (; k < width; ++k) {
    const float unit = S::get(in.s[k]) * inv_s;
    const float e = unit - S::get(in.t[k]) * inv_t;
    sum.distance += e * e;
    sum.one_minus_cos += unit * e;
  }
  return sum;
}

template <class S>
OPRD_INLINE PairStats pair_stats(const Source<S>& in, i64 width, Kind kind) {
  const Squares sum = kind == Kind::kMse ? squares<true>(in, width) : squares<false>(in, width);
  const double norm_s = std::sqrt(sum.ss), norm_t = std::sqrt(sum.tt);
  PairStats stats;
  // These comparisons are false for NaN, so NaN is neither clamped nor treated as a zero row.
  stats.inv_s = static_cast<float>(1.0 / (norm_s <= kEps ? kEps : norm_s));
  stats.inv_t = static_cast<float>(1.0 / (norm_t <= kEps ? kEps : norm_t));
  if (kind == Kind::kMse) {
    stats.loss = static_cast<float>(sum.diff / static_cast<double>(width));
    stats.one_minus_cos = static_cast<float>(1.0 - sum.st * stats.inv_s * stats.inv_t);
  } else {
    const Directions unit = directions(in, width, stats.inv_s, stats.inv_t);
    const double divisor = kind == Kind::kNmse ? static_cast<double>(width) : 2.0;
    stats.loss = static_cast<float>(unit.distance / divisor);
    stats.one_minus_cos = static_cast<float>(unit.one_minus_cos);
  }
  if (norm_s <= kEps) {  // the row has no direction: cosine and gradient are 0
    stats.inv_s = 0.f;
    stats.one_minus_cos = 1.f;
  }
  return stats;
}

// coefficient * d loss / d s, element by element:
//   mse:     2 (s - t) / D
//   cosine:  ((s^ - t^) - (1 - cos) s^) / |s|;  nmse: 2 / D times that
// The second form is computed as (s * to_s - t * to_t) * outer, with to_s = cos / |s| and
// to_t = 1 / |t|. Of factors that hold `outer` already, 1 / |s|^2 would leave float's range long
// before the gradient does. Rounding to_s to float leaves a multiple of s, which for nearly
// parallel rows is as large as the gradient itself. The multiple, to_s_rest, is computed in double
// and added separately.
struct PairGradient {
  bool mse;
  float to_s, to_s_rest, to_t, outer;

  PairGradient(i64 width, const PairStats& stats, Kind kind, double coefficient)
      : mse(kind == Kind::kMse), to_t(stats.inv_t) {
    const double per_width = 2.0 / static_cast<double>(width);
    const double exact_s = stats.inv_s * (1.0 - static_cast<double>(stats.one_minus_cos));
    to_s = static_cast<float>(exact_s);
    to_s_rest = static_cast<float>(exact_s - to_s);
    outer = static_cast<float>(coefficient * (kind == Kind::kCosine ? 1.0 : per_width) *
                               (mse ? 1.0 : stats.inv_s));
  }

  template <bool Mse, class V>
  OPRD_INLINE V combine(V s, V t, V to_s, V to_s_rest, V to_t, V outer) {
    if (Mse) return (s - t) * outer;
    // Equal rows: equal products, exactly 0.
    return fma(s, to_s_rest, s * to_s - t * to_t) * outer;
  }
  __attribute__((always_inline)) F8 of(F8 s, F8 t) const {
    const F8 a = broadcast(to_s), rest = broadcast(to_s_rest), b = broadcast(to_t);
    const F8 by = broadcast(outer);
    return mse ? combine<true>(s, t, a, rest, b, by) : combine<false>(s, t, a, rest, b, by);
  }
  __attribute__((always_inline)) float of(float s, float t) const {
    return mse ? combine<true>(s, t, to_s, to_s_rest, to_t, outer)
               : combine<false>(s, t, to_s, to_s_rest, to_t, outer);
  }
};

}  // namespace
}  // namespace oprd
