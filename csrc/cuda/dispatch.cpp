// From the contract to launches: brings rows to the form the kernels take, picks the storage type,
// and strings the launches of several layers together on the caller's stream.

#include <stdexcept>

#include "kernels.h"

namespace oprd {
namespace cuda {
namespace {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "unknown dtype";
}

// Rows as the kernels take them: inner is 0 where one stride says it all, which spares them a
// division a row.
Rows canonical(Rows rows) {
  if (rows.stride_outer == rows.inner * rows.stride_inner) rows.inner = 0;
  return rows;
}

Problem canonical(Problem problem) {
  problem.student = canonical(problem.student);
  problem.teacher = canonical(problem.teacher);
  return problem;
}

constexpr i64 kMaxWidth = i64{1} << 30;  // columns are counted in int

void check(const Problem& p, const Rows& grad) {
  const bool reads_rows = p.rank == 0 || p.student_proj;
  if (p.rank > kMaxRank || !reads_rows) throw std::invalid_argument("cuda: rank out of range");
  if (p.student_width > kMaxWidth || p.teacher_width > kMaxWidth) {
    throw std::invalid_argument("cuda: rows wider than 2^30");
  }
  const bool alike = p.student.dtype == p.teacher.dtype &&
                     (!grad.data || grad.dtype == p.student.dtype);
  if (!alike) throw std::invalid_argument("cuda: student, teacher and gradient differ in dtype");
}

}  // namespace

void fail(const Launch& launch, const std::string& reason) {
  const Problem& p = launch.problem;
  throw std::runtime_error(
      std::string("oprd CUDA kernel ") + launch.kernel + " on " + std::to_string(p.rows) +
      " rows of " + name_of(p.student.dtype) + ", student " + std::to_string(p.student_width) +
      " wide, teacher " + std::to_string(p.teacher_width) + ", rank " + std::to_string(p.rank) +
      " (" + std::to_string(launch.blocks) + " blocks of " + std::to_string(launch.threads) +
      " threads, device " + std::to_string(launch.stream.device) + "): " + reason);
}

void forward(const Problem* problems, const ForwardOut* outs, int layers,
             const Reduction& reduction, const Stream& stream) {
  const DeviceGuard guard(stream.device);
  const i64 rows = problems->rows;
  Scale scale;
  if (reduction.mean && reduction.denominator) {
    scale.device = reduction.denominator;
    scale.inverse = true;
  } else if (reduction.mean && problems->weights) {
    scale.device = reduction.stats + kScale;
    scale_by_weights(*problems, reduction.stats + kScale, reduction.stats_stride, layers, stream);
  } else if (reduction.mean) {
    scale.value = rows == 0 ? 0.f : static_cast<float>(1.0 / static_cast<double>(rows));
  }
  for (int layer = 0; layer < layers; ++layer) {
    const Problem p = canonical(problems[layer]);
    ForwardOut out = outs[layer];
    check(p, out.grad);
    out.grad = canonical(out.grad);
    if (rows > 0) {
      switch (p.student.dtype) {
        case DType::kFloat32: forward_rows<DType::kFloat32>(p, out, scale, stream); break;
        case DType::kBFloat16: forward_rows<DType::kBFloat16>(p, out, scale, stream); break;
        case DType::kFloat16: forward_rows<DType::kFloat16>(p, out, scale, stream); break;
      }
    }
    float* loss = reduction.each ? nullptr : reduction.losses + layer;
    reduce(p, out, scale, loss, reduction.stats + layer * reduction.stats_stride,
           reduction.partials, stream);
  }
}

void backward(const Problem* problems, const BackwardIn* ins, int layers, const Stream& stream) {
  if (problems->rows == 0) return;
  const DeviceGuard guard(stream.device);
  for (int layer = 0; layer < layers; ++layer) {
    const Problem p = canonical(problems[layer]);
    BackwardIn in = ins[layer];
    check(p, in.grad);
    in.grad = canonical(in.grad);
    switch (in.grad.dtype) {
      case DType::kFloat32: backward_rows<DType::kFloat32>(p, in, stream); break;
      case DType::kBFloat16: backward_rows<DType::kBFloat16>(p, in, stream); break;
      case DType::kFloat16: backward_rows<DType::kFloat16>(p, in, stream); break;
    }
  }
}

}  // namespace cuda
}  // namespace oprd
