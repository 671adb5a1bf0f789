// The operator in onnxruntime, computed by the CPU kernels. Three nodes, whose inputs are listed in `kNodes`:
// - MSDeformAttn and MSDeformAttnFused (domain msda_plugin), as msda_plugin.ops.ms_deform_attn and
// ms_deform_attn_fused;
//   the output is (bs, num_queries, num_heads * head_dim)
// - MultiscaleDeformableAttnPlugin_TRT (domain trt.plugins), with TensorRT's inputs and output:
//   (bs, num_queries, num_heads, head_dim)
#include <algorithm>
#include <atomic>
#include <climits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "../cpu/ms_deform_attn.h"
#include "api.h"

namespace msda::onnxruntime {
namespace {

// An error on its way to onnxruntime: one of its own, or a new one.
struct Error {
  Status* status = nullptr;
  std::string message;
};

void check(Status* status) {
  if (status != nullptr) throw Error{status, {}};
}

void require(bool condition, const std::string& message) {
  if (!condition) throw Error{nullptr, message};
}

// Runs `f`, whose exceptions must not reach onnxruntime.
template <class F>
Status* guarded(const Api& api, const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Error& error) {
    return error.status != nullptr ? error.status : api.create_status(kInvalidArgument, error.message.c_str());
  } catch (const std::bad_alloc&) {
    return api.create_status(kFail, "there is not enough memory for the operator");
  } catch (const std::exception& error) {
    return api.create_status(kFail, error.what());
  }
}

using Sizes = std::vector<int64_t>;

std::string text(const Sizes& sizes) {
  std::string joined = "(";
  for (size_t i = 0; i < sizes.size(); ++i) joined += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return joined + ")";
}

struct ShapeDeleter {
  Api api;
  void operator()(TypeAndShape* shape) const { api.release_shape(shape); }
};
using ShapePointer = std::unique_ptr<TypeAndShape, ShapeDeleter>;

Sizes sizes_of(const Api& api, const TypeAndShape* shape) {
  size_t count = 0;
  check(api.count_sizes(shape, &count));
  Sizes sizes(count);
  check(api.sizes(shape, sizes.data(), count));
  return sizes;
}

struct Node {
  const char *domain, *name;
  std::vector<const char*> inputs;  // the value and spatial_shapes first, coordinates and weights last

  bool has(const char* input) const { return std::string_view(inputs[2]) == input; }
  bool is_tensorrt() const { return has("level_start_index"); }
  bool is_fused() const { return has("reference_points"); }
};

const Node kNodes[] = {
    {"msda_plugin", "MSDeformAttn", {"value", "spatial_shapes", "sampling_locations", "attention_weights"}},
    {"msda_plugin",
     "MSDeformAttnFused",
     {"value", "spatial_shapes", "reference_points", "sampling_offsets", "attention_logits"}},
    {"trt.plugins",
     "MultiscaleDeformableAttnPlugin_TRT",
     {"value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights"}},
};

// A node for one combination of the inputs' dtypes. onnxruntime chooses the one that fits the file.
struct Operator : CustomOp {
  Api api;
  const Node& node;
  std::vector<ElementType> types;  // of the inputs

  Operator(const Api& api, const Node& node, std::vector<ElementType> types);

  size_t coordinates() const { return types.size() - 2; }  // the place of the sampling locations or offsets
  // The output's sizes, from those of the value and the coordinates.
  Sizes output_sizes(const Sizes& value, const Sizes& coordinates) const {
    if (node.is_tensorrt()) return {value[0], coordinates[1], value[2], value[3]};
    return {value[0], coordinates[1], value[2] * value[3]};
  }
  void check_types() const;
};

struct Tensor {
  ElementType type;
  const void* data;
  Sizes sizes;
};

// One run of a node. Nodes have no state, so that threads may run them at the same time.
struct Run {
  const Operator& op;
  const Api& api;
  KernelContext* context;

  void compute() const {
    std::vector<Tensor> inputs;
    for (size_t i = 0; i < op.types.size(); ++i) inputs.push_back(input(i));
    Problem p = problem(inputs);
    const Sizes spatial_shapes = integers(inputs[1]), starts = level_starts(p, spatial_shapes);
    if (op.node.is_tensorrt()) {
      require(inputs[2].sizes == Sizes{p.levels},
              "level_start_index has shape " + text(inputs[2].sizes) + ", but " + text({p.levels}) + " is needed");
      const Sizes given = integers(inputs[2]);
      require(given == starts, "level_start_index is " + text(given) + ", but the running sum of the levels' areas, " +
                                   text(starts) + ", is needed");
    }
    p.spatial_shapes = spatial_shapes.data();
    p.level_start_index = starts.data();

    const Sizes sizes = op.output_sizes(inputs[0].sizes, inputs[op.coordinates()].sizes);
    Value* output = nullptr;
    void* data = nullptr;
    check(api.output(context, 0, sizes.data(), sizes.size(), &output));
    check(api.data(output, &data));
    if (p.batch == 0 || p.queries == 0) return;
    forward(p, data);
  }

 private:
  Tensor input(size_t i) const {
    const Value* value = nullptr;
    void* data = nullptr;
    TypeAndShape* shape = nullptr;
    check(api.input(context, i, &value));
    check(api.shape(value, &shape));
    const ShapePointer owner(shape, ShapeDeleter{api});
    check(api.data(const_cast<Value*>(value), &data));
    return {op.types[i], data, sizes_of(api, shape)};
  }

  Problem problem(const std::vector<Tensor>& inputs) const {
    const Tensor &value = inputs[0], &shapes = inputs[1], &coordinates = inputs[op.coordinates()],
                 &weights = inputs.back();
    const std::string coordinates_name = op.node.inputs[op.coordinates()], weights_name = op.node.inputs.back();
    require(value.sizes.size() == 4 && value.sizes[2] > 0 && value.sizes[3] > 0,
            "value has shape " + text(value.sizes) +
                ", but (bs, num_keys, num_heads, head_dim) with at least one head and channel is needed");
    require(shapes.sizes.size() == 2 && shapes.sizes[0] > 0 && shapes.sizes[1] == 2,
            "spatial_shapes has shape " + text(shapes.sizes) +
                ", but (num_levels, 2) with at least one level is needed: (h, w) of each level");
    require(coordinates.sizes.size() == 6 && coordinates.sizes[4] > 0,
            coordinates_name + " has shape " + text(coordinates.sizes) +
                ", but (bs, num_queries, num_heads, num_levels, num_points, 2) with at least one point is needed");
    Problem p{};
    p.batch = value.sizes[0];
    p.keys = value.sizes[1];
    p.heads = value.sizes[2];
    p.channels = value.sizes[3];
    p.levels = shapes.sizes[0];
    p.queries = coordinates.sizes[1];
    p.points = coordinates.sizes[4];
    Sizes expected{p.batch, p.queries, p.heads, p.levels, p.points, 2};
    require(coordinates.sizes == expected, coordinates_name + " has shape " + text(coordinates.sizes) + ", but " +
                                               text(expected) + " is needed, to go with value " + text(value.sizes) +
                                               " and the levels in spatial_shapes");
    expected.pop_back();
    require(weights.sizes == expected, weights_name + " has shape " + text(weights.sizes) + ", but " + text(expected) +
                                           " is needed, to go with " + coordinates_name);
    p.dtype = value.type == kFloat ? DType::float32 : DType::float16;
    p.coordinate_dtype = coordinates.type == kFloat ? DType::float32 : DType::float16;
    p.value = value.data;
    p.coordinates = coordinates.data;
    p.weights = weights.data;
    if (op.node.is_fused()) {
      const Tensor& points = inputs[2];
      expected = {p.batch, p.queries, p.levels};
      p.reference_size = points.sizes.size() == 4 ? static_cast<int>(points.sizes[3]) : 0;
      require((p.reference_size == 2 || p.reference_size == 4) &&
                  std::equal(expected.begin(), expected.end(), points.sizes.begin()),
              "reference_points has shape " + text(points.sizes) + ", but (bs, num_queries, num_levels) = " +
                  text(expected) + " with 2 or 4 coordinates is needed, points (x, y) or boxes (cx, cy, w, h)");
      p.reference_points = points.data;
      p.wide_reference = points.type != coordinates.type;
    }
    return p;
  }

  static Sizes integers(const Tensor& tensor) {
    int64_t count = 1;
    for (const int64_t size : tensor.sizes) count *= size;
    Sizes values(count);
    if (tensor.type == kInt64)
      std::copy_n(static_cast<const int64_t*>(tensor.data), count, values.begin());
    else
      std::copy_n(static_cast<const int32_t*>(tensor.data), count, values.begin());
    return values;
  }

  // The first key of each level, after a check that the levels fill the keys.
  static Sizes level_starts(const Problem& p, const Sizes& shapes) {
    constexpr int64_t kLimit = (int64_t{1} << 31) - 1;  // the kernels count keys in 32 bits
    require(p.keys < kLimit, "value has " + std::to_string(p.keys) + " keys, but fewer than 2^31 - 1 are needed");
    Sizes starts;
    int64_t sum = 0, with_borders = 2;
    for (int64_t level = 0; level < p.levels; ++level) {
      const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
      const bool fits = height > 0 && width > 0 && height <= p.keys && width <= p.keys;
      require(fits && height * width <= p.keys - sum,
              "spatial_shapes is " + text(shapes) +
                  ", but each (h, w) must be positive, and the areas must add up to " + std::to_string(p.keys) +
                  ", the number of keys in value");
      starts.push_back(sum);
      sum += height * width;
      with_borders += (height + 2) * (width + 1);
    }
    require(sum == p.keys, "spatial_shapes is " + text(shapes) + ", whose areas add up to " + std::to_string(sum) +
                               ", but value has " + std::to_string(p.keys) + " keys");
    require(with_borders < kLimit, "the levels in spatial_shapes have " + std::to_string(with_borders) +
                                       " pixels with their borders, but fewer than 2^31 - 1 are needed");
    return starts;
  }

  void forward(const Problem& p, void* output) const;
};

// The call that a thread is in. The kernels' pool has no argument for it.
struct Call {
  const Api& api;
  KernelContext* context;
  int64_t slices;
};
thread_local const Call* current_call = nullptr;

// A part of the tasks. The session's threads take one after another.
struct Slices {
  int64_t tasks, count;
  cpu::Body body;
  void* context;
  std::atomic<bool> out_of_memory{false};

  static void run(void* self, size_t i) {
    auto& s = *static_cast<Slices*>(self);
    const auto slice = static_cast<int64_t>(i);
    try {
      s.body(s.tasks * slice / s.count, s.tasks * (slice + 1) / s.count, s.context);
    } catch (...) {  // it must not pass through onnxruntime's threads
      s.out_of_memory = true;
    }
  }
};

void run_in_session(int64_t tasks, int64_t grain, cpu::Body body, void* context) {
  const Call& call = *current_call;
  Slices slices{tasks, std::min(call.slices, (tasks + grain - 1) / grain), body, context};
  if (slices.count <= 1) {
    body(0, tasks, context);
    return;
  }
  check(call.api.parallel_for(call.context, Slices::run, static_cast<size_t>(slices.count), 0, &slices));
  if (slices.out_of_memory) throw std::bad_alloc();
}

void Run::forward(const Problem& p, void* output) const {
  // onnxruntime does not tell how many threads a session has. Each slice packs the rows of its image and head, so
  // slices are whole heads, or at most quarters of them if the machine has more processors than that.
  static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
  const int64_t units = p.batch * p.heads;
  const Call call{api, context, units * std::clamp<int64_t>((processors + units - 1) / units, 1, 4)};
  const Call* outer = current_call;
  current_call = &call;
  struct Restore {
    const Call* call;
    ~Restore() { current_call = call; }
  } restore{outer};
  cpu::forward(p, output, cpu::Pool{static_cast<int>(processors), run_in_session});
}

// The output's shape while a session is created. Results do not depend on it, but onnxruntime's optimizations do.
void infer_shape(const Operator& op, ShapeInferenceContext* context) {
  const Api& api = op.api;
  struct Known {
    int type = 0;
    Sizes sizes;                     // -1 where the size is not known
    std::vector<const char*> names;  // of sizes that are not known but have a name, otherwise empty
  };
  const auto input = [&](size_t i) {
    Known known;
    TypeAndShape* shape = nullptr;
    check(api.input_shape(context, i, &shape));
    check(api.type(shape, &known.type));
    known.sizes = sizes_of(api, shape);
    known.names.resize(known.sizes.size());
    check(api.names(shape, known.names.data(), known.names.size()));
    return known;
  };
  const Known value = input(0), coordinates = input(op.coordinates());
  if (value.sizes.size() != 4 || coordinates.sizes.size() != 6) return;  // not known, or the run will tell
  const auto is_known = [](const Known& known, size_t i) { return known.sizes[i] >= 0 || *known.names[i] != '\0'; };
  if (!is_known(value, 0) || !is_known(coordinates, 1) || value.sizes[2] < 0 || value.sizes[3] < 0) return;
  const Sizes sizes = op.output_sizes(value.sizes, coordinates.sizes);
  std::vector<const char*> names(sizes.size(), "");
  names[0] = value.names[0];
  names[1] = coordinates.names[1];
  TypeAndShape* shape = nullptr;
  check(api.create_shape(&shape));
  const ShapePointer owner(shape, ShapeDeleter{api});
  check(api.set_type(shape, value.type));
  check(api.set_sizes(shape, sizes.data(), sizes.size()));
  check(api.set_names(shape, names.data(), names.size()));
  check(api.set_output_shape(context, 0, shape));
}

const Operator& cast(const CustomOp* op) { return *static_cast<const Operator*>(op); }

void Operator::check_types() const {
  const auto name = [](ElementType type) { return type == kFloat ? "float32" : "float16"; };
  const ElementType value = types[0], sampling = types.back();
  const auto is_valid = [&](ElementType type) { return type == value || (type == kFloat && !node.is_tensorrt()); };
  const bool reference = !node.is_fused() || types[2] == sampling || types[2] == kFloat;
  if (types[coordinates()] == sampling && is_valid(sampling) && reference) return;
  std::string message;
  for (size_t i = 0; i < types.size(); ++i)
    if (types[i] == kFloat || types[i] == kFloat16)
      message += std::string(message.empty() ? "" : ", ") + node.inputs[i] + " is " + name(types[i]);
  require(false, message + (node.is_tensorrt() ? ", but one dtype is needed"
                                               : ", but the others must have the dtype of value or be float32, and the "
                                                 "last two must have the same"));
}

Operator::Operator(const Api& api, const Node& node, std::vector<ElementType> types)
    : api(api), node(node), types(std::move(types)) {
  name = [](const CustomOp* op) { return cast(op).node.name; };
  provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
  input_count = [](const CustomOp* op) { return cast(op).types.size(); };
  input_type = [](const CustomOp* op, size_t i) -> int { return cast(op).types[i]; };
  output_count = [](const CustomOp*) { return size_t{1}; };
  output_type = [](const CustomOp* op, size_t) -> int { return cast(op).types[0]; };
  input_characteristic = output_characteristic = input_memory = [](const CustomOp*, size_t) { return 0; };
  first_opset = [](const CustomOp*) { return 1; };
  last_opset = [](const CustomOp*) { return INT_MAX; };
  create_kernel_v2 = [](const CustomOp* op, const void*, const KernelInfo*, void** kernel) -> Status* {
    *kernel = const_cast<CustomOp*>(op);
    return guarded(cast(op).api, [op] { cast(op).check_types(); });
  };
  destroy_kernel = [](void*) {};
  compute_v2 = [](void* kernel, KernelContext* context) {
    const Operator& op = *static_cast<const Operator*>(static_cast<CustomOp*>(kernel));
    return guarded(op.api, [&] { Run{op, op.api, context}.compute(); });
  };
  infer_shape = [](const CustomOp* op, ShapeInferenceContext* context) {
    return guarded(cast(op).api, [&] { onnxruntime::infer_shape(cast(op), context); });
  };
}

// The operators and domains for one onnxruntime; a process may have several. All sessions share them.
class Domains {
 public:
  explicit Domains(const Api& api) : api_(api) {
    for (const Node& node : kNodes) add(node, {});
    for (const char* name : {"msda_plugin", "trt.plugins"}) {
      CustomOpDomain* domain = nullptr;
      check(api.create_domain(name, &domain));
      domains_.emplace_back(domain, [api](CustomOpDomain* domain) { api.release_domain(domain); });
      for (const auto& op : operators_)
        if (std::string_view(op->node.domain) == name) check(api.add_operator(domain, op.get()));
    }
  }

  Domains(const Domains&) = delete;
  void operator=(const Domains&) = delete;

  void add_to(SessionOptions* options) const {
    for (const auto& domain : domains_) check(api_.add_domain(options, domain.get()));
  }

 private:
  // All combinations of dtypes, also those that check_types refuses: its sentence is clearer than onnxruntime's.
  void add(const Node& node, std::vector<ElementType> types) {
    if (types.size() == node.inputs.size()) {
      operators_.emplace_back(new Operator(api_, node, std::move(types)));
      return;
    }
    const bool integers = types.size() == 1 || (types.size() == 2 && node.is_tensorrt());
    for (const ElementType type : {integers ? kInt32 : kFloat, integers ? kInt64 : kFloat16}) {
      std::vector<ElementType> longer = types;
      longer.push_back(type);
      add(node, std::move(longer));
    }
  }

  Api api_;
  std::vector<std::unique_ptr<Operator>> operators_;
  std::vector<std::shared_ptr<CustomOpDomain>> domains_;
};

void add_domains(const Api& api, SessionOptions* options) {
  static std::mutex mutex;
  static std::map<const void*, Domains> domains;
  const std::lock_guard lock(mutex);
  domains.try_emplace(api.table(), api).first->second.add_to(options);
}

}  // namespace
}  // namespace msda::onnxruntime

// Called by onnxruntime: SessionOptions.register_custom_ops_library in Python, RegisterCustomOpsLibrary_V2 in C.
extern "C" __attribute__((visibility("default"))) msda::onnxruntime::Status* RegisterCustomOps(
    msda::onnxruntime::SessionOptions* options, const msda::onnxruntime::ApiBase* base) {
  using namespace msda::onnxruntime;
  if (const void* table = base->table(kApiVersion)) {
    const Api api(table);
    return guarded(api, [&] { add_domains(api, options); });
  }
  const std::string message = std::string("msda_plugin's operators need onnxruntime 1.17 or newer, but this is ") +
                              base->version() + ": upgrade onnxruntime";
  return Api(base->table(1)).create_status(kFail, message.c_str());
}
