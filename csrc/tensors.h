// Arguments that are tensors: each is read through DLPack and checked here, whatever the Python
// side has checked before, so that no call can read or write outside of them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "bindings.h"
#include "dlpack.h"

namespace dlmone {

enum class Element { kFloat, kInteger, kByte };  // fp32; int64; bool or uint8

// A tensor in the CPU's memory, for as long as its Python object lives.
class TensorView {
 public:
  // Throws std::invalid_argument, which names the operation and the argument, if the object is not
  // such a tensor.
  TensorView(const char* op, const char* name, const pybind11::object& object, Element element,
             int dimensions);

  int64_t size(int dimension) const { return tensor_.sizes[dimension]; }
  int64_t elements() const;
  // Elements from one row to the next.
  int64_t row_stride() const { return tensor_.strides[0]; }
  bool empty() const { return elements() == 0; }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(address_);
  }

  // Each throws std::invalid_argument.
  const TensorView& sized(std::initializer_list<int64_t> sizes) const;
  const TensorView& contiguous() const;
  // Rows of any stride whose elements stand side by side.
  const TensorView& with_dense_rows() const;
  const TensorView& aligned(std::uintptr_t bytes) const;
  const TensorView& apart_from(const TensorView& other) const;
  [[noreturn]] void refuse(const std::string& complaint) const;

 private:
  void read(const pybind11::object& object);
  void check_type() const;
  std::uintptr_t end() const;

  const char* op_;
  const char* name_;
  Element element_;
  dlpack::Tensor tensor_ = {};
  std::uintptr_t address_ = 0;
};

}  // namespace dlmone
