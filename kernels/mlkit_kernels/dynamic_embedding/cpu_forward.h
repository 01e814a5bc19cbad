// Pooled lookup: threads over bags, each summed by one thread in the order of its indices.

#pragma once

#include <atomic>
#include <memory>

#include "cpu_bags.h"
#include "cpu_row.h"

namespace {

template <class T>
struct Lookup {
  const int32_t* header;
  const T* pool;
  Layout layout;
  Bags bags;
  const float* weights;  // null: ones
  bool mean;
  float* out;
};

// Adds factor * row to `to`, or puts it there.
template <bool Slab, int W, bool Add, class T>
inline void add_row(const Lookup<T>& a, int64_t row, float factor, const T* zeros, float* to) {
  const Layout& l = a.layout;
  const int64_t C = W ? W : l.width, K = l.chunks;
  const Places found = find<Slab>(a.header + row * l.words, l);
  if (Slab && found.mask == (1u << K) - 1)
    return combine<0, Add>(to, a.pool + found.slot[0] * C, factor, K * C);
  for (int64_t k = 0; k < K; ++k) {
    const T* from = found.mask >> k & 1 ? a.pool + found.slot[k] * C : zeros;  // no branch to guess
    combine<W, Add>(to + k * C, from, factor, C);
  }
}

template <bool Slab, int W, class T>
void forward_bags(const Lookup<T>& a, int64_t first_bag, int64_t last_bag, const int64_t* rows,
                  const T* zeros) {
  const Layout& l = a.layout;
  const Bags& bags = a.bags;
  const int64_t D = l.chunks * l.width, begin = bags.start(first_bag), end = bags.start(last_bag);
  const auto header = [&](int64_t p) { return a.header + rows[p - begin] * l.words; };
  const auto ask_header = [&](int64_t p) { prefetch_header<false>(header(p), l); };
  const auto ask_chunks = [&](int64_t p) {
    if (rows[p - begin] >= 0) prefetch_chunks<false, Slab>(header(p), a.pool, l);
  };
  Bursts bursts(begin, end, ask_header, ask_chunks);

  for (int64_t bag = first_bag; bag < last_bag; ++bag) {
    float* to = a.out + bags.segment(bag) * D;
    const int64_t stop = bags.start(bag + 1);
    float length = 1.0f;
    if (a.mean) {
      int64_t count = 0;
      for (int64_t p = bags.start(bag); p < stop; ++p) count += rows[p - begin] >= 0;
      length = static_cast<float>(std::max<int64_t>(count, 1));
    }
    bool empty = true;
    for (int64_t p = bags.start(bag); p < stop; ++p) {
      bursts.reach(p);
      const int64_t row = rows[p - begin];
      if (row < 0) continue;
      const float factor = (a.weights ? a.weights[p] : 1.0f) / length;
      if (empty)
        add_row<Slab, W, false>(a, row, factor, zeros, to);
      else
        add_row<Slab, W, true>(a, row, factor, zeros, to);
      empty = false;
    }
    if (empty) std::fill_n(to, D, 0.0f);
  }
}

// Returns the first position with an index outside its table, or -1.
template <bool Slab, int W, class T>
int64_t forward(const Lookup<T>& a) {
  const Bags& bags = a.bags;
  const std::vector<T> zeros(a.layout.width);
  const int64_t threads = threads_for(bags.positions() + bags.count);
  std::vector<int64_t> wrong(threads, -1);
  run(threads, [&](int64_t t) {
    const int64_t first = bags.count * t / threads, last = bags.count * (t + 1) / threads;
    const int64_t begin = bags.start(first);
    const std::unique_ptr<int64_t[]> rows(new int64_t[bags.start(last) - begin + 1]);
    wrong[t] = bags.rows(first, last, rows.get());
    if (wrong[t] < 0) forward_bags<Slab, W>(a, first, last, rows.get(), zeros.data());
  });
  for (const int64_t position : wrong)
    if (position >= 0) return position;
  return -1;
}

}  // namespace
