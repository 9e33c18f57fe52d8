// The loops over rows, compiled once per instruction set; see kernels_*.cpp.

#include "kernels.h"
#include "pair.h"
#include "project.h"

namespace oprd {
namespace {

i64 student_row(const Problem& p, i64 i) { return p.student_rows ? p.student_rows[i] : i; }
i64 teacher_row(const Problem& p, i64 i) { return p.teacher_rows ? p.teacher_rows[i] : i; }
float weight(const Problem& p, i64 i) { return p.weights ? p.weights[i] : 1.f; }

i64 padded(i64 floats) { return (floats + 15) / 16 * 16; }

void put_stats(const Problem& p, const ForwardOut& out, i64 i, const PairStats& stats) {
  const i64 rows = out.stats_rows ? out.stats_rows : p.rows;
  out.row_loss[i] = stats.loss;
  out.row_stats[kInvStudentNorm * rows + i] = stats.inv_s;
  out.row_stats[kInvTeacherNorm * rows + i] = stats.inv_t;
  out.row_stats[kOneMinusCos * rows + i] = stats.one_minus_cos;
}

PairStats get_stats(const Problem& p, const BackwardIn& in, i64 i) {
  auto stat = [&](i64 which) { return in.row_stats[which * p.rows + i]; };
  return {0.f, stat(kInvStudentNorm), stat(kInvTeacherNorm), stat(kOneMinusCos)};
}

// Whether a row gets gradient 0 whatever it holds: masked rows do, and all rows if the denominator
// was 0.
bool no_gradient(const Problem& p, const BackwardIn& in, i64 i) {
  return weight(p, i) == 0.f || *in.scale == 0.f;
}

// The factor by which the chain rule multiplies row i. Its own range is a double's: a small upstream
// gradient over a large batch may meet large values yet.
double coefficient_of(const Problem& p, const BackwardIn& in, i64 i) {
  const double upstream = in.grad_loss[i * in.grad_loss_stride];
  return upstream * *in.scale * weight(p, i);
}

void put_zeros(const Rows& grad, i64 n, i64 width) {
  store_row(
      grad, n, width, false, [](i64) { return F8{}; }, [](i64) { return 0.f; });
}

template <class S>
const typename S::type* row_of(const Rows& rows, i64 n) {
  return static_cast<const typename S::type*>(rows.data) + row_offset(rows, n);
}

// Pair i without a copy: both rows are of type S and contiguous.
template <class S>
Source<S> pair_in_place(const Problem& p, i64 i, i64 next) {
  return {row_of<S>(p.student, student_row(p, i)), row_of<S>(p.teacher, teacher_row(p, i)),
          row_begin(p.student, student_row(p, next)), row_begin(p.teacher, teacher_row(p, next))};
}

// Pair i as floats, converted into scratch if needed. It supports mixed types and any strides.
Source<Float> pair_as_floats(const Problem& p, i64 i, float* scratch) {
  const i64 width = p.student_width;
  const float* s = load_row(p.student, student_row(p, i), width, scratch);
  const float* t = load_row(p.teacher, teacher_row(p, i), width, scratch + padded(width));
  return {s, t, reinterpret_cast<const char*>(s), reinterpret_cast<const char*>(t)};
}

// Calls f(get) with the fastest function to read pairs. get(i, next) returns pair i as a Source,
// which also names pair `next` for prefetching.
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

// Input and output have the same type and are contiguous: sixteen elements at a time, in the order
// of that type's load16.
template <bool Mse, class S>
void put_gradient_alike(typename S::type* row, i64 width, bool accumulate, const Source<S>& in,
                        const PairGradient& gradient) {
  const PairGradient g = gradient;  // a copy that stores to row can't alias
  const F8 to_s = broadcast(g.to_s), rest = broadcast(g.to_s_rest), to_t = broadcast(g.to_t);
  const F8 outer = broadcast(g.outer);
  auto combine = [&](F8 s, F8 t) __attribute__((always_inline)) {
    return PairGradient::combine<Mse>(s, t, to_s, rest, to_t, outer);
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
        put_stats(p, out, i, PairStats{0.f, 0.f, 0.f, 0.f});
        if (out.grad.data) put_zeros(out.grad, i, width);
        continue;
      }
      const auto pair = get(i, i + 1 < end ? i + 1 : i);
      const PairStats stats = pair_stats(pair, width, p.kind);
      put_stats(p, out, i, stats);
      if (out.grad.data) {
        const double coefficient = static_cast<double>(out.grad_scale) * weight(p, i);
        const PairGradient gradient(width, stats, p.kind, coefficient);
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
      const PairGradient gradient(width, get_stats(p, in, i), p.kind, coefficient_of(p, in, i));
      put_gradient(in.grad, n, width, in.accumulate, get(i, i), gradient);
    }
  });
}

// Up to kTileRows rows of the batch, and the rows that follow them.
struct Tile {
  i64 rows[kTileRows];  // indices in the batch
  int count = 0;
  i64 next[kTileRows];

  // The rows of x for these rows, selected by index (unless null).
  void pick(const i64* index, i64* now, i64* then) const {
    for (int i = 0; i < count; ++i) now[i] = index ? index[rows[i]] : rows[i];
    for (int i = 0; i < kTileRows; ++i) then[i] = index ? index[next[i]] : next[i];
  }
};

// Calls f on tiles of the rows in [begin, end) for which `skip` is false.
template <class Skip, class F>
void for_tiles(i64 begin, i64 end, Skip skip, F f) {
  Tile tile;
  for (i64 i = begin; i < end; ++i) {
    if (!skip(i)) tile.rows[tile.count++] = i;
    if (tile.count == kTileRows || (i + 1 == end && tile.count > 0)) {
      for (int n = 0; n < kTileRows; ++n) tile.next[n] = i + 1 + n < end ? i + 1 + n : i;
      f(tile);
      tile.count = 0;
    }
  }
}

// Whether the projection reads rows in place. Otherwise they are converted to floats first.
bool reads_in_place(const Rows& x) { return x.stride_last == 1; }

// The floats of scratch for one side of a projected forward: a tile of converted rows, or the
// projector and the mean in the element order of bfloat16.
i64 side_scratch(const Rows& x, i64 width, i64 rank) {
  if (!reads_in_place(x)) return kTileRows * padded(width);
  return x.dtype == DType::kBFloat16 ? (rank + 1) * padded(width) : 0;
}

// One side of a projected forward, which computes z of tiles of rows. Without a projector, x is
// already r wide.
class Side {
 public:
  Side(const Rows& x, const i64* index, const float* proj, const float* mean, i64 width, i64 rank,
       float* scratch)
      : projection_{x, proj, mean, width, rank}, index_(index), scratch_(scratch) {
    if (!proj || !reads_in_place(x) || x.dtype != DType::kBFloat16) return;
    using S = Storage<DType::kBFloat16>;
    for (i64 j = 0; j < rank; ++j) arrange<S>(proj + j * width, width, scratch + j * width);
    projection_.proj = scratch;
    if (mean) {
      projection_.mean = scratch + rank * width;
      arrange<S>(mean, width, scratch + rank * width);
    }
  }

  void z_of(const Tile& tile, float* z, float* acc) const {
    const Projection& p = projection_;
    i64 now[kTileRows], then[kTileRows];
    tile.pick(index_, now, then);
    if (!p.proj) {
      for (int i = 0; i < tile.count; ++i) {
        const float* row = load_row(p.x, now[i], p.rank, z + i * p.rank);
        if (row != z + i * p.rank) std::memcpy(z + i * p.rank, row, p.rank * sizeof(float));
      }
    } else if (reads_in_place(p.x)) {
      with_storage(p.x.dtype, [&](auto storage) {
        using S = decltype(storage);
        const typename S::type* h[kTileRows] = {};
        const char* next[kTileRows];
        for (int i = 0; i < tile.count; ++i) h[i] = row_of<S>(p.x, now[i]);
        for (int i = 0; i < kTileRows; ++i) next[i] = row_begin(p.x, then[i]);
        project<S>(p, h, tile.count, next, z, acc);
      });
    } else {
      const float* h[kTileRows] = {};
      const char* next[kTileRows];
      for (int i = 0; i < tile.count; ++i) {
        h[i] = load_row(p.x, now[i], p.width, scratch_ + i * padded(p.width));
      }
      for (int i = 0; i < kTileRows; ++i) next[i] = reinterpret_cast<const char*>(h[0]);
      project<Float>(p, h, tile.count, next, z, acc);
    }
  }

 private:
  Projection projection_;
  const i64* index_;
  float* scratch_;
};

// The floats of scratch for z_S, z_T, the accumulators and both sides.
i64 projected_scratch(const Problem& p) {
  return 2 * padded(kTileRows * p.rank) + kTileRows * p.rank * kLanes +
         padded(side_scratch(p.student, p.student_width, p.rank)) +
         padded(side_scratch(p.teacher, p.teacher_width, p.rank));
}

void projected_forward(const Problem& p, const ForwardOut& out, i64 begin, i64 end,
                       float* scratch) {
  float* z_s = scratch;
  float* z_t = z_s + padded(kTileRows * p.rank);
  float* acc = z_t + padded(kTileRows * p.rank);
  float* student_scratch = acc + kTileRows * p.rank * kLanes;
  float* teacher_scratch =
      student_scratch + padded(side_scratch(p.student, p.student_width, p.rank));
  const Side student(p.student, p.student_rows, p.student_proj, nullptr, p.student_width, p.rank,
                     student_scratch);
  // Subtracted after the product instead of before, the mean would make z_T a difference of large
  // sums.
  const Side teacher(p.teacher, p.teacher_rows, p.teacher_proj, p.teacher_mean, p.teacher_width,
                     p.rank, teacher_scratch);
  auto masked = [&](i64 i) {
    if (weight(p, i) != 0.f) return false;
    put_stats(p, out, i, PairStats{0.f, 0.f, 0.f, 0.f});
    std::memset(out.dz + i * p.rank, 0, p.rank * sizeof(float));
    return true;
  };
  for_tiles(begin, end, masked, [&](const Tile& tile) {
    student.z_of(tile, z_s, acc);
    teacher.z_of(tile, z_t, acc);
    for (int i = 0; i < tile.count; ++i) {
      const float* s = z_s + i * p.rank;
      const float* t = z_t + i * p.rank;
      const char* here = reinterpret_cast<const char*>(s);
      const Source<Float> pair{s, t, here, here};
      const PairStats stats = pair_stats(pair, p.rank, p.kind);
      put_stats(p, out, tile.rows[i], stats);
      const Rows dz{out.dz + tile.rows[i] * p.rank, DType::kFloat32, 1, 0, 0, 1};
      put_gradient(dz, 0, p.rank, false, pair, PairGradient(p.rank, stats, p.kind, 1.0));
    }
  });
}

// Writes or adds dh of Count rows to rows of grad. dz (Count, rank) holds their scaled dz. proj is
// in the element order of S.
template <class S, int Count>
void unproject_rows(const Problem& p, const BackwardIn& in, const float* proj, const i64* index,
                    const i64* next, const float* dz) {
  const i64 width = p.student_width;
  typename S::type* rows[Count];
  const char* later[Count];
  for (int i = 0; i < Count; ++i) {
    rows[i] = static_cast<typename S::type*>(in.grad.data) + row_offset(in.grad, index[i]);
    later[i] = row_begin(in.grad, next[i]);
  }
  i64 k = 0;
  for (; k + kStep <= width; k += kStep) {
    F8 sum[Count][2];
    unproject_block<Count, 2>(dz, proj, width, p.rank, k, sum);
    for (int i = 0; i < Count; ++i) {
      prefetch(later[i] + k * static_cast<i64>(sizeof(typename S::type)));
      F16 value{sum[i][0], sum[i][1]};
      if (in.accumulate) {
        const F16 old = S::load16(rows[i] + k);
        value = {old.a + value.a, old.b + value.b};
      }
      S::store16(rows[i] + k, value);
    }
  }
  for (; k < width; ++k) {
    for (int i = 0; i < Count; ++i) {
      const float value = unproject_element(dz + i * p.rank, proj, width, p.rank, k);
      rows[i][k] = S::put(in.accumulate ? S::get(rows[i][k]) + value : value);
    }
  }
}

void unproject_tile(const Problem& p, const BackwardIn& in, const float* proj, const Tile& tile,
                    const float* dz) {
  i64 now[kTileRows], then[kTileRows];
  tile.pick(p.student_rows, now, then);
  if (in.grad.stride_last != 1) {
    for (int i = 0; i < tile.count; ++i) {
      const float* own = dz + i * p.rank;
      store_row(
          in.grad, now[i], p.student_width, in.accumulate, [](i64) { return F8{}; },
          [&](i64 k) {
            return unproject_element(own, proj, p.student_width, p.rank, k);
          });
    }
    return;
  }
  with_storage(in.grad.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (tile.count == kTileRows) return unproject_rows<S, kTileRows>(p, in, proj, now, then, dz);
    for (int i = 0; i < tile.count; ++i) {
      unproject_rows<S, 1>(p, in, proj, now + i, then + i, dz + i * p.rank);
    }
  });
}

void projected_backward(const Problem& p, const BackwardIn& in, i64 begin, i64 end,
                        float* scratch) {
  const float* proj = p.student_proj;
  if (in.grad.dtype == DType::kBFloat16 && in.grad.stride_last == 1) {
    float* arranged = scratch + padded(kTileRows * p.rank);
    for (i64 j = 0; j < p.rank; ++j) {
      arrange<Storage<DType::kBFloat16>>(proj + j * p.student_width, p.student_width,
                                         arranged + j * p.student_width);
    }
    proj = arranged;
  }
  auto skip = [&](i64 i) {
    if (!no_gradient(p, in, i)) return false;
    if (!in.accumulate) put_zeros(in.grad, student_row(p, i), p.student_width);
    return true;
  };
  for_tiles(begin, end, skip, [&](const Tile& tile) {
    for (int n = 0; n < tile.count; ++n) {
      const i64 i = tile.rows[n];
      const double coefficient = coefficient_of(p, in, i);
      for (i64 j = 0; j < p.rank; ++j) {
        scratch[n * p.rank + j] =
            plain_nan(static_cast<float>(coefficient * in.dz[i * p.rank + j]));
      }
    }
    unproject_tile(p, in, proj, tile, scratch);
  });
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
  return p.rank > 0 ? projected_scratch(p) : 2 * padded(p.student_width);
}

i64 backward_scratch(const Problem& p) {
  return p.rank > 0 ? padded(kTileRows * p.rank) + p.rank * padded(p.student_width)
                    : 2 * padded(p.student_width);
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
