#include "tensors.h"

namespace py = pybind11;

namespace dlmone {
namespace {

int64_t bytes_of(Element element) {
  switch (element) {
    case Element::kFloat:
      return sizeof(float);
    case Element::kInteger:
      return sizeof(int64_t);
    case Element::kByte:
      break;
  }
  return 1;
}

const char* name_of(Element element) {
  switch (element) {
    case Element::kFloat:
      return "float32";
    case Element::kInteger:
      return "int64";
    case Element::kByte:
      break;
  }
  return "bool or uint8";
}

bool matches(const dlpack::DataType& type, Element element) {
  constexpr uint8_t kInt = 0, kUnsigned = 1, kFloat = 2, kBool = 6;
  if (type.lanes != 1 || type.bits != 8 * bytes_of(element)) return false;
  switch (element) {
    case Element::kFloat:
      return type.code == kFloat;
    case Element::kInteger:
      return type.code == kInt;
    case Element::kByte:
      break;
  }
  return type.code == kUnsigned || type.code == kBool;
}

// How the object's type exchanges tensors; null where it does not.
const dlpack::Exchange* exchange_of(const py::object& object) {
  static PyObject* const attribute = PyUnicode_InternFromString(dlpack::kAttribute);
  const auto found = py::reinterpret_steal<py::object>(
      PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), attribute));
  if (!found) {
    PyErr_Clear();
    return nullptr;
  }
  if (!PyCapsule_IsValid(found.ptr(), dlpack::kCapsule)) return nullptr;
  auto* exchange =
      static_cast<dlpack::Exchange*>(PyCapsule_GetPointer(found.ptr(), dlpack::kCapsule));
  while (exchange && exchange->major > dlpack::kMajorVersion) exchange = exchange->previous;
  return exchange && exchange->major == dlpack::kMajorVersion ? exchange : nullptr;
}

std::string joined(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

}  // namespace

TensorView::TensorView(const char* op, const char* name, const py::object& object, Element element,
                       int dimensions)
    : op_(op), name_(name), element_(element) {
  read(object);
  check_type();
  if (tensor_.dimensions != dimensions) {
    refuse("must have " + std::to_string(dimensions) + " dimension(s), got " +
           std::to_string(tensor_.dimensions));
  }
  for (int i = 0; i < dimensions; ++i) {
    if (size(i) < 0) refuse("has a negative size");
    if (size(i) > 1 && tensor_.strides[i] < 0) refuse("has a negative stride");
  }
  address_ = reinterpret_cast<std::uintptr_t>(tensor_.data) + tensor_.byte_offset;
  if (!empty() && !tensor_.data) refuse("has no memory");
  if (!empty()) aligned(bytes_of(element_));
}

int64_t TensorView::elements() const {
  int64_t count = 1;
  for (int i = 0; i < tensor_.dimensions; ++i) count *= size(i);
  return count;
}

const TensorView& TensorView::sized(std::initializer_list<int64_t> sizes) const {
  int dimension = 0;
  for (const int64_t wanted : sizes) {
    if (size(dimension++) != wanted) {
      refuse("must be " + joined(sizes.begin(), sizes.size()) + ", got " +
             joined(tensor_.sizes, sizes.size()));
    }
  }
  return *this;
}

const TensorView& TensorView::contiguous() const {
  int64_t expected = 1;
  for (int i = tensor_.dimensions - 1; i >= 0 && !empty(); --i) {
    if (size(i) > 1 && tensor_.strides[i] != expected) refuse("must be contiguous");
    expected *= size(i);
  }
  return *this;
}

const TensorView& TensorView::with_dense_rows() const {
  const int last = tensor_.dimensions - 1;
  if (size(last) > 1 && tensor_.strides[last] != 1) refuse("must have contiguous rows");
  return *this;
}

const TensorView& TensorView::aligned(std::uintptr_t bytes) const {
  if (address_ % bytes != 0) refuse("is not aligned to " + std::to_string(bytes) + " bytes");
  return *this;
}

const TensorView& TensorView::apart_from(const TensorView& other) const {
  const bool meet = !empty() && !other.empty() && address_ < other.end() && other.address_ < end();
  if (meet) refuse(std::string("must not share memory with ") + other.name_);
  return *this;
}

void TensorView::refuse(const std::string& complaint) const {
  throw std::invalid_argument(std::string(op_) + ": " + name_ + " " + complaint);
}

void TensorView::read(const py::object& object) {
  const dlpack::Exchange* exchange = exchange_of(object);
  if (!exchange || !exchange->view) {
    refuse(std::string("must be a tensor that DLPack's C interface reads, got ") +
           Py_TYPE(object.ptr())->tp_name);
  }
  if (exchange->view(object.ptr(), &tensor_) != 0) {
    // Its reasons come with a trace of the library that gives them.
    const std::string reason = py::error_already_set().what();
    refuse("cannot be read: " + reason.substr(0, reason.find('\n')));
  }
}

void TensorView::check_type() const {
  if (tensor_.device_type != dlpack::kCpu && tensor_.device_type != dlpack::kPinnedHost) {
    refuse("must be on the CPU");
  }
  if (!matches(tensor_.type, element_)) {
    refuse(std::string("must be ") + name_of(element_) + ", got DLPack type " +
           std::to_string(tensor_.type.code) + " of " + std::to_string(tensor_.type.bits) +
           " bits");
  }
}

std::uintptr_t TensorView::end() const {
  int64_t last = 0;
  for (int i = 0; i < tensor_.dimensions; ++i) last += (size(i) - 1) * tensor_.strides[i];
  return address_ + static_cast<std::uintptr_t>((last + 1) * bytes_of(element_));
}

}  // namespace dlmone
