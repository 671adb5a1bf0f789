// Tiles: the samples of a few queries, planned for the CPU kernels.
#pragma once

#include "../ms_deform_attn.h"
#include "layout.h"
#include "memory.h"
#include "simd.h"

namespace msda::MSDA_ISA {
namespace {

constexpr int64_t kTileSamples = 64;

// The samples of some queries of one image and head on a range of levels. A is the accumulation type, C that of the
// coordinates.
template <class A, class C>
class Tile {
 public:
  // `for_gradients`: raw, weight, down, right and inside will be read, so all of them are filled.
  Tile(const Problem& p, const Layout& layout, int64_t level_begin, int64_t level_end, bool for_gradients)
      : samples(p.first_sample(level_end) - p.first_sample(level_begin)), capacity(max_of(1, kTileSamples / samples)),
        size(ceil_div(capacity * samples, kLanes<A>) * kLanes<A>), corner(4 * size), row(4 * size), weight(size),
        down(size), right(size), box_unit(size), inside(size), width(size), height(size), raw(2 * size),
        origin(p.reference_size * size), p_(p), packed_(layout.packed), for_gradients_(for_gradients),
        level_begin_(level_begin), level_end_(level_end), first_(p.first_sample(level_begin)), start_(size),
        pitch_(size), logits_(capacity * p.samples() + kLanes<A>) {
    for (int64_t s = 0, l = level_begin, in_query = 0; s < size; ++s, ++in_query) {
      if (in_query == samples) in_query = 0, l = level_begin;
      while (first_ + in_query == p.first_sample(l + 1)) ++l;
      const Level& level = layout.levels[l];
      box_unit[s] = A(0.5) / static_cast<A>(p.points_on(l));
      height[s] = level.height;
      width[s] = level.width;
      start_[s] = level.origin;
      pitch_[s] = level.pitch;
    }
    // The last samples may be padding.
    std::memset(raw, 0, sizeof(A) * 2 * size);
    std::memset(weight, 0, sizeof(A) * size);
    std::memset(origin, 0, sizeof(A) * p.reference_size * size);
    std::memset(logits_, 0, sizeof(A) * (capacity * p.samples() + kLanes<A>));
  }

  void plan(int64_t image, int64_t head, int64_t query, int64_t count) {
    switch (p_.reference_size) {
      case 0: return plan<0>(image, head, query, count);
      case 2: return plan<2>(image, head, query, count);
      case 4: return plan<4>(image, head, query, count);
    }
  }

  const int64_t samples, capacity, size;  // per query; queries; in all, rounded up to whole vectors
  Buffer<A> corner;                       // [size][4]: weights of the corners, times the attention weight
  // Rows of the corners. Packed, [size][2]: the upper left and the lower left one, each followed by the right one. In
  // place, [size][4], with -1 for a missing corner.
  Buffer<int32_t> row;
  Buffer<A> weight, down, right;
  Buffer<A> box_unit;  // of an offset, in sizes of the box: half the box divided by the number of points
  Buffer<int32_t> inside, width, height;
  Buffer<A> raw;     // [size][2]: the given coordinates
  Buffer<A> origin;  // [reference_size][size]: reference point or box of each sample

 private:
  template <int kReference>
  void plan(int64_t image, int64_t head, int64_t query, int64_t count) {
    const int64_t all = p_.samples(), unit = (image * p_.queries + query) * p_.heads + head, step = p_.heads * all;
    const C* coordinates = static_cast<const C*>(p_.coordinates) + 2 * (unit * all + first_);
    const C* weights = static_cast<const C*>(p_.weights) + unit * all;
    // In the next tile; hardware prefetchers miss this stride.
    for (int64_t i = count; i < 2 * count; ++i) {
      prefetch<0>(coordinates + 2 * i * step, 2 * samples * sizeof(C));
      prefetch<0>(weights + i * step + first_, samples * sizeof(C));
    }
    if constexpr (kReference != 0) {
      for (int64_t i = 0; i < count; ++i) widen(weights + i * step, logits_ + i * all, all);
      softmax(count);
      origins<kReference>(image * p_.queries + query, count);
    }
    // Whole vectors of a query's samples are read where they are.
    if constexpr (std::is_same_v<A, C>) {
      if (!for_gradients_ && samples % kLanes<A> == 0) {
        for (int64_t i = 0; i < count; ++i) {
          const A* source = kReference == 0 ? weights + i * step + first_ : weight + i * samples;
          neighbors<kReference>(coordinates + 2 * i * step, source, i * samples, samples);
        }
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      widen(coordinates + 2 * i * step, raw + 2 * i * samples, 2 * samples);
      if constexpr (kReference == 0) widen(weights + i * step + first_, weight + i * samples, samples);
    }
    neighbors<kReference>(raw, weight, 0, count * samples);
  }

  // `weight` from logits_, which holds all logits of `count` queries. The exponentials are computed for the whole tile
  // at once, since one query may have few.
  void softmax(int64_t count) {
    const int64_t all = p_.samples(), total = count * all;
    for (int64_t i = 0; i < count; ++i) {
      A* logits = logits_ + i * all;
      const A shift = largest<A>(logits, all);
      for (int64_t s = 0; s < all; ++s) logits[s] -= shift;
    }
    for (int64_t s = 0; s < total; s += kLanes<A>) store<A>(logits_ + s, exp_of_nonpositive(load(logits_ + s)));
    for (int64_t i = 0; i < count; ++i) {
      const A *powers = logits_ + i * all, scale = A(1) / sum<A>(powers, all);
      for (int64_t s = 0; s < samples; ++s) weight[i * samples + s] = powers[first_ + s] * scale;
    }
  }

  template <int kReference>
  void origins(int64_t row, int64_t count) {
    for (int64_t i = 0, s = 0; i < count; ++i) {
      for (int64_t l = level_begin_; l < level_end_; ++l) {
        const int64_t points = p_.points_on(l);
        for (int64_t f = 0; f < kReference; ++f) {
          A reference;
          const int64_t index = ((row + i) * p_.levels + l) * kReference + f;
          if (p_.wide_reference)
            reference = static_cast<const A*>(p_.reference_points)[index];
          else
            widen(static_cast<const C*>(p_.reference_points) + index, &reference, 1);
          A* target = origin + f * size + s;
          if (points == 4) {  // a constant, for the compiler
            for (int k = 0; k < 4; ++k) target[k] = reference;
          } else {
            for (int64_t k = 0; k < points; ++k) target[k] = reference;
          }
        }
        s += points;
      }
    }
  }

  // The position along one axis, in pixels.
  template <int kReference>
  Vector<A> position(int axis, int64_t s, Vector<A> coordinate, Vector<A> extent) const {
    if constexpr (kReference == 0) {
      return pixel_of_location(coordinate, extent);
    } else {
      const Vector<A> center = load(origin + axis * size + s);
      if constexpr (kReference == 2) return pixel_of_point(center, coordinate, extent);
      return pixel_of_box(center, load(origin + (2 + axis) * size + s), coordinate, load(box_unit + s), extent);
    }
  }

  // Rows and weights of the corners of samples [first, first + count), whose coordinates and attention weights are
  // given.
  template <int kReference>
  void neighbors(const A* coordinates, const A* weights, int64_t first, int64_t count) {
    using I = Integers<A>;
    for (int64_t i = 0, s = first; i < count; i += kLanes<A>, s += kLanes<A>) {
      const I h = load_integers<A>(height + s), w = load_integers<A>(width + s);
      const I start = load_integers<A>(start_ + s), pitch = load_integers<A>(pitch_ + s);
      Vector<A> xy[2];
      load_interleaved(coordinates + 2 * i, xy);
      auto cell = locate(position<kReference>(0, s, xy[0], convert<Vector<A>>(w)),
                         position<kReference>(1, s, xy[1], convert<Vector<A>>(h)), h, w);
      // Excluded samples weigh 0, because an infinite weight times 0 would be NaN.
      const Vector<A> attention = cell.row >= -1 ? load(weights + i) : Vector<A>{};
      if (for_gradients_) {
        store<A>(down + s, cell.down);
        store<A>(right + s, cell.right);
        store_integers<A>(inside + s, cell.row >= -1);
      }
      Vector<A> corners[4];
      for (int k = 0; k < 4; ++k) corners[k] = corner_weight(cell.down, cell.right, k) * attention;
      store_interleaved<A>(corner + 4 * s, corners);
      if (packed_) {
        cell.row = cell.row < -1 ? I{} - 1 : cell.row;  // excluded samples lie in the border
        const I rows[2] = {corner_key(cell, 0, start, pitch), corner_key(cell, 2, start, pitch)};
        store_interleaved<A>(row + 2 * s, rows);
      } else {
        I rows[4];
        for (int k = 0; k < 4; ++k)
          rows[k] = corner_exists(cell, k, h, w) ? corner_key(cell, k, start, pitch) : I{} - 1;
        store_interleaved<A>(row + 4 * s, rows);
      }
    }
  }

  const Problem& p_;
  const bool packed_, for_gradients_;
  const int64_t level_begin_, level_end_;
  const int64_t first_;  // the query's sample at which the range of levels begins
  Buffer<int32_t> start_, pitch_;
  Buffer<A> logits_;
};

// The offset of the row of corner i of a sample: `rows` as in Tile, `stride` and `missing` in bytes as in Rows.
template <bool kPacked>
inline int64_t corner_offset(const int32_t* rows, int i, int64_t stride, int64_t missing) {
  if constexpr (kPacked) return rows[i / 2] * stride + (i % 2) * stride;
  return rows[i] < 0 ? missing : rows[i] * stride;
}
template <bool kPacked>
constexpr int kRowsPerSample = kPacked ? 2 : 4;

// Prefetches the corner rows of a tile that are read in place. They are scattered over memory that is often larger than
// the caches.
template <class T, class A, class C>
MSDA_INLINE void prefetch_rows(const Tile<A, C>& tile, int64_t count, const Rows<T>& rows, int64_t bytes) {
  for (int64_t i = 0; i < count * tile.samples * kRowsPerSample<false>; ++i)
    prefetch<2>(rows.base() + corner_offset<false>(tile.row + i, 0, rows.stride(), rows.missing()), bytes);
}

}  // namespace
}  // namespace msda::MSDA_ISA
