// The kernels, compiled once per instruction set (MSDA_ISA names it).
//
// Samples are handled in tiles: some queries of one image and head. A tile is planned first (addresses and weights of
// the four corners of every sample, in loops that vectorise over samples) and then gathered (vectors over channels).
// Where the rows of an image and head are visited often, they are packed into a scratch of the size of these rows: in
// `value` they lie heads * channels apart, and would share few sets of the caches. Packed levels have a border of zeros,
// so that the four corners of a sample always exist and are found from one address.
//
// Backward: coordinates and weights in one pass over tiles, like forward; the value in a second pass, in which a task
// owns the rows of its image, head and levels, and visits all queries in order. So nothing is atomic, and the sums do
// not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../ms_deform_attn.h"
#include "ms_deform_attn.h"
#include "simd.h"

namespace msda::MSDA_ISA {
namespace {

constexpr int64_t kTileSamples = 64;
constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = int64_t{1} << 21;
constexpr int64_t kStreamedBytes = int64_t{8} << 20;  // an output as large as this leaves the caches before it is read

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Uninitialized memory. A large one asks for huge pages: it is read at random, and takes few page faults.
template <class E>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const int64_t needed = max_of(count, 1) * static_cast<int64_t>(sizeof(E));
    const int64_t alignment = needed < kHugePage / 2 ? kAlignment : kHugePage;
    const int64_t bytes = ceil_div(needed, alignment) * alignment;
    data_ = static_cast<E*>(std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == kHugePage) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a wish: it may fail
#endif
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator E*() const { return data_; }
  E* get() const { return data_; }

 private:
  E* data_;
};

// kLevel: 2 into the second-level cache, which has more reads under way at a time than the first; 0 past it, for memory
// that is visited once and should not take the place of the rows of `value` there. Always inlined, like what calls it:
// GCC takes a function that only prefetches for one without effect, and drops the call.
template <int kLevel, bool kForWriting = false>
MSDA_INLINE void prefetch(const void* address, int64_t bytes) {
  const char* lines = static_cast<const char*>(address);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(lines + i, kForWriting, kLevel);
}

// Runs body(begin, end) over `count` tasks of some number of multiplications each; small work stays on one thread.
constexpr int64_t kWorkPerThread = int64_t{1} << 17;
template <class F>
void run(const cpu::Pool& pool, int64_t count, int64_t work, const F& body) {
  if (count == 0) return;
  const int64_t grain = max_of(1, kWorkPerThread / max_of(work, 1));
  pool.run(count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
           const_cast<F*>(&body));
}

template <class A>
int64_t padded_channels(const Problem& p) {
  return ceil_div(p.channels, kLanes<A>) * kLanes<A>;
}

// Where the pixels of the levels lie, counted in rows of channels: as in `value`, or packed. A packed level has a row of
// zeros above and below, and in each of its rows a zero in front of the first pixel, which also ends the row before. One
// more zero precedes the first level and one follows the last.
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

// What packed rows hold: bfloat16 is widened once, for it takes more work to widen at every visit than to read it.
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

// The rows of `value` of one image and head, where the gather reads them: packed, of type Packed<T>, or in place.
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

// The samples of some queries of one image and head, on a range of levels. A: accumulation, C: coordinate type.
template <class A, class C>
class Tile {
 public:
  Tile(const Problem& p, const Layout& layout, int64_t level_begin, int64_t level_end)
      : samples((level_end - level_begin) * p.points), capacity(max_of(1, kTileSamples / samples)),
        size(ceil_div(capacity * samples, kLanes<A>) * kLanes<A>), corner(4 * size), row(4 * size), weight(size),
        down(size), right(size), inside(size), width(size), height(size), raw(2 * size), origin(p.reference_size * size),
        p_(p), packed_(layout.packed), first_(level_begin * p.points), x_(size), y_(size), start_(size), pitch_(size),
        logits_(capacity * p.samples() + kLanes<A>) {
    for (int64_t s = 0; s < size; ++s) {
      const Level& level = layout.levels[level_begin + s % samples / p.points];
      height[s] = level.height;
      width[s] = level.width;
      start_[s] = level.origin;
      pitch_[s] = level.pitch;
      x_[s] = y_[s] = weight[s] = 0;  // the last ones may belong to no query
    }
    std::memset(logits_, 0, (capacity * p.samples() + kLanes<A>) * sizeof(A));
  }

  void plan(int64_t image, int64_t head, int64_t query, int64_t count) {
    const int64_t all = p_.samples(), total = count * samples;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t unit = (image * p_.queries + query + i) * p_.heads + head;
      widen(static_cast<const C*>(p_.coordinates) + 2 * (unit * all + first_), raw + 2 * i * samples, 2 * samples);
      const C* weights = static_cast<const C*>(p_.weights) + unit * all;
      const int64_t ahead = count * p_.heads * all;  // in the next tile: far enough apart that only we see the pattern
      prefetch<0>(static_cast<const C*>(p_.coordinates) + 2 * (unit * all + ahead + first_), 2 * samples * sizeof(C));
      prefetch<0>(weights + ahead + first_, samples * sizeof(C));
      if (p_.reference_size == 0)
        widen(weights + first_, weight + i * samples, samples);
      else
        widen(weights, logits_ + i * all, all);
    }
    if (p_.reference_size != 0) softmax(count);
    positions(image * p_.queries + query, count);
    neighbours(total);
  }

  const int64_t samples, capacity, size;  // per query; queries; in all, rounded up to whole vectors
  Buffer<A> corner;                       // [size][4]: weights of the corners, times the attention weight
  // Their rows. Packed, [size][2]: the upper and the lower left one, each followed by the right one. In place,
  // [size][4], and -1 where there is no corner.
  Buffer<int32_t> row;
  Buffer<A> weight, down, right;
  Buffer<int32_t> inside, width, height;
  Buffer<A> raw;     // [size][2]: coordinates as they came
  Buffer<A> origin;  // [reference_size][size]: reference point or box of each sample

 private:
  // `weight` from logits_, which holds all logits of `count` queries. Exponentials are taken of the whole tile, for a query
  // may have few.
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

  void positions(int64_t row, int64_t count) {
    const int64_t total = count * samples, features = p_.reference_size;
    const A* __restrict xy = raw;
    A *__restrict x = x_, *__restrict y = y_;
    const int32_t *w = width, *h = height;
    if (features == 0) {
      for (int64_t s = 0; s < total; ++s) {
        x[s] = pixel_of_location(xy[2 * s], static_cast<A>(w[s]));
        y[s] = pixel_of_location(xy[2 * s + 1], static_cast<A>(h[s]));
      }
      return;
    }
    const int64_t level_begin = first_ / p_.points, levels = samples / p_.points;
    for (int64_t i = 0, s = 0; i < count; ++i) {
      const C* references = static_cast<const C*>(p_.reference_points) + ((row + i) * p_.levels + level_begin) * features;
      for (int64_t l = 0; l < levels; ++l) {
        for (int64_t f = 0; f < features; ++f) {
          A reference;
          widen(references + l * features + f, &reference, 1);
          A* target = origin + f * size + s;
          if (p_.points == 4) {  // known to the compiler
            for (int k = 0; k < 4; ++k) target[k] = reference;
          } else {
            for (int64_t k = 0; k < p_.points; ++k) target[k] = reference;
          }
        }
        s += p_.points;
      }
    }
    const A *ox = origin, *oy = origin + size;
    if (features == 2) {
      for (int64_t s = 0; s < total; ++s) {
        x[s] = pixel_of_point(ox[s], xy[2 * s], static_cast<A>(w[s]));
        y[s] = pixel_of_point(oy[s], xy[2 * s + 1], static_cast<A>(h[s]));
      }
    } else {
      const A *ow = origin + 2 * size, *oh = origin + 3 * size;
      const A unit = A(0.5) / static_cast<A>(p_.points);
      for (int64_t s = 0; s < total; ++s) {
        x[s] = pixel_of_box(ox[s], ow[s], xy[2 * s], unit, static_cast<A>(w[s]));
        y[s] = pixel_of_box(oy[s], oh[s], xy[2 * s + 1], unit, static_cast<A>(h[s]));
      }
    }
  }

  void neighbours(int64_t total) {
    using I = Integers<A>;
    for (int64_t s = 0; s < total; s += kLanes<A>) {
      const I h = load_integers<A>(height + s), w = load_integers<A>(width + s);
      const I start = load_integers<A>(start_ + s), pitch = load_integers<A>(pitch_ + s);
      const Vector<A> attention = load(weight + s);
      auto cell = locate(load(x_ + s), load(y_ + s), h, w);
      store<A>(down + s, cell.down);
      store<A>(right + s, cell.right);
      store_integers<A>(inside + s, cell.row >= -1);
      Vector<A> weights[4];
      for (int i = 0; i < 4; ++i) weights[i] = corner_weight(cell.down, cell.right, i) * attention;
      store_interleaved<A>(corner + 4 * s, weights);
      if (packed_) {
        cell.row = cell.row < -1 ? I{} - 1 : cell.row;  // an excluded sample lies in the border
        const I rows[2] = {corner_key(cell, 0, start, pitch), corner_key(cell, 2, start, pitch)};
        store_interleaved<A>(row + 2 * s, rows);
      } else {
        I rows[4];
        for (int i = 0; i < 4; ++i)
          rows[i] = corner_exists(cell, i, h, w) ? corner_key(cell, i, start, pitch) : I{} - 1;
        store_interleaved<A>(row + 4 * s, rows);
      }
    }
  }

  const Problem& p_;
  const bool packed_;
  const int64_t first_;  // sample of the query at which the range of levels begins
  Buffer<A> x_, y_;
  Buffer<int32_t> start_, pitch_;
  Buffer<A> logits_;
};

// Where the rows of a sample's corners begin: `rows` as in Tile, `stride` and `missing` in bytes as in Rows.
template <bool kPacked>
inline int64_t corner_offset(const int32_t* rows, int i, int64_t stride, int64_t missing) {
  if constexpr (kPacked) return rows[i / 2] * stride + (i % 2) * stride;
  return rows[i] < 0 ? missing : rows[i] * stride;
}
template <bool kPacked>
constexpr int kRowsPerSample = kPacked ? 2 : 4;

// Calls f with the number of vectors at a time that suits: f(Count<V>, first channel), V from 1 to 4.
template <int V>
struct Count {
  static constexpr int value = V;
};
template <class A, class F>
inline void for_channels(int64_t padded, const F& f) {
  int64_t c = 0;
  for (; padded - c >= 4 * kLanes<A>; c += 4 * kLanes<A>) f(Count<4>(), c);
  switch ((padded - c) / kLanes<A>) {
    case 1: f(Count<1>(), c); break;
    case 2: f(Count<2>(), c); break;
    case 3: f(Count<3>(), c); break;
  }
}

// Asks for the corner rows of a tile in place, which lie apart in a memory that is often larger than the caches.
template <class T, class A, class C>
MSDA_INLINE void prefetch_rows(const Tile<A, C>& tile, int64_t count, const Rows<T>& rows, int64_t bytes) {
  for (int64_t i = 0; i < count * tile.samples * kRowsPerSample<false>; ++i)
    prefetch<2>(rows.base() + corner_offset<false>(tile.row + i, 0, rows.stride(), rows.missing()), bytes);
}

// output[c] = sum over samples and corners of corner weight * row[c].
template <class T, bool kPacked, class A, class C>
inline void gather(const Tile<A, C>& tile, int64_t first, const Rows<T>& rows, int64_t padded, A* output) {
  using Element = std::conditional_t<kPacked, Packed<T>, T>;
  const char* base = rows.base();
  const int64_t stride = rows.stride(), missing = rows.missing();
  for_channels<A>(padded, [&](auto vectors, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    constexpr int kChains = V <= 2 ? 4 : 2;  // independent sums, to hide the latency of the additions
    Vector<A> sum[kChains][V] = {};
    const A* weight = tile.corner + 4 * first;
    const int32_t* row = tile.row + kRowsPerSample<kPacked> * first;
    const char* channel = base + c * sizeof(Element);
    for (int64_t s = 0; s < tile.samples; ++s, weight += 4, row += kRowsPerSample<kPacked>)
      for (int i = 0; i < 4; ++i) {
        const auto* source =
            reinterpret_cast<const Element*>(channel + corner_offset<kPacked>(row, i, stride, missing));
        for (int v = 0; v < V; ++v) sum[i % kChains][v] += weight[i] * load(source + v * kLanes<A>);
      }
    for (int v = 0; v < V; ++v) {
      Vector<A> total = sum[0][v] + sum[1][v];
      if constexpr (kChains == 4) total += sum[2][v] + sum[3][v];
      store<A>(output + c + v * kLanes<A>, total);
    }
  });
}

// dots[s][i] = grad . row of corner i of sample first + s.
template <class T, bool kPacked, class A, class C>
inline void dot(const Tile<A, C>& tile, int64_t first, const Rows<T>& rows, int64_t padded, const A* grad, A* dots) {
  using Element = std::conditional_t<kPacked, Packed<T>, T>;
  const char* base = rows.base();
  const int64_t stride = rows.stride(), missing = rows.missing();
  for_channels<A>(padded, [&](auto vectors, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    Vector<A> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(grad + c + v * kLanes<A>);
    const int32_t* row = tile.row + kRowsPerSample<kPacked> * first;
    const char* channel = base + c * sizeof(Element);
    for (int64_t s = 0; s < tile.samples; ++s, row += kRowsPerSample<kPacked>) {
      Vector<A> product[4];
      for (int i = 0; i < 4; ++i) {
        const auto* source =
            reinterpret_cast<const Element*>(channel + corner_offset<kPacked>(row, i, stride, missing));
        product[i] = g[0] * load(source);
        for (int v = 1; v < V; ++v) product[i] += g[v] * load(source + v * kLanes<A>);
      }
      A part[4];
      reduce4<A>(product, part);
      for (int i = 0; i < 4; ++i) dots[4 * s + i] = c == 0 ? part[i] : dots[4 * s + i] + part[i];
    }
  });
}

// row of corner i of sample s += corner weight * grad, in the order of the samples. The rows are packed.
template <class A, class C>
inline void scatter(const Tile<A, C>& tile, int64_t first, char* base, int64_t stride, int64_t padded, const A* grad) {
  for_channels<A>(padded, [&](auto vectors, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    Vector<A> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(grad + c + v * kLanes<A>);
    const A* weight = tile.corner + 4 * first;
    const int32_t* row = tile.row + kRowsPerSample<true> * first;
    char* channel = base + c * sizeof(A);
    for (int64_t s = 0; s < tile.samples; ++s, weight += 4, row += kRowsPerSample<true>)
      for (int i = 0; i < 4; ++i) {
        A* target = reinterpret_cast<A*>(channel + corner_offset<true>(row, i, stride, 0));
        for (int v = 0; v < V; ++v)
          store<A>(target + v * kLanes<A>, load(target + v * kLanes<A>) + weight[i] * g[v]);
      }
  });
}

// Calls f(image, head, query, count) for the tiles of [begin, end). With `by_head` all tiles of an image and head come
// one after another; else all heads of a few queries.
template <class F>
inline void for_tiles(const Problem& p, int64_t capacity, bool by_head, int64_t query_begin, int64_t query_end,
                      int64_t begin, int64_t end, const F& f) {
  const int64_t tiles = ceil_div(query_end - query_begin, capacity);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t image = i / (tiles * p.heads), rest = i % (tiles * p.heads);
    const int64_t head = by_head ? rest / tiles : rest % p.heads, tile = by_head ? rest % tiles : rest / p.heads;
    const int64_t query = query_begin + tile * capacity;
    f(image, head, query, min_of(capacity, query_end - query));
  }
}

template <class T, class C>
struct Kernels {
  using A = Accumulator<T>;

  // Packing pays when the corners to visit outnumber the rows; the gather also needs whole vectors.
  static bool packs(const Problem& p) {
    return padded_channels<A>(p) != p.channels || p.queries * p.samples() * 4 > 2 * p.keys;
  }

  static int64_t tile_capacity(const Problem& p) { return max_of(1, kTileSamples / p.samples()); }

  static int64_t tiles(const Problem& p, int64_t queries) {
    return p.batch * p.heads * ceil_div(queries, tile_capacity(p));
  }

  static int64_t work(const Problem& p, int64_t queries) { return queries * p.samples() * 4 * p.channels; }

  static void forward(const Problem& p, void* output, const cpu::Pool& pool) {
    const Layout layout(p, packs(p));
    run(pool, tiles(p, p.queries), work(p, tile_capacity(p)), [&](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels<A>(p);
      Rows<T> rows(p, layout);
      Tile<A, C> tile(p, layout, 0, p.levels);
      Buffer<A> sum(padded);
      Buffer<T> narrowed(p.channels);
      const int64_t bytes = p.channels * sizeof(T);
      const bool streams = kStreams && p.batch * p.queries * p.heads * bytes >= kStreamedBytes &&
                           bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(output) % kVectorBytes == 0;
      for_tiles(p, tile.capacity, layout.packed, 0, p.queries, begin, end,
                [&](int64_t image, int64_t head, int64_t query, int64_t count) {
        const int64_t step = p.heads * p.channels;
        T* target = static_cast<T*>(output) + (image * p.queries + query) * step + head * p.channels;
        if (!streams)
          for (int64_t i = 0; i < count; ++i) prefetch<0, true>(target + i * step, bytes);
        rows.select(image, head);
        tile.plan(image, head, query, count);
        if (!layout.packed) prefetch_rows(tile, count, rows, bytes);
        for (int64_t i = 0; i < count; ++i, target += step) {
          if (layout.packed)
            gather<T, true>(tile, i * tile.samples, rows, padded, sum.get());
          else
            gather<T, false>(tile, i * tile.samples, rows, padded, sum.get());
          if (!streams) {
            narrow(sum, target, p.channels);
          } else if constexpr (std::is_same_v<T, A>) {
            stream(sum.get(), target, bytes);
          } else {
            narrow(sum, narrowed, p.channels);
            stream(narrowed.get(), target, bytes);
          }
        }
      });
      if (streams) end_of_stream();
    });
  }

  static void backward(const Problem& p, const Gradients& g, const cpu::Pool& pool) {
    value_gradient(p, g, pool);
    if (p.reference_size == 0) {
      coordinate_gradients(p, g, 0, p.queries, nullptr, pool);
      return;
    }
    // The gradient of a reference point sums over heads, and heads run in parallel: each writes its own part, for as many
    // queries at a time as keeps the parts small.
    const int64_t step = max_of(64, (int64_t{1} << 18) / max_of(1, p.batch * p.heads));
    const int64_t features = p.levels * p.reference_size;
    Buffer<A> parts(p.batch * p.heads * min_of(step, p.queries) * features);
    for (int64_t query = 0; query < p.queries; query += step) {
      const int64_t end = min_of(query + step, p.queries);
      coordinate_gradients(p, g, query, end, parts, pool);
      sum_over_heads(p, g, query, end, parts, pool);
    }
  }

  static void load_grad(const Problem& p, const Gradients& g, int64_t image, int64_t head, int64_t query, A* target) {
    const int64_t unit = (image * p.queries + query) * p.heads + head;
    widen(static_cast<const T*>(g.output) + unit * p.channels, target, p.channels);
  }

  static void coordinate_gradients(const Problem& p, const Gradients& g, int64_t query_begin, int64_t query_end, A* parts,
                                   const cpu::Pool& pool) {
    const Layout layout(p, packs(p));
    run(pool, tiles(p, query_end - query_begin), work(p, tile_capacity(p)), [&](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels<A>(p), samples = p.samples();
      Rows<T> rows(p, layout);
      Tile<A, C> tile(p, layout, 0, p.levels);
      Buffer<A> grad(padded), dots(4 * samples), grad_weight(samples), grad_xy(2 * samples), grad_pixel(2 * samples);
      std::memset(grad, 0, padded * sizeof(A));
      for_tiles(p, tile.capacity, layout.packed, query_begin, query_end, begin, end,
                [&](int64_t image, int64_t head, int64_t query, int64_t count) {
        rows.select(image, head);
        tile.plan(image, head, query, count);
        if (!layout.packed) prefetch_rows(tile, count, rows, p.channels * sizeof(T));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t first = i * samples;
          load_grad(p, g, image, head, query + i, grad);
          if (layout.packed)
            dot<T, true>(tile, first, rows, padded, grad.get(), dots.get());
          else
            dot<T, false>(tile, first, rows, padded, grad.get(), dots.get());
          sample_gradients(tile, first, dots, grad_weight, grad_pixel);
          chain(p, tile, first, grad_weight, grad_pixel, grad_xy);
          const int64_t unit = (image * p.queries + query + i) * p.heads + head;
          narrow(grad_weight, static_cast<C*>(g.weights) + unit * samples, samples);
          narrow(grad_xy, static_cast<C*>(g.coordinates) + unit * samples * 2, 2 * samples);
          if (parts != nullptr) {
            const int64_t part = (image * p.heads + head) * (query_end - query_begin) + query + i - query_begin;
            reference_part(p, tile, first, grad_pixel, parts + part * p.levels * p.reference_size);
          }
        }
      });
    });
  }

  // With respect to the attention weights, and to the positions in pixels.
  static void sample_gradients(const Tile<A, C>& tile, int64_t first, const A* __restrict dots, A* __restrict grad_weight,
                               A* __restrict grad_pixel) {
    const A *down = tile.down + first, *right = tile.right + first, *weight = tile.weight + first;
    const int32_t* inside = tile.inside + first;
    for (int64_t s = 0; s < tile.samples; ++s) {
      const SampleGradient<A> grad =
          sample_gradient(down[s], right[s], dots[4 * s], dots[4 * s + 1], dots[4 * s + 2], dots[4 * s + 3]);
      grad_weight[s] = grad.weight;
      grad_pixel[2 * s] = inside[s] ? grad.x * weight[s] : A(0);
      grad_pixel[2 * s + 1] = inside[s] ? grad.y * weight[s] : A(0);
    }
  }

  // On to the operator's own arguments: locations or offsets, and logits.
  static void chain(const Problem& p, const Tile<A, C>& tile, int64_t first, A* __restrict grad_weight,
                    const A* __restrict grad_pixel, A* __restrict grad_xy) {
    const int32_t *width = tile.width + first, *height = tile.height + first, *inside = tile.inside + first;
    const int64_t samples = tile.samples;
    if (p.reference_size != 2) {
      for (int64_t s = 0; s < samples; ++s) {
        grad_xy[2 * s] = grad_pixel[2 * s] * static_cast<A>(width[s]);
        grad_xy[2 * s + 1] = grad_pixel[2 * s + 1] * static_cast<A>(height[s]);
      }
    } else {
      for (int64_t s = 0; s < 2 * samples; ++s) grad_xy[s] = grad_pixel[s];
    }
    if (p.reference_size == 0) return;
    if (p.reference_size == 4) {
      const A *box_width = tile.origin + 2 * tile.size + first, *box_height = tile.origin + 3 * tile.size + first;
      const A unit = A(0.5) / static_cast<A>(p.points);
      for (int64_t s = 0; s < samples; ++s) {
        grad_xy[2 * s] = inside[s] ? grad_xy[2 * s] * box_width[s] * unit : A(0);
        grad_xy[2 * s + 1] = inside[s] ? grad_xy[2 * s + 1] * box_height[s] * unit : A(0);
      }
    }
    const A* weight = tile.weight + first;
    const A mean = dot_product<A>(grad_weight, weight, samples);
    for (int64_t s = 0; s < samples; ++s) grad_weight[s] = weight[s] * (grad_weight[s] - mean);
  }

  // One head's part of the gradient of the reference points of one query: [levels][reference_size].
  static void reference_part(const Problem& p, const Tile<A, C>& tile, int64_t first, const A* grad_pixel, A* part) {
    const A unit = A(0.5) / static_cast<A>(p.points);
    for (int64_t level = 0; level < p.levels; ++level, part += p.reference_size) {
      A sum[4] = {};
      for (int64_t s = level * p.points; s < (level + 1) * p.points; ++s) {
        const A grad_x = grad_pixel[2 * s] * static_cast<A>(tile.width[s]);
        const A grad_y = grad_pixel[2 * s + 1] * static_cast<A>(tile.height[s]);
        sum[0] += grad_x;
        sum[1] += grad_y;
        if (p.reference_size == 4 && tile.inside[first + s]) {
          sum[2] += grad_x * tile.raw[2 * (first + s)] * unit;
          sum[3] += grad_y * tile.raw[2 * (first + s) + 1] * unit;
        }
      }
      for (int64_t f = 0; f < p.reference_size; ++f) part[f] = sum[f];
    }
  }

  static void sum_over_heads(const Problem& p, const Gradients& g, int64_t query_begin, int64_t query_end, const A* parts,
                             const cpu::Pool& pool) {
    const int64_t queries = query_end - query_begin, features = p.levels * p.reference_size;
    run(pool, p.batch * queries, p.heads * features, [&](int64_t begin, int64_t end) {
      Buffer<A> sum(features);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / queries, query = i % queries;
        std::memset(sum, 0, features * sizeof(A));
        for (int64_t head = 0; head < p.heads; ++head) {
          const A* part = parts + ((image * p.heads + head) * queries + query) * features;
          for (int64_t f = 0; f < features; ++f) sum[f] += part[f];
        }
        narrow(sum, static_cast<C*>(g.reference_points) + (image * p.queries + query_begin + query) * features, features);
      }
    });
  }

  static void value_gradient(const Problem& p, const Gradients& g, const cpu::Pool& pool) {
    // One level per task where whole heads would leave threads idle.
    const bool by_level = p.batch * p.heads < pool.threads;
    const int64_t ranges = by_level ? p.levels : 1;
    const Layout layout(p, true);
    const int64_t cost = (work(p, p.queries) + p.keys * p.channels) / ranges;
    run(pool, p.batch * p.heads * ranges, cost, [&](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels<A>(p), stride = padded * sizeof(A);
      Buffer<A> rows(layout.rows * padded);
      Buffer<A> grad(padded);
      std::memset(grad, 0, padded * sizeof(A));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / (p.heads * ranges), head = i / ranges % p.heads;
        const int64_t level_begin = by_level ? i % ranges : 0, level_end = by_level ? level_begin + 1 : p.levels;
        std::memset(rows, 0, layout.rows * stride);
        Tile<A, C> tile(p, layout, level_begin, level_end);
        for (int64_t query = 0; query < p.queries; query += tile.capacity) {
          const int64_t count = min_of(tile.capacity, p.queries - query);
          tile.plan(image, head, query, count);
          for (int64_t j = 0; j < count; ++j) {
            load_grad(p, g, image, head, query + j, grad);
            scatter(tile, j * tile.samples, reinterpret_cast<char*>(rows.get()), stride, padded, grad.get());
          }
        }
        for (int64_t level = level_begin; level < level_end; ++level)
          layout.for_lines(level, [&](int64_t key, int64_t row) {
            const A* source = rows + row * padded;
            T* target = static_cast<T*>(g.value) + ((image * p.keys + key) * p.heads + head) * p.channels;
            for (int64_t x = 0; x < layout.levels[level].width; ++x, source += padded, target += p.heads * p.channels)
              narrow(source, target, p.channels);
          });
      }
    });
  }
};

// Calls f(T, C) with the storage types of the problem. The coordinates have the value's type or the accumulation type.
template <class F>
inline void dispatch(const Problem& p, const F& f) {
  const bool same = p.coordinate_dtype == p.dtype;
  switch (p.dtype) {
    case DType::float64: f(double(), double()); break;
    case DType::float32: f(float(), float()); break;
    case DType::float16: same ? f(Half(), Half()) : f(Half(), float()); break;
    case DType::bfloat16: same ? f(BFloat16(), BFloat16()) : f(BFloat16(), float()); break;
  }
}

}  // namespace

void forward(const Problem& problem, void* output, const cpu::Pool& pool) {
  dispatch(problem, [&](auto t, auto c) { Kernels<decltype(t), decltype(c)>::forward(problem, output, pool); });
}

void backward(const Problem& problem, const Gradients& gradients, const cpu::Pool& pool) {
  dispatch(problem, [&](auto t, auto c) { Kernels<decltype(t), decltype(c)>::backward(problem, gradients, pool); });
}

}  // namespace msda::MSDA_ISA
