// The part of DLPack's C exchange interface (dmlc/dlpack 1.3) that says what a Python tensor is.
//
// Recent releases of torch have it (2.13 does): a capsule on the type, __dlpack_c_exchange_api__,
// holds a function that fills in a DLTensor in a few nanoseconds, without allocating and without
// handing anything over. The layouts are DLPack's and fixed by its major version.
#pragma once
#include <cstdint>

namespace vf::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr char kAttribute[] = "__dlpack_c_exchange_api__", kCapsule[] = "dlpack_exchange_api";

enum Device : int32_t { kCpu = 1 };
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const DataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate_managed;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // null where there is none
  void* current_stream;
};

}  // namespace vf::dlpack
