// Reads the calls that Python passes to native code: the tuples LossCall and GradCall of
// oprd_kernels/call.py, which hold the tensors themselves. Addresses, sizes, strides and dtypes are
// read through the Python attributes of a tensor. This needs no torch header and no work in Python.
//
// All functions here need the GIL. Kernels run without it (py::gil_scoped_release).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "rep_loss.h"

namespace oprd {

namespace py = pybind11;

// The fields of LossCall and of GradCall in order. native.py checks that they match call.py.
enum LossField {
  kStudent, kTeacher, kStudentProj, kTeacherProj, kTeacherMean, kIndex, kTeacherIndex, kWeights,
  kDenominator, kLossKind, kLossReduction, kLossFields
};
enum GradField {
  kGradSaved, kGradStudent, kGradTeacher, kGradProj, kGradIndex, kGradTeacherIndex, kGradWeights,
  kGradKind, kGradReduction, kGradFields
};
constexpr const char* kLossFieldNames[kLossFields] = {
    "student", "teacher", "student_proj", "teacher_proj", "teacher_mean", "rows", "teacher_rows",
    "weights", "denominator", "kind", "reduction"};
constexpr const char* kGradFieldNames[kGradFields] = {
    "saved", "student", "teacher", "student_proj", "rows", "teacher_rows", "weights", "kind",
    "reduction"};

template <int N>
py::tuple field_names(const char* const (&names)[N]) {
  py::tuple found(N);
  for (int i = 0; i < N; ++i) found[i] = py::str(names[i]);
  return found;
}

// The interned attribute names, and the objects that tensors are compared with; created once.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* layout = PyUnicode_InternFromString("layout");
  PyObject* is_meta = PyUnicode_InternFromString("is_meta");
  PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* dtypes[3];  // torch.float32, .., in the order of DType
  PyObject* strided;
  PyObject* plain_types[2];  // other tensor subclasses are left to validate.py

  Names() {
    const py::module_ torch = py::module_::import("torch");
    const auto kept = [](py::object x) { return x.release().ptr(); };
    const char* const names[] = {"float32", "bfloat16", "float16"};
    for (int i = 0; i < 3; ++i) dtypes[i] = kept(torch.attr(names[i]));
    strided = kept(torch.attr("strided"));
    plain_types[0] = kept(torch.attr("Tensor"));
    plain_types[1] = kept(torch.attr("nn").attr("Parameter"));
  }
};

inline const Names& names() {
  static const Names* made = new Names;  // never freed: Python may be gone at exit
  return *made;
}

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

inline std::int64_t integer(PyObject* number) {
  const std::int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// A tuple of integers, such as a shape or strides.
struct Integers {
  py::object held;

  explicit Integers(PyObject* tuple) : held(checked(tuple)) {
    if (!PyTuple_Check(tuple)) throw std::invalid_argument("expected a tuple of integers");
  }
  int size() const { return static_cast<int>(PyTuple_GET_SIZE(held.ptr())); }
  // A negative index counts from the end.
  std::int64_t operator[](int i) const {
    return integer(PyTuple_GET_ITEM(held.ptr(), i < 0 ? size() + i : i));
  }
};

inline Integers shape(PyObject* x) { return Integers(PyObject_GetAttr(x, names().shape)); }
inline Integers strides(PyObject* x) {
  return Integers(PyObject_CallMethodNoArgs(x, names().stride));
}

// The address of a tensor's data; null for None.
template <class T>
T* data(PyObject* x) {
  if (x == Py_None) return nullptr;
  const py::object address = checked(PyObject_CallMethodNoArgs(x, names().data_ptr));
  void* found = PyLong_AsVoidPtr(address.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<T*>(found);
}

inline DType dtype(PyObject* x) {
  const py::object found = checked(PyObject_GetAttr(x, names().dtype));
  for (int i = 0; i < 3; ++i) {
    if (found.ptr() == names().dtypes[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument("expected a float32, bfloat16 or float16 tensor");
}

// A (N, d) or (B, T, d) tensor, with count N (or B T) and width d.
struct Matrix {
  Rows rows;
  std::int64_t count = 0;
  std::int64_t width = 0;

  Matrix() = default;
  explicit Matrix(PyObject* x) {
    const Integers sizes = shape(x), steps = strides(x);
    const int dims = sizes.size();
    if (dims != 2 && dims != 3) throw std::invalid_argument("expected 2 or 3 dimensions");
    width = sizes[-1];
    count = dims == 2 ? sizes[0] : sizes[0] * sizes[1];
    rows.data = data<void>(x);
    rows.dtype = oprd::dtype(x);
    rows.inner = sizes[-2] > 1 ? sizes[-2] : 1;
    rows.stride_inner = steps[-2];
    rows.stride_last = steps[-1];
    // For 2-D, continue the inner stride, so that one stride gives the position of every row.
    rows.stride_outer = dims == 2 ? rows.inner * rows.stride_inner : steps[0];
  }
};

inline bool is(PyObject* text, const char* value) {
  return PyUnicode_CompareWithASCIIString(text, value) == 0;
}

inline Kind kind(PyObject* text) {
  if (is(text, "mse")) return Kind::kMse;
  return is(text, "nmse") ? Kind::kNmse : Kind::kCosine;
}

// The properties that decide whether a tensor is valid as given.
struct Look {
  bool plain = false;  // whether kernels accept its type, dtype, layout and shape
  py::object dtype, device, shape;

  explicit Look(PyObject* x) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
    if (type != names().plain_types[0] && type != names().plain_types[1]) return;
    dtype = checked(PyObject_GetAttr(x, names().dtype));
    bool known = false;
    for (PyObject* one : names().dtypes) known = known || dtype.ptr() == one;
    if (!known || !has(x, names().layout, names().strided)) return;
    // The memory of a lazily negated tensor (x.conj().imag) does not hold its values.
    if (checked(PyObject_CallMethodNoArgs(x, names().is_neg)).ptr() != Py_False) return;
    shape = checked(PyObject_GetAttr(x, names().shape));
    device = checked(PyObject_GetAttr(x, names().device));
    const auto dims = PyTuple_GET_SIZE(shape.ptr());
    plain = (dims == 2 || dims == 3) && width() > 0;
  }
  std::int64_t width() const { return size(-1); }
  std::int64_t count() const {
    return PyTuple_GET_SIZE(shape.ptr()) == 2 ? size(0) : size(0) * size(1);
  }
  bool like(const Look& other) const {
    return plain && dtype.is(other.dtype) && shape.equal(other.shape) &&
           device.equal(other.device);
  }
  static bool has(PyObject* x, PyObject* name, PyObject* value) {
    return checked(PyObject_GetAttr(x, name)).ptr() == value;
  }

 private:
  std::int64_t size(Py_ssize_t i) const {
    return integer(PyTuple_GET_ITEM(shape.ptr(), i < 0 ? PyTuple_GET_SIZE(shape.ptr()) + i : i));
  }
};

// A sequence of calls that share everything except the states and the projectors, or of gradients.
class Sequence {
 public:
  explicit Sequence(PyObject* items) : held_(checked(PySequence_Fast(items, "not a sequence"))) {}
  int size() const { return static_cast<int>(PySequence_Fast_GET_SIZE(held_.ptr())); }
  PyObject* operator[](int i) const { return PySequence_Fast_GET_ITEM(held_.ptr(), i); }

 private:
  py::object held_;
};

// A LossCall or GradCall.
class Fields {
 public:
  Fields(PyObject* call, int count) : call_(call) {
    if (!PyTuple_Check(call) || PyTuple_GET_SIZE(call) != count) {
      throw std::invalid_argument("not a call as oprd_kernels/call.py has it");
    }
  }
  PyObject* operator[](int field) const { return PyTuple_GET_ITEM(call_, field); }

 private:
  PyObject* call_;
};

// The parts of one layer's buffer `saved` (see oprd_kernels/saved_buffer.py).
struct Saved {
  float* stats;
  float* row_stats;
  float* row_loss;
  float* dz;
};

inline Saved saved_parts(float* saved, std::int64_t rows, bool row_losses_inside) {
  Saved parts;
  parts.stats = saved;
  parts.row_stats = parts.stats + kBatchStats;
  parts.row_loss = parts.row_stats + kRowStats * rows;
  parts.dz = parts.row_loss + (row_losses_inside ? rows : 0);
  return parts;
}

// Reads one LossCall. `first` is the first layer of the call, which has the same rows and weights,
// or null if this is the first layer.
inline Problem loss_problem(const Fields& call, int threads, const Problem* first) {
  const Matrix student(call[kStudent]), teacher(call[kTeacher]);
  Problem p;
  if (first) {
    p = *first;
  } else {
    p.rows = call[kIndex] == Py_None ? student.count : shape(call[kIndex])[0];
    p.student_rows = data<const std::int64_t>(call[kIndex]);
    p.teacher_rows = data<const std::int64_t>(call[kTeacherIndex]);
    p.weights = data<const float>(call[kWeights]);
    p.kind = kind(call[kLossKind]);
    p.threads = threads;
  }
  p.student = student.rows;
  p.teacher = teacher.rows;
  p.student_width = student.width;
  p.teacher_width = teacher.width;
  if (call[kStudentProj] != Py_None) {
    p.rank = shape(call[kStudentProj])[0];
    p.student_proj = data<const float>(call[kStudentProj]);
    p.teacher_proj = data<const float>(call[kTeacherProj]);
    p.teacher_mean = data<const float>(call[kTeacherMean]);
  }
  return p;
}

// The arguments of a forward launch: LossCalls; the tensor that receives the gradient, or None; the
// losses, one per layer or, for reduction "none", one per row; `saved`, which is a matrix if there
// are several layers.
struct Forward {
  std::vector<Problem> problems;
  std::vector<ForwardOut> outs;
  const float* denominator = nullptr;
  bool mean = false;
  bool each = false;  // reduction "none": one loss per row
  float* losses = nullptr;
  float* saved = nullptr;
  std::int64_t saved_stride = 0;  // from layer to layer

  Forward(PyObject* calls, PyObject* grad, PyObject* loss, PyObject* saved_buffer, int threads) {
    const Sequence layers(calls);
    problems.reserve(layers.size());
    outs.reserve(layers.size());
    losses = data<float>(loss);
    saved = data<float>(saved_buffer);
    if (layers.size() > 1) saved_stride = strides(saved_buffer)[0];
    for (int i = 0; i < layers.size(); ++i) {
      const Fields call(layers[i], kLossFields);
      if (i == 0) {
        denominator = data<const float>(call[kDenominator]);
        mean = is(call[kLossReduction], "mean");
        each = is(call[kLossReduction], "none");
      }
      problems.push_back(loss_problem(call, threads, i ? &problems[0] : nullptr));
      const Saved parts = saved_parts(saved + i * saved_stride, problems[i].rows, !each);
      ForwardOut out;
      out.row_loss = each ? losses : parts.row_loss;
      out.row_stats = parts.row_stats;
      out.dz = parts.dz;
      if (grad != Py_None) out.grad = Matrix(grad).rows;
      outs.push_back(out);
    }
  }
  int layers() const { return static_cast<int>(problems.size()); }
};

// Reads one GradCall and the tensor that receives its gradient. After a projection the states may
// have been freed. The gradient, which has the student's shape, then stands in for them.
inline Problem grad_problem(const Fields& call, const Matrix& grad, int threads,
                            const Problem* first) {
  Problem p;
  if (first) {
    p = *first;
  } else {
    p.rows = call[kGradIndex] == Py_None ? grad.count : shape(call[kGradIndex])[0];
    p.student_rows = data<const std::int64_t>(call[kGradIndex]);
    p.teacher_rows = data<const std::int64_t>(call[kGradTeacherIndex]);
    p.weights = data<const float>(call[kGradWeights]);
    p.kind = kind(call[kGradKind]);
    p.threads = threads;
  }
  const bool projected = call[kGradProj] != Py_None;
  const Matrix student = projected ? grad : Matrix(call[kGradStudent]);
  const Matrix teacher = projected ? grad : Matrix(call[kGradTeacher]);
  p.student = student.rows;
  p.teacher = teacher.rows;
  p.student_width = student.width;
  p.teacher_width = teacher.width;
  if (projected) {
    p.rank = shape(call[kGradProj])[0];
    p.student_proj = data<const float>(call[kGradProj]);
  }
  return p;
}

// The arguments of a backward launch: GradCalls; the tensors that receive their gradients; whether
// the gradients are added; and the upstream gradients, which are one value for all layers, one per
// layer or, for reduction "none", one per row.
struct Backward {
  std::vector<Problem> problems;
  std::vector<BackwardIn> ins;

  Backward(PyObject* calls, PyObject* grads, PyObject* accumulate, PyObject* grad_losses,
           int threads) {
    const Sequence layers(calls), into(grads);
    if (into.size() != layers.size()) throw std::invalid_argument("expected a gradient a layer");
    problems.reserve(layers.size());
    ins.reserve(layers.size());
    const float* arriving = data<const float>(grad_losses);
    const Integers steps = strides(grad_losses);
    const std::int64_t step = steps.size() ? steps[0] : 0;
    bool each = false;
    for (int i = 0; i < layers.size(); ++i) {
      const Fields call(layers[i], kGradFields);
      if (i == 0) each = is(call[kGradReduction], "none");
      const Matrix grad(into[i]);
      problems.push_back(grad_problem(call, grad, threads, i ? &problems[0] : nullptr));
      const Saved parts = saved_parts(data<float>(call[kGradSaved]), problems[i].rows, !each);
      BackwardIn in;
      in.row_stats = parts.row_stats;
      in.dz = parts.dz;
      in.grad_loss = arriving + (each ? 0 : i * step);
      in.grad_loss_stride = each ? step : 0;
      in.scale = parts.stats + kScale;
      in.grad = grad.rows;
      in.accumulate = accumulate == Py_True;
      ins.push_back(in);
    }
  }
  int layers() const { return static_cast<int>(problems.size()); }
};

// A module function that does not use pybind11's dispatch, which costs more than reading a call.
// Body returns an int or nothing.
template <int N, auto Body>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != N) throw std::invalid_argument("expected " + std::to_string(N) + " arguments");
    PyObject* exactly[N];
    for (int i = 0; i < N; ++i) exactly[i] = arguments[i];
    if constexpr (std::is_void_v<decltype(Body(exactly))>) {
      Body(exactly);
      Py_RETURN_NONE;
    } else {
      return PyLong_FromLong(Body(exactly));
    }
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <int N, auto Body>
PyMethodDef method(const char* name) {
  const auto function = reinterpret_cast<void (*)()>(&entry<N, Body>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
}

// `methods` must end with an empty entry and live as long as the module.
inline void add_methods(py::module_& m, PyMethodDef* methods) {
  names();  // created now, because torch has been imported
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace oprd
