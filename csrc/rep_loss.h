// The interface of every native backend: the representation loss of M pairs of rows, its statistics
// per row, and its gradient. It uses raw pointers, sizes and element strides, and no torch.
//
// Shapes: M rows; dS and dT: widths of student and teacher; after projection both are r wide.
#pragma once

#include <cstdint>

namespace oprd {

enum class DType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// mse: |s - t|^2 / D.  nmse: |s^ - t^|^2 / D.  cosine: |s^ - t^|^2 / 2 = 1 - cos.
// v^ = v / max(|v|, kEps); D is the width compared (d, or r after projection).
enum class Kind : std::int32_t { kMse = 0, kNmse = 1, kCosine = 2 };

constexpr double kEps = 1e-12;

// The statistics of the rows, in this order. Each is a separate array, so that neighbouring rows
// are neighbours in memory. The backward pass needs no other statistics.
constexpr int kRowStats = 3;
enum RowStat { kInvStudentNorm = 0, kInvTeacherNorm = 1, kOneMinusCos = 2 };

// Batch statistics: means over the rows whose weight is not 0, the number of these rows, and the
// factor by which the reduction multiplies each row (for a mean 1 / denominator, or 0 if the
// denominator is 0).
constexpr int kBatchStats = 5;
enum BatchStat { kMeanCos = 0, kMeanStudentNorm = 1, kMeanTeacherNorm = 2, kCount = 3, kScale = 4 };

// Rows of a 2-D or 3-D tensor. Row n has outer index n / inner and inner index n % inner. Strides
// are in elements and may have any value, including 0.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t inner = 1;
  std::int64_t stride_outer = 0;
  std::int64_t stride_inner = 0;
  std::int64_t stride_last = 1;
};

// One call. A null pointer means that the option is not used.
struct Problem {
  Rows student;                            // dS wide
  Rows teacher;                            // dT wide (r wide if teacher_proj is null and rank > 0)
  std::int64_t rows = 0;                   // M
  std::int64_t student_width = 0;          // dS
  std::int64_t teacher_width = 0;          // dT
  std::int64_t rank = 0;                   // r; 0: no projection
  const float* student_proj = nullptr;     // (r, dS); if null with rank > 0, student holds z_S
  const float* teacher_proj = nullptr;     // (r, dT)
  const float* teacher_mean = nullptr;     // (dT), subtracted before the projection
  const std::int64_t* student_rows = nullptr;  // (M): which rows of student
  const std::int64_t* teacher_rows = nullptr;  // (M): which rows of teacher
  const float* weights = nullptr;          // (M): 0 masks the row, even if it holds NaN
  Kind kind = Kind::kMse;
  int threads = 1;
};

struct ForwardOut {
  float* row_loss = nullptr;   // (M)
  float* row_stats = nullptr;  // (kRowStats, M)
  std::int64_t stats_rows = 0;  // rows of one statistic if not M, as for a slice of a batch
  float* dz = nullptr;         // (M, r): d row_loss / d z_S; only if rank > 0
  // If grad.data is set (rank == 0), its row i receives grad_scale * weight_i * d row_loss_i /
  // d student_i. It may be the memory of the teacher.
  Rows grad;
  float grad_scale = 0.f;
};

// The gradient of sum_i g_i * scale * weight_i * row_loss_i with respect to the student's rows.
struct BackwardIn {
  const float* row_stats = nullptr;  // from forward: (kRowStats, M)
  const float* dz = nullptr;         // from forward, if rank > 0
  const float* grad_loss = nullptr;  // g: (M), or one value if grad_loss_stride is 0
  std::int64_t grad_loss_stride = 0;
  const float* scale = nullptr;      // one value
  Rows grad;                         // receives the gradient, at the same rows as student
  bool accumulate = false;           // add to what grad holds instead of overwriting it
};

namespace cpu {

// The instruction set that the run-time dispatch has chosen: "avx2" or "portable".
const char* simd_name();

// Runs several layers in one launch. The problems share rows, weights and thread count.
void forward(const Problem* problems, const ForwardOut* outs, int layers);

// The factor by which the reduction multiplies each row. A null denominator stands for the sum of
// the weights.
float reduction_scale(const Problem& problem, const float* denominator, bool mean);

// Stores sum_i scale * weight_i * row_loss_i in loss. If loss is null, row_loss_i is multiplied by
// weight_i in place and is the result. stats: (kBatchStats).
// Sums are in row order and in double, so the number of threads does not change a bit.
void reduce(const Problem& problem, const ForwardOut& out, float scale, float* loss, float* stats);

void backward(const Problem* problems, const BackwardIn* ins, int layers);

// These serve products done elsewhere (BLAS), on `count` rows of a problem from `first` on.
// gather: copies rows of x, selected by index (if null: first, first + 1, ..), as floats and minus
// mean (unless null), into out (count, width).
// scatter: writes or adds values (count, width) to rows of grad, selected by the problem's
// student_rows. Weights mask rows as in backward.
void gather(const Rows& x, const std::int64_t* index, std::int64_t first, std::int64_t count,
            std::int64_t width, const float* mean, float* out, int threads);
void scatter(const Problem& problem, const float* values, std::int64_t first, std::int64_t count,
             const Rows& grad, bool accumulate);

}  // namespace cpu

// All pointers are device pointers, including the projectors and the scale. Nothing is allocated,
// and the host never waits for the device, so a call may be captured in a CUDA graph. Student,
// teacher and grad have the same dtype and stride_last 1. rank is at most kMaxRank. A failed launch
// throws std::runtime_error, which names the kernel, the shape and the dtype.
namespace cuda {

constexpr std::int64_t kMaxRank = 16;

struct Stream {
  int device = 0;
  void* handle = nullptr;  // cudaStream_t
};

// The reduction of the rows to the loss and the batch statistics, as in cpu::reduce.
struct Reduction {
  const float* denominator = nullptr;  // one value; null: the sum of the weights
  bool mean = false;
  bool each = false;  // reduction "none": the weighted row losses are the result
  float* losses = nullptr;  // one per layer, unless `each`
  float* stats = nullptr;   // kBatchStats per layer
  std::int64_t stats_stride = 0;  // from layer to layer, in floats
  double* scratch = nullptr;      // scratch() doubles, 16-byte aligned
};

// The number of doubles of scratch that forward needs, or 0. Their initial contents do not matter.
// Widths are those of the widest layers. teacher_width is 0 if the teacher has no projector.
std::int64_t scratch(std::int64_t rows, std::int64_t layers, std::int64_t rank,
                     std::int64_t student_width, std::int64_t teacher_width, DType dtype);

// ForwardOut::grad_scale is not used, because the scale of the reduction is computed on the device.
void forward(const Problem* problems, const ForwardOut* outs, int layers,
             const Reduction& reduction, const Stream& stream);

void backward(const Problem* problems, const BackwardIn* ins, int layers, const Stream& stream);

}  // namespace cuda
}  // namespace oprd
