// Memory of the CPU kernels: buffers and prefetches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../ms_deform_attn.h"

namespace msda::MSDA_ISA {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = int64_t{1} << 21;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialized memory. Large buffers request huge pages, since they are read at random and cause fewer page faults.
// They are aligned here, since glibc returns large memory of aligned_alloc to the system, which clears it again for the
// next call, but keeps that of malloc.
template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t needed = max_of(count, 1) * static_cast<int64_t>(sizeof(E));
    const int64_t alignment = needed < kHugePage / 2 ? kAlignment : kHugePage;
    const int64_t bytes = ceil_div(needed, alignment) * alignment;
    memory_ = std::malloc(static_cast<size_t>(bytes + alignment));
    if (memory_ == nullptr) throw std::bad_alloc();
    data_ = reinterpret_cast<E*>((reinterpret_cast<uintptr_t>(memory_) / alignment + 1) * alignment);
#ifdef __linux__
    if (alignment == kHugePage) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // optional: it may fail
#endif
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator E*() const { return data_; }
  E* get() const { return data_; }

 private:
  void* memory_;
  E* data_;
};

// kLevel 2 prefetches into the L2 cache, which keeps more reads in flight than L1. kLevel 0 bypasses it, for memory
// that is read once and should not evict the rows of `value`. This function and its callers are always inlined: GCC
// considers a function that only prefetches to have no effect, and drops the call.
template <int kLevel, bool kForWriting = false>
MSDA_INLINE void prefetch(const void* address, int64_t bytes) {
  const char* lines = static_cast<const char*>(address);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(lines + i, kForWriting, kLevel);
}

}  // namespace
}  // namespace msda::MSDA_ISA
