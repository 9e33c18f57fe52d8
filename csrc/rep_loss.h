// The contract every native backend implements: the representation loss of M pairs of rows, its
// per-row statistics, and its gradient. No torch here: raw pointers, sizes and element strides.
//
// Shapes: M rows; the student is dS wide, the teacher dT; after projection both are r wide.
#pragma once

#include <cstdint>

namespace oprd {

enum class DType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// mse: |s - t|^2 / D.  nmse: |s^ - t^|^2 / D.  cosine: |s^ - t^|^2 / 2 = 1 - cos.
// v^ = v / max(|v|, kEps); D is the width compared (d, or r after projection).
enum class Kind : std::int32_t { kMse = 0, kNmse = 1, kCosine = 2 };

constexpr double kEps = 1e-12;

// Statistics of the rows, in this order, each an array of its own, so that neighbouring rows are
// neighbours in memory; the backward pass needs no more than these.
constexpr int kRowStats = 3;
enum RowStat { kInvStudentNorm = 0, kInvTeacherNorm = 1, kOneMinusCos = 2 };

// Batch statistics: means over the rows whose weight is not 0, their number, and the factor that
// the reduction puts on every row (1 / denominator for a mean; 0 if the denominator is 0).
constexpr int kBatchStats = 5;
enum BatchStat { kMeanCos = 0, kMeanStudentNorm = 1, kMeanTeacherNorm = 2, kCount = 3, kScale = 4 };

// Rows of a 2-D or 3-D tensor, addressed by a flat index n: outer n / inner, inner n % inner.
// Strides count elements and may be anything, zero included.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t inner = 1;
  std::int64_t stride_outer = 0;
  std::int64_t stride_inner = 0;
  std::int64_t stride_last = 1;
};

// One call. Null pointers: that option is not used.
struct Problem {
  Rows student;                            // dS wide
  Rows teacher;                            // dT wide (r wide if teacher_proj is null and rank > 0)
  std::int64_t rows = 0;                   // M
  std::int64_t student_width = 0;          // dS
  std::int64_t teacher_width = 0;          // dT
  std::int64_t rank = 0;                   // r; 0: rows are compared as they are
  const float* student_proj = nullptr;     // (r, dS); null if rank > 0: student holds z_S, r wide
  const float* teacher_proj = nullptr;     // (r, dT)
  const float* teacher_mean = nullptr;     // (dT), subtracted before the projection
  const std::int64_t* student_rows = nullptr;  // (M): which rows of student
  const std::int64_t* teacher_rows = nullptr;  // (M): which rows of teacher
  const float* weights = nullptr;          // (M): 0 masks the row, whatever it holds
  Kind kind = Kind::kMse;
  int threads = 1;
};

struct ForwardOut {
  float* row_loss = nullptr;   // (M)
  float* row_stats = nullptr;  // (kRowStats, M)
  std::int64_t stats_rows = 0;  // rows from one statistic to the next, if not M: a slice of a batch
  float* dz = nullptr;         // (M, r): d row_loss / d z_S; only if rank > 0
  // If grad.data is set (rank == 0), row i of it receives grad_scale * weight_i * d row_loss_i /
  // d student_i; it may be the teacher's own memory.
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
  Rows grad;                         // receives it at the same rows as student
  bool accumulate = false;           // add to what grad holds instead of overwriting it
};

namespace cpu {

// Which instruction set the run-time dispatch has chosen: "avx2" or "portable".
const char* simd_name();

// Several layers in one launch: problems share rows, weights and thread count.
void forward(const Problem* problems, const ForwardOut* outs, int layers);

// The factor a reduction puts on every row. denominator: null: the sum of the weights.
float reduction_scale(const Problem& problem, const float* denominator, bool mean);

// loss: one value, sum_i scale * weight_i * row_loss_i; or null: row_loss_i is multiplied by
// weight_i and left as the result. stats: (kBatchStats).
// Summed in row order in double: the same bits whatever the number of threads.
void reduce(const Problem& problem, const ForwardOut& out, float scale, float* loss, float* stats);

void backward(const Problem* problems, const BackwardIn* ins, int layers);

// For products done elsewhere (BLAS), on `count` of a problem's rows from `first` on:
// gather: rows of x, picked by index (or first, first + 1, ..), as floats, minus mean (or null),
// into out (count, width); scatter: values (count, width) written or added to rows of grad, by the
// problem's student_rows, weights masking as in backward.
void gather(const Rows& x, const std::int64_t* index, std::int64_t first, std::int64_t count,
            std::int64_t width, const float* mean, float* out, int threads);
void scatter(const Problem& problem, const float* values, std::int64_t first, std::int64_t count,
             const Rows& grad, bool accumulate);

}  // namespace cpu

// Device pointers throughout, the projectors and the scale included: nothing is allocated, and the
// host never waits for the device, so that a call may be captured in a CUDA graph. Student, teacher
// and grad share one dtype and have stride_last 1; rank is at most kMaxRank. A launch that fails
// throws std::runtime_error, which names the kernel, the shape and the dtype.
namespace cuda {

constexpr std::int64_t kMaxRank = 16;

struct Stream {
  int device = 0;
  void* handle = nullptr;  // cudaStream_t
};

// What follows the rows of a layer: loss and batch statistics as cpu::reduce has them.
struct Reduction {
  const float* denominator = nullptr;  // one value; null: the sum of the weights
  bool mean = false;
  bool each = false;  // reduction "none": row losses are multiplied by their weights and are it
  float* losses = nullptr;  // one a layer, unless `each`
  float* stats = nullptr;   // kBatchStats a layer
  std::int64_t stats_stride = 0;  // from layer to layer, in floats
  double* scratch = nullptr;      // as many as scratch() says, 16-byte aligned
};

// Doubles that forward works in: what is there before does not matter. 0: it needs none. Widths are
// those of the widest layers; of the teacher, 0 if it has no projector.
std::int64_t scratch(std::int64_t rows, std::int64_t layers, std::int64_t rank,
                     std::int64_t student_width, std::int64_t teacher_width, DType dtype);

// ForwardOut::grad_scale is not used: the reduction's scale is formed on the device.
void forward(const Problem* problems, const ForwardOut* outs, int layers,
             const Reduction& reduction, const Stream& stream);

void backward(const Problem* problems, const BackwardIn* ins, int layers, const Stream& stream);

}  // namespace cuda
}  // namespace oprd
