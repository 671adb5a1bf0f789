// The rows of `value` as the CPU kernels read them: in place, or packed.
#pragma once

#include "../ms_deform_attn.h"
#include "memory.h"
#include "simd.h"

namespace msda::MSDA_ISA {
namespace {

template <class A>
int64_t padded_channels(const Problem& p) {
  return ceil_div(p.channels, kLanes<A>) * kLanes<A>;
}

// The positions of the levels' pixels, counted in rows of channels: as in `value`, or packed. A packed level has a row
// of zeros above and below. Each of its rows starts with a zero, which also ends the row before. One more zero precedes
// the first level, and one follows the last.
struct Level {
  int64_t key;                           // of the first pixel, in `value`
  int32_t height, width, origin, pitch;  // origin: of the first pixel; pitch: from a pixel to the one below
};

class Layout {
 public:
  Layout(const Problem& p, bool packed) : packed(packed), levels(p.levels) {
    int64_t rows = 1;
    for (int64_t i = 0; i < p.levels; ++i) {
      const int64_t height = p.spatial_shapes[2 * i], width = p.spatial_shapes[2 * i + 1], key = p.level_start_index[i];
      const int64_t pitch = packed ? width + 1 : width, origin = packed ? rows + pitch + 1 : key;
      levels[i] = {key, static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(origin),
                   static_cast<int32_t>(pitch)};
      rows += (height + 2) * pitch;
    }
    this->rows = rows + 1;
  }

  // Calls f(key, row) for the first pixel of each line of pixels of the level.
  template <class F>
  void for_lines(int64_t level, const F& f) const {
    const Level& l = levels[level];
    for (int64_t y = 0; y < l.height; ++y) f(l.key + y * l.width, l.origin + y * l.pitch);
  }

  const bool packed;
  int64_t rows;  // when packed
  Buffer<Level> levels;
};

// The type of packed rows. bfloat16 is widened once while packing, since widening at every visit would cost more than
// reading twice the bytes.
template <class T>
struct PackedOf {
  using type = T;
};
template <>
struct PackedOf<BFloat16> {
  using type = float;
};
template <class T>
using Packed = typename PackedOf<T>::type;

// The rows of `value` of one image and head, as the gather reads them: packed with type Packed<T>, or in place.
template <class T>
class Rows {
 public:
  Rows(const Problem& p, const Layout& layout)
      : p_(p), layout_(layout), padded_(padded_channels<Accumulator<T>>(p)),
        size_((layout.packed ? layout.rows : 1) * padded_), scratch_(size_),
        stride_(layout.packed ? padded_ * sizeof(Packed<T>) : p.heads * p.channels * sizeof(T)) {
    std::memset(scratch_, 0, size_ * sizeof(Packed<T>));
  }

  void select(int64_t image, int64_t head) {
    if (image == image_ && head == head_) return;
    image_ = image;
    head_ = head;
    const T* rows = static_cast<const T*>(p_.value) + (image * p_.keys * p_.heads + head) * p_.channels;
    const char* scratch = reinterpret_cast<const char*>(static_cast<Packed<T>*>(scratch_));
    if (layout_.packed) {
      for (int64_t level = 0; level < p_.levels; ++level) pack(rows, level);
      base_ = scratch;
    } else {
      base_ = reinterpret_cast<const char*>(rows);
      missing_ = static_cast<int64_t>(reinterpret_cast<uintptr_t>(scratch) - reinterpret_cast<uintptr_t>(rows));
    }
  }

  const char* base() const { return base_; }
  int64_t stride() const { return stride_; }    // bytes from one row to the next
  int64_t missing() const { return missing_; }  // in place: bytes from base to a row of zeros

 private:
  void pack(const T* rows, int64_t level) {
    constexpr int kStep = kLanes<Accumulator<T>>, kPixelsAhead = 24;
    const int64_t step = p_.heads * p_.channels, whole = p_.channels / kStep * kStep;
    layout_.for_lines(level, [&](int64_t key, int64_t row) {
      const T* source = rows + key * step;
      Packed<T>* target = scratch_ + row * padded_;
      for (int64_t x = 0; x < layout_.levels[level].width; ++x, source += step, target += padded_) {
        prefetch<0>(source + kPixelsAhead * step, p_.channels * sizeof(T));
        for (int64_t c = 0; c < whole; c += kStep) pack_some(source + c, target + c, kStep);
        if (whole < p_.channels) pack_some(source + whole, target + whole, p_.channels - whole);
      }
    });
  }

  static void pack_some(const T* source, Packed<T>* target, int64_t count) {
    if constexpr (std::is_same_v<T, Packed<T>>)
      std::memcpy(target, source, count * sizeof(T));
    else
      widen(source, target, count);
  }

  const Problem& p_;
  const Layout& layout_;
  const int64_t padded_, size_;
  Buffer<Packed<T>> scratch_;
  const int64_t stride_;
  int64_t image_ = -1, head_ = -1, missing_ = 0;
  const char* base_ = nullptr;
};

}  // namespace
}  // namespace msda::MSDA_ISA
