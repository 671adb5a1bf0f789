// The CPU kernels, compiled once per instruction set (MSDA_ISA is its name).
//
// Samples are processed in tiles: the samples of a few queries of one image and head. A tile is planned first (rows and
// weights of the four corners of every sample, in loops that vectorize over samples) and then gathered (in vectors of
// channels). If the rows of an image and head are visited often, they are packed into scratch memory first: in `value`
// they are heads * channels apart and would share few cache sets. Packed levels have a border of zeros, so the four
// corners of a sample always exist and are found from one address.
//
// Backward: one pass over tiles computes the gradients of coordinates and weights, like forward. A second pass computes
// the gradient of the value: each task owns the rows of its image, head and levels, and visits all queries in order. So
// there are no atomics, and the sums do not depend on the number of threads.
#pragma once

#include "../ms_deform_attn.h"
#include "layout.h"
#include "memory.h"
#include "ms_deform_attn.h"
#include "simd.h"
#include "tile.h"

namespace msda::MSDA_ISA {
namespace {

constexpr int64_t kStreamedBytes = int64_t{8} << 20;  // larger outputs leave the caches before they are read

// Runs body(begin, end) over `count` tasks of `work` multiplications each. Small work stays on one thread.
constexpr int64_t kWorkPerThread = int64_t{1} << 17;
template <class F>
void run(const cpu::Pool& pool, int64_t count, int64_t work, const F& body) {
  if (count == 0) return;
  const int64_t grain = max_of(1, kWorkPerThread / max_of(work, 1));
  pool.run(
      count, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<F*>(&body));
}

// Calls f(Count<V>, first channel) for all channels, V = 1 to 4 vectors at a time.
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

// row of corner i of sample s += corner weight * grad, in the order of the samples. The rows are packed: the four
// corners of a sample are different rows, so all are read before the first is written.
template <class A, class C>
inline void scatter(const Tile<A, C>& tile, int64_t first, char* base, int64_t stride, int64_t padded, const A* grad) {
  for_channels<A>(padded, [=, samples = tile.samples, weights = tile.corner + 4 * first,
                           rows = tile.row + kRowsPerSample<true> * first](auto vectors, int64_t c) {
    constexpr int V = decltype(vectors)::value;
    const int64_t bytes = stride, count = samples;  // in registers: the compiler assumes that a store may change them
    Vector<A> g[V];
    for (int v = 0; v < V; ++v) g[v] = load(grad + c + v * kLanes<A>);
    const A* weight = weights;
    const int32_t* row = rows;
    char* channel = base + c * sizeof(A);
    for (int64_t s = 0; s < count; ++s, weight += 4, row += kRowsPerSample<true>) {
      A* target[4];
      Vector<A> sum[4][V];
      for (int i = 0; i < 4; ++i) {
        target[i] = reinterpret_cast<A*>(channel + corner_offset<true>(row, i, bytes, 0));
        for (int v = 0; v < V; ++v) sum[i][v] = load(target[i] + v * kLanes<A>) + weight[i] * g[v];
      }
      for (int i = 0; i < 4; ++i)
        for (int v = 0; v < V; ++v) store<A>(target[i] + v * kLanes<A>, sum[i][v]);
    }
  });
}

// Calls f(image, head, query, count) for the tiles of [begin, end). With `by_head`, all tiles of an image and head are
// consecutive; otherwise, all heads of a few queries are.
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

  // Packing pays off if the corners to visit outnumber the rows. It is needed if the channels do not fill whole
  // vectors.
  static bool packs(const Problem& p) {
    return padded_channels<A>(p) != p.channels || p.queries * p.samples() * 4 > 2 * p.keys;
  }

  static int64_t tile_capacity(const Problem& p) { return max_of(1, kTileSamples / p.samples()); }

  static int64_t tiles(const Problem& p, int64_t queries) {
    return p.batch * p.heads * ceil_div(queries, tile_capacity(p));
  }

  static int64_t work(const Problem& p, int64_t queries) { return queries * p.samples() * 4 * p.channels; }

  // Writes rows of channels to a tensor (batch, rows, heads, channels) in a task. If the tensor is large, they bypass
  // the caches.
  class Writer {
   public:
    Writer(const Problem& p, int64_t rows, const void* tensor)
        : streams(kStreams && p.batch * rows * p.heads * p.channels * int64_t{sizeof(T)} >= kStreamedBytes &&
                  p.channels * sizeof(T) % kVectorBytes == 0 &&
                  reinterpret_cast<uintptr_t>(tensor) % kVectorBytes == 0),
          channels_(p.channels), narrowed_(p.channels) {}
    ~Writer() {
      if (streams) end_of_stream();
    }

    void write(const A* row, T* target) const {  // an aligned row
      if (!streams) {
        narrow(row, target, channels_);
      } else if constexpr (std::is_same_v<T, A>) {
        stream(row, target, channels_ * sizeof(T));
      } else {
        narrow(row, narrowed_, channels_);
        stream(narrowed_.get(), target, channels_ * sizeof(T));
      }
    }

    const bool streams;

   private:
    const int64_t channels_;
    Buffer<T> narrowed_;
  };

  static void forward(const Problem& p, void* output, const cpu::Pool& pool) {
    const Layout layout(p, packs(p));
    run(pool, tiles(p, p.queries), work(p, tile_capacity(p)), [&](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels<A>(p);
      Rows<T> rows(p, layout);
      Tile<A, C> tile(p, layout, 0, p.levels, false);
      Buffer<A> sum(padded);
      const int64_t bytes = p.channels * sizeof(T);
      const Writer writer(p, p.queries, output);
      const auto run_tile = [&](int64_t image, int64_t head, int64_t query, int64_t count) {
        const int64_t step = p.heads * p.channels;
        T* target = static_cast<T*>(output) + (image * p.queries + query) * step + head * p.channels;
        if (!writer.streams)
          for (int64_t i = 0; i < count; ++i) prefetch<0, true>(target + i * step, bytes);
        rows.select(image, head);
        tile.plan(image, head, query, count);
        if (!layout.packed) prefetch_rows(tile, count, rows, bytes);
        for (int64_t i = 0; i < count; ++i, target += step) {
          if (layout.packed)
            gather<T, true>(tile, i * tile.samples, rows, padded, sum.get());
          else
            gather<T, false>(tile, i * tile.samples, rows, padded, sum.get());
          writer.write(sum, target);
        }
      };
      for_tiles(p, tile.capacity, layout.packed, 0, p.queries, begin, end, run_tile);
    });
  }

  static void backward(const Problem& p, const Gradients& g, const cpu::Pool& pool) {
    value_gradient(p, g, pool);
    if (p.reference_size == 0) {
      coordinate_gradients(p, g, 0, p.queries, nullptr, pool);
      return;
    }
    // The gradient of a reference point is a sum over heads, which run in parallel: each head writes its own part. The
    // queries are processed in blocks that keep the parts small.
    const int64_t step = max_of(64, (int64_t{1} << 18) / max_of(1, p.batch * p.heads));
    const int64_t features = p.levels * p.reference_size;
    Buffer<A> parts(p.batch * p.heads * min_of(step, p.queries) * features);
    for (int64_t query = 0; query < p.queries; query += step) {
      const int64_t end = min_of(query + step, p.queries);
      coordinate_gradients(p, g, query, end, parts, pool);
      sum_over_heads(p, g, query, end, parts, pool);
    }
  }

  // Widens the gradient of the output of one query and head, and prefetches the one `ahead` queries later: hardware
  // prefetchers miss this stride.
  static void load_grad(const Problem& p, const Gradients& g, int64_t image, int64_t head, int64_t query, int64_t ahead,
                        A* target) {
    const int64_t unit = (image * p.queries + query) * p.heads + head;
    const T* source = static_cast<const T*>(g.output) + unit * p.channels;
    prefetch<0>(source + ahead * p.heads * p.channels, p.channels * sizeof(T));
    widen(source, target, p.channels);
  }

  static void coordinate_gradients(const Problem& p, const Gradients& g, int64_t query_begin, int64_t query_end,
                                   A* parts, const cpu::Pool& pool) {
    const Layout layout(p, packs(p));
    run(pool, tiles(p, query_end - query_begin), work(p, tile_capacity(p)), [&](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels<A>(p), samples = p.samples();
      Rows<T> rows(p, layout);
      Tile<A, C> tile(p, layout, 0, p.levels, true);
      Buffer<A> grad(padded), dots(4 * tile.size), grad_weight(tile.size), grad_xy(2 * tile.size);
      Buffer<A> grad_pixel(2 * tile.size);
      std::memset(grad, 0, padded * sizeof(A));
      const auto run_tile = [&](int64_t image, int64_t head, int64_t query, int64_t count) {
        const auto unit_of = [&](int64_t i) { return (image * p.queries + query + i) * p.heads + head; };
        for (int64_t i = 0; i < count; ++i) {
          prefetch<0, true>(static_cast<C*>(g.weights) + unit_of(i) * samples, samples * sizeof(C));
          prefetch<0, true>(static_cast<C*>(g.coordinates) + unit_of(i) * samples * 2, 2 * samples * sizeof(C));
        }
        rows.select(image, head);
        tile.plan(image, head, query, count);
        if (!layout.packed) prefetch_rows(tile, count, rows, p.channels * sizeof(T));
        for (int64_t i = 0, first = 0; i < count; ++i, first += samples) {
          load_grad(p, g, image, head, query + i, tile.capacity, grad);
          if (layout.packed)
            dot<T, true>(tile, first, rows, padded, grad.get(), dots + 4 * first);
          else
            dot<T, false>(tile, first, rows, padded, grad.get(), dots + 4 * first);
        }
        sample_gradients(tile, count, dots, grad_weight, grad_pixel);
        chain_rule(p, tile, count, grad_weight, grad_pixel, grad_xy);
        for (int64_t i = 0, first = 0; i < count; ++i, first += samples) {
          narrow(grad_weight + first, static_cast<C*>(g.weights) + unit_of(i) * samples, samples);
          narrow(grad_xy + 2 * first, static_cast<C*>(g.coordinates) + unit_of(i) * samples * 2, 2 * samples);
          if (parts != nullptr) {
            const int64_t part = (image * p.heads + head) * (query_end - query_begin) + query + i - query_begin;
            reference_part(p, tile, first, grad_pixel + 2 * first, parts + part * p.levels * p.reference_size);
          }
        }
      };
      for_tiles(p, tile.capacity, layout.packed, query_begin, query_end, begin, end, run_tile);
    });
  }

  // Gradients of the samples of `count` queries with respect to the attention weights and to the positions in pixels.
  static void sample_gradients(const Tile<A, C>& tile, int64_t count, const A* __restrict dots,
                               A* __restrict grad_weight, A* __restrict grad_pixel) {
    const A *down = tile.down, *right = tile.right, *weight = tile.weight;
    const int32_t* inside = tile.inside;
    for (int64_t s = 0; s < count * tile.samples; ++s) {
      const SampleGradient<A> grad =
          sample_gradient(down[s], right[s], dots[4 * s], dots[4 * s + 1], dots[4 * s + 2], dots[4 * s + 3]);
      grad_weight[s] = grad.weight;
      grad_pixel[2 * s] = inside[s] ? grad.x * weight[s] : A(0);
      grad_pixel[2 * s + 1] = inside[s] ? grad.y * weight[s] : A(0);
    }
  }

  // Gradients with respect to the operator's arguments: locations or offsets, and logits.
  static void chain_rule(const Problem& p, const Tile<A, C>& tile, int64_t count, A* __restrict grad_weight,
                         const A* __restrict grad_pixel, A* __restrict grad_xy) {
    const int32_t *width = tile.width, *height = tile.height, *inside = tile.inside;
    const int64_t total = count * tile.samples;
    if (p.reference_size != 2) {
      for (int64_t s = 0; s < total; ++s) {
        grad_xy[2 * s] = grad_pixel[2 * s] * static_cast<A>(width[s]);
        grad_xy[2 * s + 1] = grad_pixel[2 * s + 1] * static_cast<A>(height[s]);
      }
    } else {
      for (int64_t s = 0; s < 2 * total; ++s) grad_xy[s] = grad_pixel[s];
    }
    if (p.reference_size == 0) return;
    if (p.reference_size == 4) {
      const A *box_width = tile.origin + 2 * tile.size, *box_height = tile.origin + 3 * tile.size;
      const A* unit = tile.box_unit;
      for (int64_t s = 0; s < total; ++s) {
        grad_xy[2 * s] = inside[s] ? grad_xy[2 * s] * box_width[s] * unit[s] : A(0);
        grad_xy[2 * s + 1] = inside[s] ? grad_xy[2 * s + 1] * box_height[s] * unit[s] : A(0);
      }
    }
    for (int64_t first = 0; first < total; first += tile.samples) {
      const A* weight = tile.weight + first;
      A* grad = grad_weight + first;
      const A mean = dot_product<A>(grad, weight, tile.samples);
      for (int64_t s = 0; s < tile.samples; ++s) grad[s] = weight[s] * (grad[s] - mean);
    }
  }

  // One head's part of the gradient of the reference points of one query: [levels][reference_size].
  static void reference_part(const Problem& p, const Tile<A, C>& tile, int64_t first, const A* grad_pixel, A* part) {
    for (int64_t level = 0, s = 0; level < p.levels; ++level, part += p.reference_size) {
      A sum[4] = {};
      for (const int64_t end = p.first_sample(level + 1); s < end; ++s) {
        const A grad_x = grad_pixel[2 * s] * static_cast<A>(tile.width[s]);
        const A grad_y = grad_pixel[2 * s + 1] * static_cast<A>(tile.height[s]);
        sum[0] += grad_x;
        sum[1] += grad_y;
        if (p.reference_size == 4 && tile.inside[first + s]) {
          sum[2] += grad_x * tile.raw[2 * (first + s)] * tile.box_unit[s];
          sum[3] += grad_y * tile.raw[2 * (first + s) + 1] * tile.box_unit[s];
        }
      }
      for (int64_t f = 0; f < p.reference_size; ++f) part[f] = sum[f];
    }
  }

  static void sum_over_heads(const Problem& p, const Gradients& g, int64_t query_begin, int64_t query_end,
                             const A* parts, const cpu::Pool& pool) {
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
        const int64_t first = (image * p.queries + query_begin + query) * features;
        if (p.wide_reference)
          narrow(sum, static_cast<A*>(g.reference_points) + first, features);
        else
          narrow(sum, static_cast<C*>(g.reference_points) + first, features);
      }
    });
  }

  static void value_gradient(const Problem& p, const Gradients& g, const cpu::Pool& pool) {
    // One level per task if there are fewer heads than threads.
    const bool by_level = p.batch * p.heads < pool.threads;
    const int64_t ranges = by_level ? p.levels : 1;
    const Layout layout(p, true);
    const int64_t cost = (work(p, p.queries) + p.keys * p.channels) / ranges;
    run(pool, p.batch * p.heads * ranges, cost, [&](int64_t begin, int64_t end) {
      const int64_t padded = padded_channels<A>(p), stride = padded * sizeof(A);
      Buffer<A> rows(layout.rows * padded);
      Buffer<A> grad(padded);
      const Writer writer(p, p.keys, g.value);
      std::memset(grad, 0, padded * sizeof(A));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / (p.heads * ranges), head = i / ranges % p.heads;
        const int64_t level_begin = by_level ? i % ranges : 0, level_end = by_level ? level_begin + 1 : p.levels;
        const Level &first = layout.levels[level_begin], &last = layout.levels[level_end - 1];
        const int64_t clear_begin = first.origin - first.pitch - 2;  // the row that excluded samples have
        const int64_t clear_end = last.origin + (last.height + 1) * last.pitch;
        std::memset(rows + clear_begin * padded, 0, (clear_end - clear_begin) * stride);
        Tile<A, C> tile(p, layout, level_begin, level_end, false);
        for (int64_t query = 0; query < p.queries; query += tile.capacity) {
          const int64_t count = min_of(tile.capacity, p.queries - query);
          tile.plan(image, head, query, count);
          for (int64_t j = 0; j < count; ++j) {
            load_grad(p, g, image, head, query + j, tile.capacity, grad);
            scatter(tile, j * tile.samples, reinterpret_cast<char*>(rows.get()), stride, padded, grad.get());
          }
        }
        for (int64_t level = level_begin; level < level_end; ++level)
          layout.for_lines(level, [&](int64_t key, int64_t row) {
            const A* source = rows + row * padded;
            T* target = static_cast<T*>(g.value) + ((image * p.keys + key) * p.heads + head) * p.channels;
            for (int64_t x = 0; x < layout.levels[level].width; ++x, source += padded, target += p.heads * p.channels)
              writer.write(source, target);
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
