// Chooses the instruction set at run time.
#include "ms_deform_attn.h"

#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace msda {

#define MSDA_DECLARE(isa)                                            \
  namespace isa {                                                    \
  void forward(const Problem&, void*, const cpu::Pool&);             \
  void backward(const Problem&, const Gradients&, const cpu::Pool&); \
  }
MSDA_DECLARE(portable)
#ifdef __x86_64__
MSDA_DECLARE(avx2)
MSDA_DECLARE(avx512)
#endif

namespace cpu {
namespace {

struct InstructionSet {
  const char* name;
  void (*forward)(const Problem&, void*, const Pool&);
  void (*backward)(const Problem&, const Gradients&, const Pool&);
};

constexpr InstructionSet kPortable{"portable", portable::forward, portable::backward};

// MSDA_CPU_ISA=avx2 or MSDA_CPU_ISA=portable selects a smaller instruction set than the machine supports.
InstructionSet choose(int64_t channels) {
#ifdef __x86_64__
  const char* limit = std::getenv("MSDA_CPU_ISA");
  const auto allowed = [limit](const char* name) { return limit == nullptr || std::strcmp(limit, name) == 0; };
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // With 8, 24, 40... channels, half of the last 16 lanes would be padding.
  const bool fits_16_lanes = (channels + 7) / 8 % 2 == 0;
  if (has_avx512 && allowed("avx512") && (fits_16_lanes || limit != nullptr))
    return {"avx512", avx512::forward, avx512::backward};
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return {"avx2", avx2::forward, avx2::backward};
#endif
  return kPortable;
}

// Requests huge pages for memory that is about to be written. It is often new, and page faults on small pages would
// take longer than the kernels.
void request_huge_pages(void* data, int64_t elements, DType dtype) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + elements * size) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // optional: it may fail
#endif
}

}  // namespace

void forward(const Problem& problem, void* output, const Pool& pool) {
  const Problem& p = problem;
  request_huge_pages(output, p.batch * p.queries * p.heads * p.channels, p.dtype);
  choose(problem.channels).forward(problem, output, pool);
}

void backward(const Problem& problem, const Gradients& gradients, const Pool& pool) {
  const Problem& p = problem;
  const int64_t samples = p.batch * p.queries * p.heads * p.samples();
  request_huge_pages(gradients.value, p.batch * p.keys * p.heads * p.channels, p.dtype);
  request_huge_pages(gradients.coordinates, 2 * samples, p.coordinate_dtype);
  request_huge_pages(gradients.weights, samples, p.coordinate_dtype);
  choose(problem.channels).backward(problem, gradients, pool);
}

const char* instruction_set() { return choose(16).name; }

}  // namespace cpu
}  // namespace msda
