// A row of the header (header.py has its words), and what is done to its chunks.
//
// W is the width of a chunk where the compiler should know it (4, 8, 16), else 0.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../sparse_mlp/cpu_vector.h"

namespace {

constexpr int kMaxChunks = 8;
constexpr int64_t kLine = 64;        // bytes of a cache line
constexpr int64_t kBurst = 64;  // lookups whose lines are asked for at once

// Asks for memory in bursts: the headers of a burst of lookups while the chunks of the burst before
// it are asked for and the one before that is used. A burst fills all the core's misses in flight;
// prefetches spread over the work, one lookup at a time, keep few of them busy where a miss of the
// address cache comes with each.
template <class Header, class Chunks>
class Bursts {
 public:
  Bursts(int64_t begin, int64_t end, const Header& header, const Chunks& chunks)
      : end_(end), next_(begin), header_(header), chunks_(chunks) {
    ask(begin, header_);
    ask(begin + kBurst, header_);
    ask(begin, chunks_);
  }
  // To be called with each lookup in turn.
  void reach(int64_t at) {
    if (at != next_) return;
    next_ += kBurst;
    ask(at + 2 * kBurst, header_);
    ask(at + kBurst, chunks_);
  }

 private:
  template <class F>
  void ask(int64_t first, const F& f) const {
    for (int64_t i = first; i < std::min(end_, first + kBurst); ++i) f(i);
  }
  int64_t end_, next_;
  const Header& header_;
  const Chunks& chunks_;
};

struct Layout {
  bool slab, wide;
  int64_t chunks, width;    // K, C
  int64_t words;            // of a row
  int64_t state, utility;   // their first words; state is -1 where there is none
  bool coded;               // utilities of one byte
};

// The resident chunks of a row: bit k of `mask`, and the slot of chunk k where it is set.
struct Places {
  uint32_t mask;
  int64_t slot[kMaxChunks];
};

inline int64_t slab_address(const int32_t* row, const Layout& l) {
  if (!l.wide) return static_cast<uint32_t>(row[0]);
  int64_t address;
  std::memcpy(&address, row, sizeof address);
  return address;
}

inline int64_t chunk_slot(const int32_t* row, const Layout& l, int64_t k) {
  if (!l.wide) return row[k];
  int64_t slot;
  std::memcpy(&slot, row + 2 * k, sizeof slot);
  return slot;
}

template <bool Slab>
inline Places find(const int32_t* row, const Layout& l) {
  Places found{};
  if constexpr (Slab) {
    const int64_t address = slab_address(row, l);
    found.mask = static_cast<uint32_t>(address) & ((1u << l.chunks) - 1);
    int64_t slot = address >> l.chunks;
    for (int64_t k = 0; k < l.chunks; ++k) {
      found.slot[k] = slot;
      slot += found.mask >> k & 1;
    }
  } else {
    for (int64_t k = 0; k < l.chunks; ++k) {
      found.slot[k] = chunk_slot(row, l, k);
      found.mask |= static_cast<uint32_t>(found.slot[k] >= 0) << k;
    }
  }
  return found;
}

inline void prefetch(const void* p, bool write) {
  asm volatile("");  // GCC drops calls of functions that do nothing but prefetch
  if (write)
    __builtin_prefetch(p, 1);
  else
    __builtin_prefetch(p, 0);
}

// A header row of up to 64 bytes lies in one line or two.
template <bool Write>
inline void prefetch_header(const int32_t* row, const Layout& l) {
  prefetch(row, Write);
  prefetch(row + l.words - 1, Write);
}

// Prefetches the chunks of a row whose header has arrived.
template <bool Write, bool Slab, class T>
inline void prefetch_chunks(const int32_t* row, const T* pool, const Layout& l) {
  if constexpr (Slab) {
    const int64_t address = slab_address(row, l);
    const int64_t count = __builtin_popcountll(address & ((1 << l.chunks) - 1));
    const int64_t size = l.width * static_cast<int64_t>(sizeof(T));
    // The same number of lines for any mask, the last one repeated: a wrong guess of a branch
    // costs more than a few prefetches of a line that is on its way.
    const char* first = count ? reinterpret_cast<const char*>(pool + (address >> l.chunks) * l.width)
                              : reinterpret_cast<const char*>(row);
    const char* last = first + (count ? count * size - 1 : 0);
    const int64_t most = l.chunks * size;
    for (int64_t at = 0; at < most; at += kLine) prefetch(std::min(first + at, last), Write);
    if (size % kLine != 0) prefetch(last, Write);
  } else {
    for (int64_t k = 0; k < l.chunks; ++k) {
      const int64_t slot = chunk_slot(row, l, k);
      if (slot < 0) continue;
      const char* chunk = reinterpret_cast<const char*>(pool + slot * l.width);
      const int64_t size = l.width * static_cast<int64_t>(sizeof(T));
      for (int64_t at = 0; at < size; at += kLine) prefetch(chunk + at, Write);
      prefetch(chunk + size - 1, Write);
    }
  }
}

// Vectors of a chunk of known width.
template <int N>
struct Lanes {
  typedef float Type __attribute__((vector_size(N * 4)));
  typedef uint32_t Bits __attribute__((vector_size(N * 4)));
  typedef uint16_t Narrow __attribute__((vector_size(N * 2)));
};

// f(lanes, i) for vectors of the numbers 0 .. n, then f(1, i) for those that fill none.
template <int W, class F>
inline void in_lanes(int64_t n, const F& f) {
  if constexpr (W != 0) {
    f(std::integral_constant<int, W>{}, 0);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) f(std::integral_constant<int, kLanes>{}, i);
    for (; i < n; ++i) f(std::integral_constant<int, 1>{}, i);
  }
}

template <int N>
inline typename Lanes<N>::Type read(const float* p) {
  typename Lanes<N>::Type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <int N>
inline typename Lanes<N>::Type read(const BF16* p) {
  typename Lanes<N>::Narrow h;
  std::memcpy(&h, p, sizeof h);
  return as<typename Lanes<N>::Type>(__builtin_convertvector(h, typename Lanes<N>::Bits) << 16);
}
template <int N>
inline void write(float* p, typename Lanes<N>::Type v) {
  std::memcpy(p, &v, sizeof v);
}

// to = factor * from, or to += factor * from
template <int W, bool Add, class T>
inline void combine(float* to, const T* from, float factor, int64_t n) {
  in_lanes<W>(n, [&](auto lanes, int64_t i) {
    constexpr int N = decltype(lanes)::value;
    auto v = read<N>(from + i) * factor;
    if constexpr (Add) v += read<N>(to + i);
    write<N>(to + i, v);
  });
}

template <int W>
inline float square_sum(const float* g, int64_t n) {
  typename Lanes<W == 0 ? kLanes : W>::Type sum{};
  float rest = 0.0f;
  in_lanes<W>(n, [&](auto lanes, int64_t i) {
    constexpr int N = decltype(lanes)::value;
    const auto v = read<N>(g + i);
    if constexpr (N == 1)
      rest += v[0] * v[0];
    else
      sum += v * v;
  });
  for (size_t l = 0; l < sizeof(sum) / 4; ++l) rest += sum[l];
  return rest;
}

}  // namespace
