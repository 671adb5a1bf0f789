// CPU kernels of multi-scale deformable attention. Torch-free.
#pragma once

#include "../ms_deform_attn.h"

namespace msda::cpu {

// How the caller's thread pool runs body(begin, end, context) over disjoint ranges that cover [0, count), none of which
// is shorter than `grain` if it can be helped.
using Body = void (*)(int64_t begin, int64_t end, void* context);
struct Pool {
  int threads;
  void (*run)(int64_t count, int64_t grain, Body body, void* context);
};

// Both are bitwise repeatable for any number of threads.
void forward(const Problem& problem, void* output, const Pool& pool);
void backward(const Problem& problem, const Gradients& gradients, const Pool& pool);

// The instruction set that runs: "avx512", "avx2" or "portable".
const char* instruction_set();

}  // namespace msda::cpu
