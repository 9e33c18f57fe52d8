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

void identity_forward(const Problem& p, const ForwardOut& out, i64 begin, i64 end,
                      float* scratch) {
  const i64 width = p.student_width;
  float* scratch_t = scratch + padded(width);
  for (i64 i = begin; i < end; ++i) {
    if (weight(p, i) == 0.f) {
      put_stats(out, i, PairStats{0.f, 0.f, 0.f, 0.f});
      if (out.grad.data) put_zeros(out.grad, i, width);
      continue;
    }
    const float* s = load_row(p.student, student_row(p, i), width, scratch);
    const float* t = load_row(p.teacher, teacher_row(p, i), width, scratch_t);
    if (i + 1 < end) {
      prefetch_row(p.student, student_row(p, i + 1), width);
      prefetch_row(p.teacher, teacher_row(p, i + 1), width);
    }
    const PairStats stats = pair_stats(s, t, width, p.kind);
    put_stats(out, i, stats);
    if (out.grad.data) {
      const PairGradient gradient(s, t, width, stats, p.kind, out.grad_scale * weight(p, i));
      store_row(
          out.grad, i, width, false, [&](i64 k) { return gradient.at8(k); },
          [&](i64 k) { return gradient.at1(k); });
    }
  }
}

void identity_backward(const Problem& p, const BackwardIn& in, i64 begin, i64 end,
                       float* scratch) {
  const i64 width = p.student_width;
  float* scratch_t = scratch + padded(width);
  for (i64 i = begin; i < end; ++i) {
    const i64 n = student_row(p, i);
    if (no_gradient(p, in, i)) {
      if (!in.accumulate) put_zeros(in.grad, n, width);
      continue;
    }
    const float* s = load_row(p.student, n, width, scratch);
    const float* t = load_row(p.teacher, teacher_row(p, i), width, scratch_t);
    const float coefficient = in.grad_loss[i * in.grad_loss_stride] * *in.scale * weight(p, i);
    const PairGradient gradient(s, t, width, get_stats(in, i), p.kind, coefficient);
    store_row(
        in.grad, n, width, in.accumulate, [&](i64 k) { return gradient.at8(k); },
        [&](i64 k) { return gradient.at1(k); });
  }
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
    const PairStats stats = pair_stats(s, t, p.rank, p.kind);
    put_stats(out, index[i], stats);
    const PairGradient gradient(s, t, p.rank, stats, p.kind, 1.f);
    float* dz = out.dz + index[i] * p.rank;
    i64 k = 0;
    for (; k + kLanes <= p.rank; k += kLanes) Float::store(dz + k, gradient.at8(k));
    for (; k < p.rank; ++k) dz[k] = gradient.at1(k);
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

void projected_backward(const Problem& p, const BackwardIn& in, i64 begin, i64 end,
                        float* scratch) {
  for (i64 i = begin; i < end; ++i) {
    const i64 n = student_row(p, i);
    if (no_gradient(p, in, i)) {
      if (!in.accumulate) put_zeros(in.grad, n, p.student_width);
      continue;
    }
    const float coefficient = in.grad_loss[i * in.grad_loss_stride] * *in.scale * weight(p, i);
    for (i64 j = 0; j < p.rank; ++j) scratch[j] = coefficient * in.dz[i * p.rank + j];
    const Unprojection dh{scratch, p.student_proj, p.student_width, p.rank};
    store_row(
        in.grad, n, p.student_width, in.accumulate, [&](i64 k) { return dh.at8(k); },
        [&](i64 k) { return dh.at1(k); });
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
  return p.rank > 0 ? padded(p.rank) : 2 * padded(p.student_width);
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
