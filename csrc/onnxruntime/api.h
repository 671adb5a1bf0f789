// The part of onnxruntime's C API that a custom operator needs. onnxruntime's packages for Python have no headers, and
// its API is a table of functions that only grows at its end: the functions are declared here with their place in it.
// They exist in onnxruntime 1.17 and newer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace msda::onnxruntime {

constexpr uint32_t kApiVersion = 17;

struct Status;  // null: success
struct SessionOptions;
struct CustomOpDomain;
struct Value;
struct TypeAndShape;
struct KernelInfo;
struct KernelContext;
struct ShapeInferenceContext;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum ElementType { kFloat = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };

class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}
  const void* table() const { return table_; }

#define MSDA_ENTRY(place, name, Returned, parameters, arguments) \
  Returned name parameters const { return reinterpret_cast<Returned(*) parameters>(table_[place]) arguments; }

  MSDA_ENTRY(0, create_status, Status*, (int code, const char* message), (code, message))
  MSDA_ENTRY(26, create_domain, Status*, (const char* name, CustomOpDomain** domain), (name, domain))
  MSDA_ENTRY(27, add_operator, Status*, (CustomOpDomain * domain, const struct CustomOp* op), (domain, op))
  MSDA_ENTRY(28, add_domain, Status*, (SessionOptions * options, CustomOpDomain* domain), (options, domain))
  MSDA_ENTRY(51, data, Status*, (Value * value, void** data), (value, data))
  MSDA_ENTRY(57, create_shape, Status*, (TypeAndShape * *shape), (shape))
  MSDA_ENTRY(58, set_type, Status*, (TypeAndShape * shape, int type), (shape, type))
  MSDA_ENTRY(59, set_sizes, Status*, (TypeAndShape * shape, const int64_t* sizes, size_t count), (shape, sizes, count))
  MSDA_ENTRY(60, type, Status*, (const TypeAndShape* shape, int* type), (shape, type))
  MSDA_ENTRY(61, count_sizes, Status*, (const TypeAndShape* shape, size_t* count), (shape, count))
  MSDA_ENTRY(62, sizes, Status*, (const TypeAndShape* shape, int64_t* sizes, size_t count), (shape, sizes, count))
  MSDA_ENTRY(63, names, Status*, (const TypeAndShape* shape, const char** names, size_t count), (shape, names, count))
  MSDA_ENTRY(65, shape, Status*, (const Value* value, TypeAndShape** shape), (value, shape))
  MSDA_ENTRY(90, input, Status*, (const KernelContext* context, size_t i, const Value** value), (context, i, value))
  MSDA_ENTRY(91, output, Status*,
             (KernelContext * context, size_t i, const int64_t* sizes, size_t count, Value** value),
             (context, i, sizes, count, value))
  MSDA_ENTRY(93, release_status, void, (Status * status), (status))
  MSDA_ENTRY(99, release_shape, void, (TypeAndShape * shape), (shape))
  MSDA_ENTRY(101, release_domain, void, (CustomOpDomain * domain), (domain))
  // The context owns the shape.
  MSDA_ENTRY(268, input_shape, Status*, (const ShapeInferenceContext* context, size_t i, TypeAndShape** shape),
             (context, i, shape))
  MSDA_ENTRY(270, set_output_shape, Status*,
             (const ShapeInferenceContext* context, size_t i, const TypeAndShape* shape), (context, i, shape))
  MSDA_ENTRY(271, set_names, Status*, (TypeAndShape * shape, const char** names, size_t count), (shape, names, count))
  // Runs function(argument, i) for i in [0, count) on the threads of the session.
  MSDA_ENTRY(274, parallel_for, Status*,
             (const KernelContext* context, void (*function)(void*, size_t), size_t count, size_t batches,
              void* argument),
             (context, function, count, batches, argument))
#undef MSDA_ENTRY

 private:
  void* const* table_;
};

struct ApiBase {
  const void* (*table)(uint32_t version);  // null: onnxruntime is older
  const char* (*version)();
};

// What onnxruntime calls to learn of an operator and to run it, in its order.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t i) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t i) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void* kernel, KernelContext*) = nullptr;
  void (*destroy_kernel)(void* kernel) = nullptr;
  int (*input_characteristic)(const CustomOp*, size_t i) = nullptr;   // 0: required
  int (*output_characteristic)(const CustomOp*, size_t i) = nullptr;  // 0: required
  int (*input_memory)(const CustomOp*, size_t i) = nullptr;           // 0: the provider's own
  int (*variadic[4])(const CustomOp*) = {};                           // only for variable numbers of tensors
  Status* (*create_kernel_v2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel) = nullptr;
  Status* (*compute_v2)(void* kernel, KernelContext*) = nullptr;
  Status* (*infer_shape)(const CustomOp*, ShapeInferenceContext*) = nullptr;
  int (*first_opset)(const CustomOp*) = nullptr;
  int (*last_opset)(const CustomOp*) = nullptr;
};

}  // namespace msda::onnxruntime
