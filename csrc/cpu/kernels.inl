// The row loops. Compiled once per instruction set, see kernels_*.cpp.

#include "kernels.h"
#include "pair.h"
#include "project.h"

namespace oprd {
namespace {

i64 student_row(const Problem& p, i64 i) { return p.student_rows ? p.student_rows[i] : i; }
i64 teacher_row(const Problem& p, i64 i) { return p.teacher_rows ? p.teacher_rows[i] : i; }
float weight(const Problem& p, i64 i) { return p.weights ? p.weights[i] : 1.f; }

i64 padded(i64 floats) { return (floats + 15) / 16 * 16; }

void put_stats(const ForwardOut& out, i64 i, const PairStats& stats) {
  out.row_loss[i] = stats.loss;
  float* row = out.row_stats + i * kRowStats;
  row[kInvStudentNorm] = stats.inv_s;
  row[kInvTeacherNorm] = stats.inv_t;
  row[kOneMinusCos] = stats.one_minus_cos;
}

PairStats get_stats(const BackwardIn& in, i64 i) {
  const float* row = in.row_stats + i * kRowStats;
  return {0.f, row[kInvStudentNorm], row[kInvTeacherNorm], row[kOneMinusCos]};
}

// Rows that get gradient 0 whatever they hold: masked ones, and all of them where the denominator
// was 0.
bool no_gradient(const Problem& p, const BackwardIn& in, i64 i) {
  return weight(p, i) == 0.f || *in.scale == 0.f;
}

void put_zeros(const Rows& grad, i64 n, i64 width) {
  store_row(
      grad, n, width, false, [](i64) { return F8{}; }, [](i64) { return 0.f; });
}

template <class S>
const typename S::type* row_of(const Rows& rows, i64 n) {
  return static_cast<const typename S::type*>(rows.data) + row_offset(rows, n);
}

// Pair i as it lies in memory: both rows of type S and contiguous.
template <class S>
Source<S> pair_in_place(const Problem& p, i64 i, i64 next) {
  return {row_of<S>(p.student, student_row(p, i)), row_of<S>(p.teacher, teacher_row(p, i)),
          row_begin(p.student, student_row(p, next)), row_begin(p.teacher, teacher_row(p, next))};
}

// Pair i as floats, converted into scratch where need be: for mixed types and any strides.
Source<Float> pair_as_floats(const Problem& p, i64 i, float* scratch) {
  const i64 width = p.student_width;
  const float* s = load_row(p.student, student_row(p, i), width, scratch);
  const float* t = load_row(p.teacher, teacher_row(p, i), width, scratch + padded(width));
  return {s, t, reinterpret_cast<const char*>(s), reinterpret_cast<const char*>(t)};
}

// Calls f(get) with the fastest way to get pair i (and have pair `next` fetched): get(i, next)
// returns a Source.
template <class F>
void with_pairs(const Problem& p, float* scratch, F f) {
  if (p.student.dtype == p.teacher.dtype && p.student.stride_last == 1 &&
      p.teacher.stride_last == 1) {
    with_storage(p.student.dtype, [&](auto storage) {
      f([&](i64 i, i64 next) { return pair_in_place<decltype(storage)>(p, i, next); });
    });
  } else {
    f([&](i64 i, i64) { return pair_as_floats(p, i, scratch); });
  }
}

// The same type in and out, contiguous: sixteen elements at a time, order left to the type.
template <bool Mse, class S>
void put_gradient_alike(typename S::type* row, i64 width, bool accumulate, const Source<S>& in,
                        const PairGradient& gradient) {
  const PairGradient g = gradient;  // a copy that stores to row can't alias
  const F8 to_s = broadcast(g.to_s), rest = broadcast(g.to_s_rest), to_t = broadcast(g.to_t);
  auto combine = [&](F8 s, F8 t) __attribute__((always_inline)) {
    return PairGradient::combine<Mse>(s, t, to_s, rest, to_t);
  };
  i64 k = 0;
  for (; k + kStep <= width; k += kStep) {
    const F16 s = S::load16(in.s + k), t = S::load16(in.t + k);
    F16 value{combine(s.a, t.a), combine(s.b, t.b)};
    if (accumulate) {
      const F16 old = S::load16(row + k);
      value = {old.a + value.a, old.b + value.b};
    }
    S::store16(row + k, value);
  }
  for (; k < width; ++k) {
    const float value = g.of(S::get(in.s[k]), S::get(in.t[k]));
    row[k] = S::put(accumulate ? S::get(row[k]) + value : value);
  }
}

template <class S>
void put_gradient(const Rows& grad, i64 n, i64 width, bool accumulate, const Source<S>& in,
                  const PairGradient& gradient) {
  if (grad.stride_last == 1 && grad.dtype == S::dtype) {
    auto* row = static_cast<typename S::type*>(grad.data) + row_offset(grad, n);
    if (gradient.mse) return put_gradient_alike<true>(row, width, accumulate, in, gradient);
    return put_gradient_alike<false>(row, width, accumulate, in, gradient);
  }
  store_row(
      grad, n, width, accumulate,
      [&](i64 k) { return gradient.of(S::load(in.s + k), S::load(in.t + k)); },
      [&](i64 k) { return gradient.of(S::get(in.s[k]), S::get(in.t[k])); });
}

void identity_forward(const Problem& p, const ForwardOut& out, i64 begin, i64 end,
                      float* scratch) {
  const i64 width = p.student_width;
  with_pairs(p, scratch, [&](auto get) {
    for (i64 i = begin; i < end; ++i) {
      if (weight(p, i) == 0.f) {
        put_stats(out, i, PairStats{0.f, 0.f, 0.f, 0.f});
        if (out.grad.data) put_zeros(out.grad, i, width);
        continue;
      }
      const auto pair = get(i, i + 1 < end ? i + 1 : i);
      const PairStats stats = pair_stats(pair, width, p.kind);
      put_stats(out, i, stats);
      if (out.grad.data) {
        const PairGradient gradient(width, stats, p.kind, out.grad_scale * weight(p, i));
        put_gradient(out.grad, i, width, false, pair, gradient);
      }
    }
  });
}

void identity_backward(const Problem& p, const BackwardIn& in, i64 begin, i64 end,
                       float* scratch) {
  const i64 width = p.student_width;
  with_pairs(p, scratch, [&](auto get) {
    for (i64 i = begin; i < end; ++i) {
      const i64 n = student_row(p, i);
      if (no_gradient(p, in, i)) {
        if (!in.accumulate) put_zeros(in.grad, n, width);
        continue;
      }
      const float coefficient = in.grad_loss[i * in.grad_loss_stride] * *in.scale * weight(p, i);
      const PairGradient gradient(width, get_stats(in, i), p.kind, coefficient);
      put_gradient(in.grad, n, width, in.accumulate, get(i, i), gradient);
    }
  });
}

// Scratch of the projected forward: a tile of student rows, a tile of teacher rows, both z tiles,
// and the projection's accumulators.
struct Tile {
  float* student;
  float* teacher;
  float* z_s;
  float* z_t;
  float* acc;

  static i64 floats(const Problem& p) {
    return kTileRows * (padded(p.student_width) + padded(p.teacher_width) + 2 * padded(p.rank) +
                        p.rank * kLanes);
  }
  Tile(const Problem& p, float* scratch) {
    student = scratch;
    teacher = student + kTileRows * padded(p.student_width);
    z_s = teacher + kTileRows * padded(p.teacher_width);
    z_t = z_s + kTileRows * padded(p.rank);
    acc = z_t + kTileRows * padded(p.rank);
  }
};

// z_S of `count` rows: projected here, or read if the student already is r wide.
void student_z(const Problem& p, const i64* index, int count, const Tile& tile) {
  const float* rows[kTileRows];
  for (int i = 0; i < count; ++i) {
    rows[i] = load_row(p.student, student_row(p, index[i]), p.student_width,
                       tile.student + i * padded(p.student_width));
  }
  if (p.student_proj) {
    project(rows, count, p.student_proj, p.student_width, p.rank, tile.z_s, tile.acc);
  } else {
    for (int i = 0; i < count; ++i) {
      std::memcpy(tile.z_s + i * p.rank, rows[i], p.rank * sizeof(float));
    }
  }
}

// z_T of `count` rows: projected here, or read if the teacher already is r wide.
void teacher_z(const Problem& p, const i64* index, int count, const Tile& tile) {
  const float* rows[kTileRows];
  for (int i = 0; i < count; ++i) {
    float* scratch = tile.teacher + i * padded(p.teacher_width);
    rows[i] = load_row(p.teacher, teacher_row(p, index[i]), p.teacher_width, scratch);
    if (p.teacher_mean) {  // before the product: after it, z_T would be a difference of large sums
      for (i64 k = 0; k < p.teacher_width; ++k) scratch[k] = rows[i][k] - p.teacher_mean[k];
      rows[i] = scratch;
    }
  }
  if (p.teacher_proj) {
    project(rows, count, p.teacher_proj, p.teacher_width, p.rank, tile.z_t, tile.acc);
  } else {
    for (int i = 0; i < count; ++i) {
      std::memcpy(tile.z_t + i * p.rank, rows[i], p.rank * sizeof(float));
    }
  }
}

void projected_tile(const Problem& p, const ForwardOut& out, const i64* index, int count,
                    const Tile& tile) {
  student_z(p, index, count, tile);
  teacher_z(p, index, count, tile);
  for (int i = 0; i < count; ++i) {
    const float* s = tile.z_s + i * p.rank;
    const float* t = tile.z_t + i * p.rank;
    const char* here = reinterpret_cast<const char*>(s);
    const PairStats stats = pair_stats(Source<Float>{s, t, here, here}, p.rank, p.kind);
    put_stats(out, index[i], stats);
    const PairGradient gradient(p.rank, stats, p.kind, 1.f);
    float* dz = out.dz + index[i] * p.rank;
    i64 k = 0;
    for (; k + kLanes <= p.rank; k += kLanes) {
      Float::store(dz + k, gradient.of(Float::load(s + k), Float::load(t + k)));
    }
    for (; k < p.rank; ++k) dz[k] = gradient.of(s[k], t[k]);
  }
}

void projected_forward(const Problem& p, const ForwardOut& out, i64 begin, i64 end,
                       float* scratch) {
  const Tile tile(p, scratch);
  i64 index[kTileRows];
  int count = 0;
  for (i64 i = begin; i < end; ++i) {
    if (weight(p, i) == 0.f) {
      put_stats(out, i, PairStats{0.f, 0.f, 0.f, 0.f});
      std::memset(out.dz + i * p.rank, 0, p.rank * sizeof(float));
    } else {
      index[count++] = i;
    }
    if (count == kTileRows || (i + 1 == end && count > 0)) {
      projected_tile(p, out, index, count, tile);
      count = 0;
    }
  }
}

// Row n of grad, columns k .. k + kLanes: written, or added to.
template <class S>
OPRD_INLINE void put_lanes(typename S::type* row, i64 k, F8 value, bool accumulate) {
  S::store(row + k, accumulate ? S::load(row + k) + value : value);
}

// dh of Count rows, whose scaled dz are in dz (Count, rank).
template <class S, int Count>
void unproject_rows(const Problem& p, const BackwardIn& in, const i64* index, const float* dz) {
  const i64 width = p.student_width;
  typename S::type* rows[Count];
  for (int i = 0; i < Count; ++i) {
    rows[i] = static_cast<typename S::type*>(in.grad.data) + row_offset(in.grad, index[i]);
  }
  i64 k = 0;
  for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
    F8 sum[Count][2];
    unproject_block<Count, 2>(dz, p.student_proj, width, p.rank, k, sum);
    for (int i = 0; i < Count; ++i) {
      put_lanes<S>(rows[i], k, sum[i][0], in.accumulate);
      put_lanes<S>(rows[i], k + kLanes, sum[i][1], in.accumulate);
    }
  }
  for (; k < width; ++k) {
    for (int i = 0; i < Count; ++i) {
      const float value = unproject_element(dz + i * p.rank, p.student_proj, width, p.rank, k);
      rows[i][k] = S::put(in.accumulate ? S::get(rows[i][k]) + value : value);
    }
  }
}

void unproject_tile(const Problem& p, const BackwardIn& in, const i64* index, int count,
                    const float* dz) {
  if (in.grad.stride_last != 1) {
    for (int i = 0; i < count; ++i) {
      const float* own = dz + i * p.rank;
      store_row(
          in.grad, index[i], p.student_width, in.accumulate, [](i64) { return F8{}; },
          [&](i64 k) {
            return unproject_element(own, p.student_proj, p.student_width, p.rank, k);
          });
    }
    return;
  }
  with_storage(in.grad.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (count == kTileRows) return unproject_rows<S, kTileRows>(p, in, index, dz);
    for (int i = 0; i < count; ++i) unproject_rows<S, 1>(p, in, index + i, dz + i * p.rank);
  });
}

void projected_backward(const Problem& p, const BackwardIn& in, i64 begin, i64 end,
                        float* scratch) {
  i64 index[kTileRows];
  int count = 0;
  for (i64 i = begin; i < end; ++i) {
    const i64 n = student_row(p, i);
    if (no_gradient(p, in, i)) {
      if (!in.accumulate) put_zeros(in.grad, n, p.student_width);
    } else {
      const float coefficient = in.grad_loss[i * in.grad_loss_stride] * *in.scale * weight(p, i);
      float* dz = scratch + count * p.rank;
      for (i64 j = 0; j < p.rank; ++j) dz[j] = coefficient * in.dz[i * p.rank + j];
      index[count++] = n;
    }
    if (count == kTileRows || (i + 1 == end && count > 0)) {
      unproject_tile(p, in, index, count, scratch);
      count = 0;
    }
  }
}

void gather_rows(const Rows& x, const i64* index, i64 begin, i64 end, i64 width,
                 const float* mean, float* out) {
  for (i64 i = begin; i < end; ++i) {
    float* to = out + (i - begin) * width;
    const float* from = load_row(x, index ? index[i] : i, width, to);
    if (mean) {
      for (i64 k = 0; k < width; ++k) to[k] = from[k] - mean[k];
    } else if (from != to) {
      std::memcpy(to, from, width * sizeof(float));
    }
  }
}

void scatter_rows(const Problem& p, const float* values, i64 begin, i64 end, const Rows& grad,
                  bool accumulate) {
  for (i64 i = begin; i < end; ++i) {
    const float* from = values + (i - begin) * p.student_width;
    const i64 n = student_row(p, i);
    if (weight(p, i) == 0.f) {
      if (!accumulate) put_zeros(grad, n, p.student_width);
      continue;
    }
    store_row(
        grad, n, p.student_width, accumulate, [&](i64 k) { return Float::load(from + k); },
        [&](i64 k) { return from[k]; });
  }
}

i64 forward_scratch(const Problem& p) {
  return p.rank > 0 ? Tile::floats(p) : 2 * padded(p.student_width);
}

i64 backward_scratch(const Problem& p) {
  return p.rank > 0 ? padded(kTileRows * p.rank) : 2 * padded(p.student_width);
}

void forward_rows(const Problem& p, const ForwardOut& out, i64 begin, i64 end, float* scratch) {
  (p.rank > 0 ? projected_forward : identity_forward)(p, out, begin, end, scratch);
}

void backward_rows(const Problem& p, const BackwardIn& in, i64 begin, i64 end, float* scratch) {
  (p.rank > 0 ? projected_backward : identity_backward)(p, in, begin, end, scratch);
}

}  // namespace

namespace cpu {

extern const Kernels OPRD_KERNELS;
const Kernels OPRD_KERNELS = {OPRD_KERNELS_NAME, forward_scratch, backward_scratch, forward_rows,
                              backward_rows,     gather_rows,     scatter_rows};

}  // namespace cpu
}  // namespace oprd
