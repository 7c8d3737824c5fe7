// The part of DLPack's C exchange interface (github.com/dmlc/dlpack, version 1.3) that is read
// here: how a Python tensor says what it is, without a copy and without its library being linked.
// Major versions change the layout, minor ones do not.
#pragma once

#include <cstdint>

namespace dlmone::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";

constexpr int32_t kCpu = 1;
constexpr int32_t kPinnedHost = 3;

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t dimensions;
  DataType type;
  int64_t* sizes;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major;
  uint32_t minor;
  Exchange* previous;
  void (*allocate)();
  void (*managed_from_object)();
  void (*managed_to_object)();
  // Fills in what stays the object's own; -1 and a Python exception if it cannot. May be null.
  int (*view)(void* object, Tensor* tensor);
  void (*current_stream)();
};

}  // namespace dlmone::dlpack
