// A fuzz target for the CPU operator. The input bytes decide the shapes, dtypes and contents of the arguments. These go
// through the checks of csrc/binding.h and csrc/cpu/binding.cpp and, if valid, through forward and backward. Every
// array has an allocation of exactly its size, so that AddressSanitizer sees any access outside of it.
//
// libFuzzer calls LLVMFuzzerTestOneInput. Built with MSDA_SEEDED, the program generates its own bytes:
//     fuzz_kernels CASES [SEED]
// Only the instruction set MSDA_FUZZ_ISA is linked; the others are stubs that must not be called.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "../../csrc/cpu/binding.cpp"

#define MSDA_STRING_(x) #x
#define MSDA_STRING(x) MSDA_STRING_(x)
#define MSDA_STUB(isa)                                                                \
  namespace msda::isa {                                                               \
  void forward(const Problem&, void*, const cpu::Pool&) { std::abort(); }             \
  void backward(const Problem&, const Gradients&, const cpu::Pool&) { std::abort(); } \
  }
#ifdef __x86_64__
#ifndef MSDA_FUZZ_avx512
MSDA_STUB(avx512)
#endif
#ifndef MSDA_FUZZ_avx2
MSDA_STUB(avx2)
#endif
#endif
#ifndef MSDA_FUZZ_portable
MSDA_STUB(portable)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Operators = msda::Operators<msda::cpu::Backend>;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t next() { return position_ < size_ ? data_[position_++] : 0; }
  int64_t below(int64_t limit) { return next() % limit; }
  bool rarely() { return next() >= 250; }  // 1 in 40

 private:
  const uint8_t* data_;
  size_t size_, position_ = 0;
};

constexpr ScalarType kFloats[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half, ScalarType::BFloat16};

int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    default: return 2;
  }
}

// The arrays of one case.
class Arrays {
 public:
  explicit Arrays(Bytes& bytes) : bytes_(bytes) {}

  // A tensor of these sizes, which rarely has other dimensions or another dtype.
  Tensor make(std::vector<int64_t> sizes, ScalarType type) {
    if (bytes_.rarely() && !sizes.empty()) {
      const auto axis = static_cast<size_t>(bytes_.below(static_cast<int64_t>(sizes.size())));
      sizes[axis] = bytes_.below(5);
    }
    if (bytes_.rarely()) sizes.push_back(bytes_.below(3));
    if (bytes_.rarely() && !sizes.empty()) sizes.pop_back();
    if (bytes_.rarely()) type = bytes_.below(2) ? kFloats[bytes_.below(4)] : ScalarType::Int;
    int64_t count = 1;
    std::vector<int64_t> strides(sizes.size());
    for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
    auto& array = arrays_.emplace_back(new uint8_t[static_cast<size_t>(count * bytes_of(type))]);
    if (type == ScalarType::Long || type == ScalarType::Int)
      std::memset(array.get(), 0, static_cast<size_t>(count * bytes_of(type)));
    else
      fill(array.get(), count, type);
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(array.get(), sizes, strides, cpu, type);
  }

 private:
  // Numbers between -2 and 2, and rarely arbitrary bits: infinite, NaN or very large.
  void fill(uint8_t* target, int64_t count, ScalarType type) {
    const uint32_t seed = bytes_.next() * 2654435761u + 1;
    const bool wild = bytes_.rarely();
    uint32_t state = seed;
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      const double number = (state >> 8) * 0x1p-22 - 2;
      const bool odd = wild && state >> 29 == 0;
      if (type == ScalarType::Double) {
        const uint64_t bits = uint64_t{state} * 0x9e3779b97f4a7c15u;
        std::memcpy(target + 8 * i, odd ? static_cast<const void*>(&bits) : &number, 8);
      } else {
        const float narrow = static_cast<float>(number);
        uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        if (odd) bits = state;
        if (type == ScalarType::Float) std::memcpy(target + 4 * i, &bits, 4);
        // The upper half of a float is a bfloat16, and an arbitrary number as a float16.
        else if (const auto half = static_cast<uint16_t>(bits >> 16))
          std::memcpy(target + 2 * i, &half, 2);
        else
          std::memset(target + 2 * i, 0, 2);
      }
    }
  }

  Bytes& bytes_;
  std::vector<std::unique_ptr<uint8_t[]>> arrays_;
};

void put(Tensor& tensor, size_t index, int64_t value) {
  if (tensor.scalar_type() == ScalarType::Long && static_cast<int64_t>(index) < static_cast<int64_t>(tensor.numel()))
    static_cast<int64_t*>(tensor.mutable_data_ptr())[index] = value;
}

void run(Bytes& bytes) {
  const int64_t batch = bytes.below(3), heads = 1 + bytes.below(3), points = 1 + bytes.below(5);
  const int64_t queries = bytes.below(8) == 7 ? 70 : bytes.below(6), levels = 1 + bytes.below(4);
  constexpr int64_t kChannels[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 64, 71, 100, 0};
  const int64_t channels = kChannels[bytes.below(bytes.rarely() ? 20 : 19)];
  const ScalarType type = kFloats[bytes.below(4)];
  const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const ScalarType coordinate_type = bytes.below(2) ? type : wide;

  std::vector<int64_t> shapes, starts;
  int64_t keys = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t height = 1 + bytes.below(7), width = 1 + bytes.below(7);
    shapes.insert(shapes.end(), {height, width});
    starts.push_back(keys);
    keys += height * width;
  }
  constexpr int64_t kOdd[] = {0,         -1,       1, 1 << 16, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62,
                              INT64_MIN, INT64_MAX};
  if (bytes.rarely()) shapes[static_cast<size_t>(bytes.below(2 * levels))] = kOdd[bytes.below(9)];
  if (bytes.rarely()) starts[static_cast<size_t>(bytes.below(levels))] = kOdd[bytes.below(9)];

  Arrays arrays(bytes);
  Tensor spatial_shapes = arrays.make({levels, 2}, ScalarType::Long);
  Tensor level_start_index = arrays.make({levels}, ScalarType::Long);
  for (size_t i = 0; i < shapes.size(); ++i) put(spatial_shapes, i, shapes[i]);
  for (size_t i = 0; i < starts.size(); ++i) put(level_start_index, i, starts[i]);
  const Tensor value = arrays.make({batch, keys, heads, channels}, type);
  std::vector<int64_t> num_points, samples = {batch, queries, heads, levels, points};
  if (bytes.below(3) == 0) {
    for (int64_t level = 0; level < levels; ++level) num_points.push_back(bytes.below(5));
    samples = {batch, queries, heads, std::accumulate(num_points.begin(), num_points.end(), int64_t{0})};
  }
  const Tensor weights = arrays.make(samples, coordinate_type);
  samples.push_back(2);
  const Tensor coordinates = arrays.make(samples, coordinate_type);
  const Tensor grad = arrays.make({batch, queries, heads * channels}, type);
  if (bytes.below(3) == 0) {
    Operators::ms_deform_attn(value, spatial_shapes, level_start_index, coordinates, weights, true, num_points);
    Operators::ms_deform_attn_backward(grad, value, spatial_shapes, level_start_index, coordinates, weights, true,
                                       num_points);
  } else {
    const Tensor references = arrays.make({batch, queries, levels, bytes.below(2) ? 4 : 2}, coordinate_type);
    Operators::ms_deform_attn_fused(value, spatial_shapes, level_start_index, references, coordinates, weights, true,
                                    num_points);
    Operators::ms_deform_attn_fused_backward(grad, value, spatial_shapes, level_start_index, references, coordinates,
                                             weights, true, num_points);
  }
}

int64_t refused = 0;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool chosen = setenv("MSDA_CPU_ISA", MSDA_STRING(MSDA_FUZZ_ISA), 1) == 0;
  if (!chosen || std::strcmp(msda_cpu_instruction_set(), MSDA_STRING(MSDA_FUZZ_ISA)) != 0) std::abort();
  Bytes bytes(data, size);
  try {
    run(bytes);
  } catch (const std::runtime_error&) {  // a check
    ++refused;
  }
  return 0;
}

#ifdef MSDA_SEEDED
int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000;
  uint64_t state = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 0;
  uint8_t data[96];
  for (int64_t i = 0; i < cases; ++i) {
    for (uint8_t& byte : data) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      byte = static_cast<uint8_t>(state >> 56);
    }
    LLVMFuzzerTestOneInput(data, sizeof(data));
  }
  std::printf("%s: %lld cases, %lld of them refused by a check\n", msda_cpu_instruction_set(),
              static_cast<long long>(cases), static_cast<long long>(refused));
  return 0;
}
#elif defined(MSDA_LIBFUZZER_MAIN)
// For GCC and a libFuzzer without a main function: GCC's callback at each branch (trace-pc) increments the counters
// that libFuzzer reads. The linker must prefer this definition to libFuzzer's, which only reports that it is
// unsupported.
namespace {
uint8_t counters[1 << 16];
}
extern "C" int LLVMFuzzerRunDriver(int* argc, char*** argv, int (*callback)(const uint8_t* data, size_t size));
extern "C" void __sanitizer_cov_8bit_counters_init(uint8_t* begin, uint8_t* end);
extern "C" __attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc() {
  ++counters[reinterpret_cast<uintptr_t>(__builtin_return_address(0)) % sizeof(counters)];
}
// GCC also traces comparisons of floats, which libFuzzer does not support.
extern "C" void __sanitizer_cov_trace_cmpf(float, float) {}
extern "C" void __sanitizer_cov_trace_cmpd(double, double) {}
int main(int argc, char** argv) {
  __sanitizer_cov_8bit_counters_init(counters, counters + sizeof(counters));
  return LLVMFuzzerRunDriver(&argc, &argv, LLVMFuzzerTestOneInput);
}
#endif
