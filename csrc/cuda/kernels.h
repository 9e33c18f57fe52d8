// Declarations for the host side of the CUDA backend: the entry of each storage type, the
// parameters of launches and their description. It includes no CUDA header, so that plain C++ can
// include it.
#pragma once

#include <cstdint>
#include <string>

#include "../rep_loss.h"

namespace oprd {
namespace cuda {

using i64 = std::int64_t;

// The factor of a reduction: a value that the host knows, or a value on the device or its inverse.
struct Scale {
  float value;
  const float* device;
  bool inverse;
};

// Rows in the form for kernels. Their last stride is 1. inner is 0 if stride_inner alone gives the
// position of every row, which saves a division per row.
struct Strided {
  void* data;
  i64 inner, stride_outer, stride_inner;
};

inline Strided strided(const Rows& rows) {
  const bool plain = rows.stride_outer == rows.inner * rows.stride_inner;
  return {rows.data, plain ? 0 : rows.inner, rows.stride_outer, rows.stride_inner};
}

// The properties that the layers of a call share.
struct Batch {
  i64 rows;
  const i64 *student_rows, *teacher_rows;
  const float* weights;
  Kind kind;
};

inline Batch batch(const Problem& p) {
  return {p.rows, p.student_rows, p.teacher_rows, p.weights, p.kind};
}

// The parameters of a kernel, passed by value. blockIdx.y is the layer. kMaxLayers layers of any
// kind stay within the 4 KB of parameters that every CUDA version and GPU supports. Nothing here
// has initial values, because the host would then write 4 KB for a call of one layer.
constexpr int kMaxLayers = 30;

struct IdentityForwardLayer {
  Strided student, teacher, grad;
  float *row_loss, *row_stats;
  std::int32_t width;
};
struct IdentityForward {
  Batch batch;
  Scale scale;
  double* tickets;  // one per layer, which the kernel resets to 0; or null
  IdentityForwardLayer layers[kMaxLayers];
};

struct IdentityBackwardLayer {
  Strided student, teacher, grad;
  const float *row_stats, *grad_loss;
  std::int32_t width;
};
struct IdentityBackward {
  Batch batch;
  const float* scale;
  i64 grad_loss_stride;
  bool accumulate;
  int log_split;  // 1 << log_split warps share a row
  IdentityBackwardLayer layers[kMaxLayers];
};

struct ProjectedForwardLayer {
  Strided student, teacher;
  const float *student_proj, *teacher_proj, *teacher_mean;
  float *row_loss, *row_stats, *dz;
  double* terms;
  std::int32_t student_width, teacher_width;
};
struct ProjectedForward {
  Batch batch;
  double* tickets;
  std::int32_t rank;
  ProjectedForwardLayer layers[kMaxLayers];
};

struct PrepareLayer {
  const float *student_proj, *teacher_proj, *teacher_mean;
  double* terms;
  std::int32_t student_width, teacher_width;
};
struct PrepareTerms {
  std::int32_t rank;
  PrepareLayer layers[kMaxLayers];
};

struct ProjectedBackwardLayer {
  Strided grad;
  const float *proj, *dz, *grad_loss;
  std::int32_t width;
};
struct ProjectedBackward {
  Batch batch;
  const float* scale;
  i64 grad_loss_stride;
  bool accumulate;
  std::int32_t rank;
  ProjectedBackwardLayer layers[kMaxLayers];
};

struct ReduceLayer {
  float* row_loss;
  const float* row_stats;
  float *loss, *stats;
};
struct Reduce {
  Batch batch;
  Scale scale;
  bool scale_of_weights;  // the factor is 1 / the sum of the weights
  bool scale_in_stats;    // scale_by_weights has stored the factor in stats
  i64 rows_per_block;
  double *tickets, *partials;
  ReduceLayer layers[kMaxLayers];
};

static_assert(sizeof(IdentityForward) <= 4096 && sizeof(IdentityBackward) <= 4096 &&
                  sizeof(ProjectedForward) <= 4096 && sizeof(ProjectedBackward) <= 4096 &&
                  sizeof(Reduce) <= 4096 && sizeof(PrepareTerms) <= 4096,
              "parameters of a launch");

// P for tensor cores consists of two terms of the states' type, the rounded value and the rounding
// error, for 8 or 16 ranks and whole pairs of kTermColumns columns.
constexpr int kTerms = 2, kTermColumns = 32;
constexpr i64 padded_ranks(i64 rank) { return rank <= 8 ? 8 : 16; }
constexpr i64 padded_columns(i64 width) {
  return (width + 2 * kTermColumns - 1) / (2 * kTermColumns) * (2 * kTermColumns);
}
// The number of doubles that the projectors of a layer take in this form.
constexpr i64 terms_size(i64 rank, i64 student_width, i64 teacher_width) {
  const i64 columns = padded_columns(student_width) + padded_columns(teacher_width);
  return 2 * padded_ranks(rank) + columns * padded_ranks(rank) * kTerms / 4;
}
// The position of these doubles for the first of some layers, and their number per layer.
struct Room {
  double* at;
  i64 size;
};

// The description of a launch, for the launcher and for the error message.
struct Launch {
  const char* kernel;
  const Problem& problem;
  const Stream& stream;
  i64 blocks;
  int threads;
  int layers = 1;
};

[[noreturn]] void fail(const Launch& launch, const std::string& reason);

// The most blocks of a launch, because warps are counted in 32 bits.
constexpr i64 kMaxBlocks = (1 << 30) - 1;

// Calls run(first, count) on the longest runs of layers for which same(first, other) holds. A run
// has at most kMaxLayers layers; if this limit applies, runs have about the same length.
template <class Same, class Run>
void for_runs(int layers, Same same, Run run) {
  const int launches = (layers + kMaxLayers - 1) / kMaxLayers;
  const int most = launches ? (layers + launches - 1) / launches : 1;
  for (int first = 0, end; first < layers; first = end) {
    end = first + 1;
    while (end < layers && end - first < most && same(first, end)) ++end;
    run(first, end - first);
  }
}

// Launch layers that have one storage type. tickets: one per layer, or null. terms: the scratch for
// the projectors of these layers.
template <DType>
void forward_rows(const Problem* problems, const ForwardOut* outs, int layers, const Scale& scale,
                  double* tickets, const Room& terms, const Stream& stream);
template <DType>
void backward_rows(const Problem* problems, const BackwardIn* ins, int layers,
                   const Stream& stream);

// In reduce.cu. scale_by_weights stores 1 / the sum of the weights in `layers` places. reduce sums
// over the rows in a fixed order.
void scale_by_weights(const Problem& problem, float* scale, i64 stride, int layers,
                      const Stream& stream);
void reduce(const Problem* problems, const ForwardOut* outs, int layers, const Scale& scale,
            bool scale_of_weights, bool scale_in_stats, const Reduction& reduction,
            const Stream& stream);
// The tickets of a call, at the start of its scratch; null if its reductions need none.
double* tickets(const Reduction& reduction, i64 rows);
// The number of doubles of scratch that the reductions of a call take, before the projectors'
// terms.
i64 partial_sums(i64 rows, i64 layers);

// Makes a device current, and on destruction restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

// Facts for oprd-doctor: the version of the linked runtime, the version of the driver (0: none),
// and the reason why no kernel can be launched, or "".
struct Facts {
  int runtime = 0;
  int driver = 0;
  std::string problem;
};
Facts facts();

}  // namespace cuda
}  // namespace oprd
