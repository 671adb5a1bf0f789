// CPU kernels of multi-scale deformable attention, without torch.
#pragma once

#include "../ms_deform_attn.h"

namespace msda::cpu {

// The caller's thread pool. It runs body(begin, end, context) over disjoint ranges that cover [0, count), of at least
// `grain` elements where possible.
using Body = void (*)(int64_t begin, int64_t end, void* context);
struct Pool {
  int threads;
  void (*run)(int64_t count, int64_t grain, Body body, void* context);
};

// The results are bitwise equal for any number of threads.
void forward(const Problem& problem, void* output, const Pool& pool);
void backward(const Problem& problem, const Gradients& gradients, const Pool& pool);

// The instruction set in use: "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace msda::cpu
