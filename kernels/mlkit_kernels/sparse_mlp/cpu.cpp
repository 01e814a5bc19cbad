// Sparse expert MLP on CPUs: only the selected experts' weights are read.
//
//   y = b_down + sum over selected experts e, neurons j of
//         act(gate_ej . x + bg_ej) * (up_ej . x + bu_ej) * down_ej     (reference.py, same layout)
//
// Tokens are taken in tiles of at most 32. For a tile: (1) the router's GEMV, threads over experts;
// (2) the union of the experts that its tokens selected, with one bit per token; (3) threads over
// the neurons of the union in fixed ranges: for four neurons at a time the dots that share x, the
// activations, and one axpy of their rows of down into a y of the thread's own (one row at a time
// is a single stream of addresses, which does not fill the memory bus); a row is read from memory
// once for all tokens of the tile; (4) the threads' y are added in the order of the threads. All
// sums are fp32. The split depends on the number of threads alone, so that repeated calls give
// identical bits.
//
// Where `prices` say that this takes longer than a dense GEMM, for what the tokens selected, the
// whole layer is computed by PyTorch's and masked, rounded to the weights' type in between.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cpu_rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 32;        // tokens that share one pass over the weights
constexpr int64_t kGroup = 4;        // neurons, or the router's rows, that share one pass over x
constexpr int64_t kGrain = 1 << 15;  // multiply-adds below which another thread does not pay
constexpr int64_t kPrices = 2 * kTile + 2;

// A tensor of fp32 or bf16 that is read here and there only: a bias, the tokens.
struct Reader {
  const void* data = nullptr;
  bool half = false;
  float at(int64_t i) const {
    return half ? widen(static_cast<const BF16*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

bool is_bf16(const Tensor& t, const char* name) {
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(
      t.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16),
      "sparse_mlp_cpu: ", name, " must be a CPU tensor of float32 or bfloat16");
  return type == ScalarType::BFloat16;
}

// By way of the dispatcher, so only where it must be.
Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Like new_empty, which goes by way of the dispatcher and its table of names.
template <class Sizes>
Tensor make(const Sizes& shape, bool half) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; --d)
    strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t want : shape) same = same && t.size(d++) == want;
  STD_TORCH_CHECK(same, "sparse_mlp_cpu: ", name, " has a shape that does not fit the others");
}

int64_t threads_for(int64_t work, int64_t items) {
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), items);
  return std::max<int64_t>(1, std::min(most, work / kGrain));
}

template <class F>
void run(int64_t threads, const F& f) {
  if (threads == 1) {
    f(0);
    return;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

struct Shape {
  int64_t experts, size, hidden;
  int64_t stride;  // between tokens: not a multiple of a page, or their rows share cache lines' sets
  bool gated;
  int64_t activation;
};

template <class R, class X>
void route(const R* weight, Reader bias, const X* x, int64_t tokens, const Shape& s,
           float threshold, uint32_t* bits) {
  const int64_t groups = (s.experts + kGroup - 1) / kGroup;
  const int64_t threads = threads_for(s.experts * s.hidden * tokens, groups);
  run(threads, [&](int64_t t) {
    for (int64_t g = groups * t / threads; g < groups * (t + 1) / threads; ++g) {
      const int64_t first = g * kGroup, count = std::min(kGroup, s.experts - first);
      const R* row[kGroup];
      for (int64_t k = 0; k < count; ++k) row[k] = weight + (first + k) * s.hidden;
      std::fill_n(bits + first, count, 0u);
      const int64_t ahead = kGroup * s.hidden;
      for (int64_t m = 0; m < tokens; m += kBlock)
        with_count(std::min(kBlock, tokens - m), [&](auto number) {
          constexpr int T = decltype(number)::value, kRows = std::min<int>(kGroup, rows_for(T));
          const X* at[T];
          for (int u = 0; u < T; ++u) at[u] = x + (m + u) * s.stride;
          float logit[kGroup][T];
          int64_t k = 0;
          for (; k + kRows <= count; k += kRows) dots<kRows, T>(row + k, ahead, at, s.hidden, logit + k);
          for (; k < count; ++k) dots<1, T>(row + k, ahead, at, s.hidden, logit + k);
          for (k = 0; k < count; ++k)
            for (int u = 0; u < T; ++u) {
              const float value = logit[k][u] + (bias.data ? bias.at(first + k) : 0.0f);
              if (value > threshold) bits[first + k] |= 1u << (m + u);  // false for NaN
            }
        });
    }
  });
}

void take(const bool* mask, int64_t tokens, const Shape& s, uint32_t* bits) {
  std::fill_n(bits, s.experts, 0u);
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t e = 0; e < s.experts; ++e)
      bits[e] |= static_cast<uint32_t>(mask[m * s.experts + e]) << m;
}

// Adds the output of K neurons that follow one another in one expert, for T tokens.
// The weights of the next ones to compute are requested: they are at distances `next`, `next_down`.
template <int K, int T, bool Gated, class W, class X>
inline void neurons(const W* first, const W* last, int64_t next, int64_t next_down,
                    const Reader& bias, int64_t at, const X* const* x, const Shape& s,
                    float* const* y) {
  constexpr int kRows = Gated ? 2 * K : K, kStep = std::min(kRows, rows_for(T));
  const int64_t H = s.hidden;
  const W *row[kRows], *down[K];
  float b[kRows][T] = {}, value[kRows][T], h[K][T];
  for (int k = 0; k < kRows; ++k) {
    const int64_t offset = k < K ? k : s.size + k - K;  // the gate's rows, then up's
    row[k] = first + offset * H;
    if (bias.data) std::fill_n(b[k], T, bias.at(at + offset));
  }
  for (int k = 0; k < K; ++k) down[k] = last + k * H;
  for (int k = 0; k < kRows; k += kStep) dots<kStep, T>(row + k, next, x, H, value + k);
  for (int i = 0; i < K * T; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, K * T - i);
    Vec v = activate(load(value[0] + i, count) + load(b[0] + i, count), s.activation);
    if (Gated) v *= load(value[kRows - K] + i, count) + load(b[kRows - K] + i, count);
    store(h[0] + i, v, count);
  }
  axpys<K, T>(h, down, next_down, y, H);
}

// Adds the selected experts' output to y [tokens, hidden], which holds zeros.
template <bool Gated, class W, class X>
void experts(const W* gate_up, const W* down, const Reader& bias, const X* x, int64_t tokens,
             const Shape& s, const uint32_t* bits, std::vector<float>& scratch, float* y) {
  const int64_t H = s.hidden, S = s.size, rows = Gated ? 2 * S : S;
  const int64_t groups = (S + kGroup - 1) / kGroup;  // of one expert
  std::vector<int32_t> chosen;
  for (int64_t e = 0; e < s.experts; ++e)
    if (bits[e]) chosen.push_back(static_cast<int32_t>(e));
  const int64_t items = static_cast<int64_t>(chosen.size()) * groups;
  if (items == 0) return;
  const int64_t work = static_cast<int64_t>(chosen.size()) * (rows + S) * H * tokens;
  const int64_t threads = threads_for(work, items);
  if (threads > 1) scratch.assign((threads - 1) * tokens * s.stride, 0.0f);

  run(threads, [&](int64_t t) {
    float* mine = t == 0 ? y : scratch.data() + (t - 1) * tokens * s.stride;
    for (int64_t i = items * t / threads; i < items * (t + 1) / threads; ++i) {
      const int64_t e = chosen[i / groups];
      const int64_t j = i % groups * kGroup;
      const int64_t end = std::min(S, j + kGroup);
      const int64_t then = std::min(i + 1, items - 1);  // what is computed after this
      const int64_t next_e = chosen[then / groups], next_j = then % groups * kGroup;
      const int64_t next = ((next_e - e) * rows + next_j - j) * H;
      const int64_t next_down = ((next_e - e) * S + next_j - j) * H;
      for (uint32_t left = bits[e]; left;) {
        const X* in[kBlock];
        float* out[kBlock];
        int64_t count = 0;
        for (; left && count < kBlock; left &= left - 1, ++count) {
          const int64_t m = __builtin_ctz(left);
          in[count] = x + m * s.stride;
          out[count] = mine + m * s.stride;
        }
        with_count(count, [&](auto number) {
          constexpr int T = decltype(number)::value;
          const auto go = [&](auto group, int64_t at) {
            neurons<decltype(group)::value, T, Gated>(gate_up + (e * rows + at) * H,
                                                      down + (e * S + at) * H, next, next_down,
                                                      bias, e * rows + at, in, s, out);
          };
          if (end - j == kGroup)
            go(std::integral_constant<int, kGroup>(), j);
          else
            for (int64_t k = j; k < end; ++k) go(std::integral_constant<int, 1>(), k);
        });
      }
    }
  });
  for (int64_t t = 1; t < threads; ++t) {
    const float one[1][1] = {{1.0f}};
    const float* part = scratch.data() + (t - 1) * tokens * s.stride;
    axpys<1, 1>(one, &part, 0, &y, tokens * s.stride);
  }
}

// h = act(pre + b) * (up + b) of the selected experts, 0 of the others.
template <bool Gated, class W>
void activate_all(const W* pre, const Reader& bias, const Shape& s, const uint32_t* bits,
                  int64_t tokens, W* h) {
  const int64_t N = s.experts, S = s.size, rows = Gated ? 2 * S : S;
  std::vector<float> b;
  for (int64_t i = 0; bias.data && i < N * rows; ++i) b.push_back(bias.at(i));
  torch::stable::parallel_for(0, tokens * N, 1 + kGrain / rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / N, e = i % N;
      const W* in = pre + i * rows;
      const float* add = b.empty() ? nullptr : b.data() + e * rows;
      if (!(bits[m / kTile * N + e] >> (m % kTile) & 1u)) {
        std::memset(h + i * S, 0, S * sizeof(W));
        continue;
      }
      for (int64_t j = 0; j < S; j += kLanes) {
        const int64_t count = std::min(kLanes, S - j);
        Vec v = load(in + j, count);
        if (add) v += load(add + j, count);
        v = activate(v, s.activation);
        if (Gated) {
          Vec u = load(in + S + j, count);
          if (add) u += load(add + S + j, count);
          v *= u;
        }
        store(h + i * S + j, v, count);
      }
    }
  });
}

struct Arguments {
  Tensor x, gate_up, down;
  Shape shape;
  int64_t tokens;
  bool half_x, half_router, half_w;
  const void* router;
  const bool* mask;
  Reader router_bias, bias, down_bias;
  float threshold;
};

template <class F>
void with_kind(const Arguments& a, const F& f) {
  if (a.half_w)
    a.shape.gated ? f(std::true_type(), BF16()) : f(std::false_type(), BF16());
  else
    a.shape.gated ? f(std::true_type(), 0.0f) : f(std::false_type(), 0.0f);
}

// One tile of tokens, in the types in which its rows are used.
struct Tile {
  std::vector<float> single;
  std::vector<BF16> half;

  void fill(const Arguments& a, int64_t start, int64_t tokens) {
    const int64_t H = a.shape.hidden, stride = a.shape.stride;
    const bool has_half = kHasProducts && a.half_x;
    if (!has_half || (a.router && !a.half_router) || !a.half_w) {
      single.resize(kTile * stride);
      const Reader in{a.x.data_ptr(), a.half_x};
      for (int64_t m = 0; m < tokens; ++m)
        for (int64_t i = 0; i < H; ++i) single[m * stride + i] = in.at((start + m) * H + i);
    }
    if (has_half) {
      half.resize(kTile * stride);
      const BF16* in = static_cast<const BF16*>(a.x.data_ptr()) + start * H;
      for (int64_t m = 0; m < tokens; ++m)
        std::memcpy(half.data() + m * stride, in + m * H, H * sizeof(BF16));
    }
  }

  // Calls f with the tokens as they are multiplied with weights of bf16 (or not).
  template <class F>
  void use(const Arguments& a, bool half_weights, const F& f) const {
    if (kHasProducts && a.half_x && half_weights)
      f(half.data());
    else
      f(single.data());
  }
};

void choose(const Arguments& a, const Tile& tile, int64_t start, int64_t tokens, uint32_t* bits) {
  const Shape& s = a.shape;
  if (a.mask) return take(a.mask + start * s.experts, tokens, s, bits);
  tile.use(a, a.half_router, [&](auto* x) {
    if (a.half_router)
      route(static_cast<const BF16*>(a.router), a.router_bias, x, tokens, s, a.threshold, bits);
    else if constexpr (std::is_same_v<decltype(x), const float*>)
      route(static_cast<const float*>(a.router), a.router_bias, x, tokens, s, a.threshold, bits);
  });
}

// prices[t], t = 0..32: time for nothing, then for an expert that t tokens of a tile selected;
// prices[32 + t], t = 1..32: time of the GEMM for t tokens; the last one: for each token more.
bool is_dense_cheaper(const double* prices, const uint32_t* bits, const Arguments& a) {
  double sparse = prices[0];
  const int64_t tiles = (a.tokens + kTile - 1) / kTile;
  for (int64_t i = 0; i < tiles * a.shape.experts; ++i)
    if (bits[i]) sparse += prices[__builtin_popcount(bits[i])];
  const int64_t inside = std::min(a.tokens, kTile);
  return sparse > prices[kTile + inside] + (a.tokens - inside) * prices[2 * kTile + 1];
}

template <class Out>
void write(const Arguments& a, const float* y, int64_t start, int64_t tokens, Out* out) {
  const int64_t H = a.shape.hidden;
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t i = 0; i < H; i += kLanes) {
      const int64_t count = std::min(kLanes, H - i);
      Vec v = load(y + m * a.shape.stride + i, count);
      if (a.down_bias.data)
        for (int64_t l = 0; l < count; ++l) v[l] += a.down_bias.at(i + l);
      store(out + (start + m) * H + i, v, count);
    }
}

void run_sparse(const Arguments& a, Tile& tile, const uint32_t* bits, void* out) {
  const Shape& s = a.shape;
  std::vector<float> y(std::min(kTile, a.tokens) * s.stride), scratch;
  for (int64_t start = 0; start < a.tokens; start += kTile) {
    const int64_t tokens = std::min(kTile, a.tokens - start);
    if (a.tokens > kTile) tile.fill(a, start, tokens);
    std::fill(y.begin(), y.end(), 0.0f);
    with_kind(a, [&](auto gated, auto type) {
      using W = decltype(type);
      tile.use(a, a.half_w, [&](auto* x) {
        if constexpr (std::is_same_v<W, BF16> || std::is_same_v<decltype(x), const float*>)
          experts<decltype(gated)::value>(static_cast<const W*>(a.gate_up.data_ptr()),
                                          static_cast<const W*>(a.down.data_ptr()), a.bias, x,
                                          tokens, s, bits + start / kTile * s.experts, scratch,
                                          y.data());
      });
    });
    if (a.half_x)
      write(a, y.data(), start, tokens, static_cast<BF16*>(out));
    else
      write(a, y.data(), start, tokens, static_cast<float*>(out));
  }
}

void run_dense(const Arguments& a, const uint32_t* bits, void* out) {
  const Shape& s = a.shape;
  const int64_t M = a.tokens, H = s.hidden, width = s.experts * s.size;
  const auto flat = [](const Tensor& t, int64_t rows, int64_t columns) {
    const int64_t shape[] = {rows, columns};
    return torch::stable::view(t, {shape, 2});
  };
  Tensor x = flat(a.x, M, H);
  if (a.half_x != a.half_w) {
    const Reader in{a.x.data_ptr(), a.half_x};
    x = make(std::vector<int64_t>{M, H}, a.half_w);
    for (int64_t i = 0; i < M * H; ++i) {
      const float value = in.at(i);
      if (a.half_w)
        store(static_cast<BF16*>(x.data_ptr()) + i, splat(value), 1);
      else
        static_cast<float*>(x.data_ptr())[i] = value;
    }
  }
  const Tensor gate_up = flat(a.gate_up, a.gate_up.numel() / H, H);
  const Tensor pre = torch::stable::matmul(x, torch::stable::transpose(gate_up, 0, 1));
  Tensor h = make(std::vector<int64_t>{M, width}, a.half_w);
  with_kind(a, [&](auto gated, auto type) {
    using W = decltype(type);
    activate_all<decltype(gated)::value>(static_cast<const W*>(pre.data_ptr()), a.bias, s, bits, M,
                                         static_cast<W*>(h.data_ptr()));
  });
  const Tensor down = flat(a.down, width, H);
  Tensor y;
  if (a.half_w) {  // oneDNN copies `down` for h x down, 1.3 times as slow at 16 tokens
    const auto turned = [](const Tensor& t) { return torch::stable::transpose(t, 0, 1); };
    y = dense(turned(torch::stable::matmul(turned(down), turned(h))));
  } else {
    y = torch::stable::matmul(h, down);
  }
  const Reader in{y.data_ptr(), a.half_w};
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < H; ++i) {
      const float value = in.at(m * H + i) + (a.down_bias.data ? a.down_bias.at(i) : 0.0f);
      if (a.half_x)
        store(static_cast<BF16*>(out) + m * H + i, splat(value), 1);
      else
        static_cast<float*>(out)[m * H + i] = value;
    }
}

Tensor sparse_mlp_cpu(Tensor x, std::optional<Tensor> router_weight,
                      std::optional<Tensor> router_bias, Tensor gate_up, Tensor down_t,
                      std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                      std::optional<Tensor> mask, double threshold, int64_t activation,
                      std::optional<Tensor> prices) {
  STD_TORCH_CHECK(x.dim() >= 1 && down_t.dim() == 3 && gate_up.dim() == 3 && down_t.numel() > 0,
                  "sparse_mlp_cpu: gate_up and down_t must have 3 dimensions, x at least 1");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations,
                  "sparse_mlp_cpu: activation must be 0 to ", kActivations - 1, ", got ",
                  activation);
  STD_TORCH_CHECK(router_weight.has_value() != mask.has_value() && !(mask && router_bias),
                  "sparse_mlp_cpu: either a router or a mask");
  STD_TORCH_CHECK(!std::isnan(threshold), "sparse_mlp_cpu: threshold must not be nan");
  STD_TORCH_CHECK(!prices || (prices->is_cpu() && prices->scalar_type() == ScalarType::Double &&
                              prices->numel() == kPrices && prices->is_contiguous()),
                  "sparse_mlp_cpu: prices must be ", kPrices, " numbers of float64 on the CPU");
  const int64_t H = down_t.size(2), padded = (H + 15) / 16 * 16 + 16;
  const Shape s{down_t.size(0), down_t.size(1), H, padded, gate_up.size(1) == 2 * down_t.size(1),
                activation};
  const int64_t rows = s.gated ? 2 * s.size : s.size, M = x.numel() / H;
  STD_TORCH_CHECK(x.size(x.dim() - 1) == H, "sparse_mlp_cpu: x must end in ", H, " channels");
  check_shape(gate_up, "gate_up", {s.experts, rows, H});
  const bool half_x = is_bf16(x, "x");
  bool half_router = false;
  if (router_weight) {
    check_shape(*router_weight, "router_weight", {s.experts, H});
    half_router = is_bf16(*router_weight, "router_weight");
    router_weight = dense(*router_weight);
  } else {
    STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool &&
                        mask->dim() == x.dim() && mask->numel() == M * s.experts &&
                        mask->size(mask->dim() - 1) == s.experts,
                    "sparse_mlp_cpu: mask must be a CPU tensor of bool, one for each token and "
                    "expert");
    mask = dense(*mask);
  }
  const bool half_w = is_bf16(gate_up, "gate_up");
  STD_TORCH_CHECK(half_w == is_bf16(down_t, "down_t"),
                  "sparse_mlp_cpu: gate_up and down_t must have the same type");
  const auto reader = [](std::optional<Tensor>& t, const char* name,
                         std::initializer_list<int64_t> shape) {
    if (!t) return Reader{};
    check_shape(*t, name, shape);
    const bool half = is_bf16(*t, name);
    t = dense(*t);
    return Reader{t->data_ptr(), half};
  };
  const Reader br = reader(router_bias, "router_bias", {s.experts});
  const Reader bw = reader(gate_up_bias, "gate_up_bias", {s.experts, rows});
  const Reader bd = reader(down_bias, "down_bias", {H});
  const Arguments a{dense(x), dense(gate_up), dense(down_t), s, M, half_x, half_router, half_w,
                    router_weight ? router_weight->data_ptr() : nullptr,
                    mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr, br, bw, bd,
                    static_cast<float>(threshold)};

  Tensor out = make(a.x.sizes(), half_x);
  Tile tile;
  std::vector<uint32_t> bits((M + kTile - 1) / kTile * s.experts);
  for (int64_t start = 0; start < M; start += kTile) {
    const int64_t tokens = std::min(kTile, M - start);
    tile.fill(a, start, tokens);
    choose(a, tile, start, tokens, bits.data() + start / kTile * s.experts);
  }
  if (prices && is_dense_cheaper(static_cast<const double*>(prices->data_ptr()), bits.data(), a))
    run_dense(a, bits.data(), out.data_ptr());
  else
    run_sparse(a, tile, bits.data(), out.data_ptr());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mlkit, m) {
  m.def(
      "sparse_mlp_cpu(Tensor x, Tensor? router_weight, Tensor? router_bias, Tensor gate_up, "
      "Tensor down_t, Tensor? gate_up_bias, Tensor? down_bias, Tensor? mask, float threshold, "
      "int activation, Tensor? prices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlkit, CPU, m) {
  m.impl("sparse_mlp_cpu", TORCH_BOX(&sparse_mlp_cpu));
}
