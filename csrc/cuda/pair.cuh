// One pair of rows: its loss, its statistics, and the gradient of the loss with respect to the
// first row. The formulas and the reasons for them are those of csrc/cpu/pair.h. The arithmetic is
// all in float32, for which a GPU has units, with few elements per thread. Rows whose squares
// overflow are summed again, scaled by a power of two.
//
// A Pair has each(f), which calls f(e, s, t) on the elements of this thread. e is the position of
// the element among those that were read together.
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

// s.s and t.t, and for mse also s.t and |s - t|^2.
enum Square { kSS = 0, kTT = 1, kST = 2, kDiff = 3 };

// The factors of s, t and s - t before squaring.
struct Factors {
  float s, t, diff;
};

constexpr float kShrink = 0x1p-96f;  // after it, no sum of squares over a row overflows
constexpr float kGrow = 0x1p96f;

// N sums, each in two chains. This halves the rounding error, and additions need not wait for each
// other.
template <int N>
struct Chains {
  Floats<N> even{}, odd{};

  __device__ __forceinline__ void add(int e, int n, float a, float b) {
    float& sum = e % 2 == 0 ? even.v[n] : odd.v[n];
    sum = fma(a, b, sum);
  }
  __device__ __forceinline__ Floats<N> sum() const {
    Floats<N> result;
#pragma unroll
    for (int n = 0; n < N; ++n) result.v[n] = even.v[n] + odd.v[n];
    return result;
  }
};

template <class Pair>
__device__ __forceinline__ Floats<2> squares(const Pair& pair) {
  Chains<2> sum;
  pair.each([&](int e, float s, float t) {
    sum.add(e, kSS, s, s);
    sum.add(e, kTT, t, t);
  });
  return sum.sum();
}

template <class Pair>
__device__ __forceinline__ Floats<4> scaled_squares(const Pair& pair, const Factors& by) {
  Chains<4> sum;
  pair.each([&](int e, float s, float t) {
    const float a = s * by.s, b = t * by.t, diff = s * by.diff - t * by.diff;
    sum.add(e, kSS, a, a);
    sum.add(e, kTT, b, b);
    sum.add(e, kST, a, b);
    sum.add(e, kDiff, diff, diff);
  });
  return sum.sum();
}

// {|s^ - t^|^2, s^ . (s^ - t^)}. The second is 1 - cos without cancellation.
template <class Pair>
__device__ __forceinline__ Floats<2> directions(const Pair& pair, float inv_s, float inv_t) {
  Chains<2> sum;
  pair.each([&](int e, float s, float t) {
    const float unit = s * inv_s;
    const float diff = unit - t * inv_t;
    sum.add(e, 0, diff, diff);
    sum.add(e, 1, unit, diff);
  });
  return sum.sum();
}

// This comparison is false for NaN, so NaN is neither clamped nor treated as a zero row.
__device__ __forceinline__ bool is_zero_row(float square) {
  return square <= static_cast<float>(kEps * kEps);
}
__device__ __forceinline__ float inverse_norm(float square) {
  return is_zero_row(square) ? static_cast<float>(1.0 / kEps) : rsqrt_rn(square);
}
__device__ __forceinline__ float factor_for(float square) {
  return square <= FLT_MAX ? 1.f : kShrink;
}

// All threads of the group must call this, and all get the result. inv_width is 1 / width.
template <class Pair, class Group>
__device__ __forceinline__ PairStats pair_stats(const Pair& pair, const Group& group, Kind kind,
                                                float inv_width) {
  const bool mse = kind == Kind::kMse;
  Floats<4> sum{};
  if (mse) {
    sum = group.template sum<0>(scaled_squares(pair, {1.f, 1.f, 1.f}));
  } else {
    const Floats<2> both = group.template sum<0>(squares(pair));
    sum.v[kSS] = both.v[kSS];
    sum.v[kTT] = both.v[kTT];
  }
  const Factors by{factor_for(sum.v[kSS]), factor_for(sum.v[kTT]), factor_for(sum.v[kDiff])};
  if (by.s != 1.f || by.t != 1.f || by.diff != 1.f) {
    sum = group.template sum<1>(scaled_squares(pair, by));
  }
  const float inv_s = inverse_norm(sum.v[kSS]), inv_t = inverse_norm(sum.v[kTT]);
  PairStats stats{0.f, inv_s * by.s, inv_t * by.t, 0.f};
  if (mse) {
    const float back = by.diff == 1.f ? 1.f : kGrow;
    stats.loss = sum.v[kDiff] * inv_width * back * back;
    stats.one_minus_cos = 1.f - sum.v[kST] * inv_s * inv_t;  // the scales of the factors cancel
  } else {
    const Floats<2> unit = group.template sum<2>(directions(pair, stats.inv_s, stats.inv_t));
    stats.loss = unit.v[0] * (kind == Kind::kNmse ? inv_width : 0.5f);
    stats.one_minus_cos = unit.v[1];
  }
  if (by.s == 1.f && is_zero_row(sum.v[kSS])) {  // no direction: cosine and gradient are 0
    stats.inv_s = 0.f;
    stats.one_minus_cos = 1.f;
  }
  return stats;
}

// coefficient * d loss / d s, element by element. The unit vectors are computed as in `directions`.
// The rounding errors of the norms then cancel in the difference as they do in 1 - cos, and equal
// rows give exactly 0.
struct PairGradient {
  bool mse;
  float inv_s, inv_t, minus_omc, outer;

  __device__ __forceinline__ PairGradient(const PairStats& stats, Kind kind, float inv_width,
                                          float coefficient)
      : mse(kind == Kind::kMse),
        inv_s(stats.inv_s),
        inv_t(stats.inv_t),
        minus_omc(-stats.one_minus_cos),
        outer(coefficient * (kind == Kind::kCosine ? 1.f : 2.f * inv_width) *
              (kind == Kind::kMse ? 1.f : stats.inv_s)) {}

  __device__ __forceinline__ float of(float s, float t) const {
    if (mse) return (s - t) * outer;
    const float unit = s * inv_s;
    return fma(minus_omc, unit, unit - t * inv_t) * outer;
  }
};

__device__ __forceinline__ void put_stats(float* row_loss, float* row_stats, i64 rows, i64 i,
                                          const PairStats& stats) {
  store(row_loss + i, stats.loss);
  store(row_stats + kInvStudentNorm * rows + i, stats.inv_s);
  store(row_stats + kInvTeacherNorm * rows + i, stats.inv_t);
  store(row_stats + kOneMinusCos * rows + i, stats.one_minus_cos);
}

__device__ __forceinline__ PairStats get_stats(const float* row_stats, i64 rows, i64 i) {
  return {0.f, load(row_stats + kInvStudentNorm * rows + i),
          load(row_stats + kInvTeacherNorm * rows + i), load(row_stats + kOneMinusCos * rows + i)};
}

}  // namespace cuda
}  // namespace oprd
