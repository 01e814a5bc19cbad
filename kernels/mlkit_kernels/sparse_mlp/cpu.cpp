// Sparse expert MLP for few tokens (decode): only the selected experts' weights are read.
//
//   y = b_down + sum over selected experts e, neurons j of
//         act(gate_ej . x + bg_ej) * (up_ej . x + bu_ej) * down_ej     (reference.py, same layout)
//
// Tokens are taken in tiles of at most 8. For a tile: (1) the router's GEMV, threads over experts;
// (2) the union of the experts that its tokens selected, with one bit per token; (3) threads over
// the neurons of the union in fixed ranges: for four neurons at a time the dots that share x, the
// activations, and one axpy of their rows of down into a y of the thread's own (one row at a time
// is a single stream of addresses, which does not fill the memory bus); a row is read from memory
// once for all tokens of the tile; (4) the threads' y are added in the order of the threads. All
// sums are fp32. The split depends on the number of threads alone, so that repeated calls give
// identical bits.
//
// -ffast-math is not used: it would drop the NaN rule of the router's comparison. Sums that need
// another order to be fast are written with vectors (GCC's and Clang's, for any CPU).

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
#include <torch/headeronly/util/BFloat16.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 8;         // tokens that share one pass over the weights
constexpr int64_t kGroup = 4;        // neurons, or the router's rows, that share one pass over x
constexpr int64_t kGrain = 1 << 15;  // multiply-adds below which another thread does not pay
constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 256;      // elements requested ahead of each row: past a page's end too

typedef float Vec __attribute__((vector_size(kLanes * 4)));

struct BF16 {
  uint16_t bits;
};

inline float widen(float v) { return v; }
inline float widen(BF16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}

enum Activation : int64_t {
  kSilu, kGelu, kGeluTanh, kQuickGelu, kRelu, kRelu2, kTanh, kSigmoid, kActivations
};

inline float activate(float a, int64_t kind) {
  switch (kind) {
    case kSilu:
      return a / (1.0f + std::exp(-a));
    case kGelu:
      return 0.5f * a * (1.0f + std::erf(a * 0.70710678118654752f));
    case kGeluTanh:
      return 0.5f * a *
          (1.0f + std::tanh(0.79788456080286536f * (a + 0.044715f * a * a * a)));
    case kQuickGelu:
      return a / (1.0f + std::exp(-1.702f * a));
    case kRelu2:
      return a < 0.0f ? 0.0f : a * a;
    case kTanh:
      return std::tanh(a);
    case kSigmoid:
      return 1.0f / (1.0f + std::exp(-a));
    default:
      return a < 0.0f ? 0.0f : a;  // keeps NaN, as torch.relu does
  }
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const BF16* p) {
  typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));
  typedef uint32_t Word __attribute__((vector_size(kLanes * 4)));
  Half h;
  std::memcpy(&h, p, sizeof h);
  const Word w = __builtin_convertvector(h, Word) << 16;
  Vec v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}

// out[k] = row[k] . x
template <int K, class W>
inline void dots(const W* const* row, const float* x, int64_t n, float* out) {
  Vec acc[K] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    for (int k = 0; k < K; ++k) {
      __builtin_prefetch(row[k] + i + kAhead);
      acc[k] += load(row[k] + i) * v;
    }
  }
  for (int k = 0; k < K; ++k) {
    float sum = 0.0f;
    for (int64_t l = 0; l < kLanes; ++l) sum += acc[k][l];
    for (int64_t l = i; l < n; ++l) sum += widen(row[k][l]) * x[l];
    out[k] = sum;
  }
}

// y += sum over k of h[k] * row[k]
template <int K, class W>
inline void axpys(const float* h, const W* const* row, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec sum = load(y + i);
    for (int k = 0; k < K; ++k) sum += h[k] * load(row[k] + i);
    std::memcpy(y + i, &sum, sizeof sum);
  }
  for (; i < n; ++i)
    for (int k = 0; k < K; ++k) y[i] += h[k] * widen(row[k][i]);
}

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
Tensor empty_like(const Tensor& x, bool half) {
  const auto shape = x.sizes();
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
  bool gated;
  int64_t activation;
};

template <class R>
void route(const R* weight, Reader bias, const float* x, int64_t tokens, const Shape& s,
           float threshold, uint32_t* bits) {
  const int64_t groups = (s.experts + kGroup - 1) / kGroup;
  const int64_t threads = threads_for(s.experts * s.hidden * tokens, groups);
  run(threads, [&](int64_t t) {
    for (int64_t g = groups * t / threads; g < groups * (t + 1) / threads; ++g) {
      const int64_t first = g * kGroup, count = std::min(kGroup, s.experts - first);
      const R* row[kGroup];
      for (int64_t k = 0; k < count; ++k) row[k] = weight + (first + k) * s.hidden;
      std::fill_n(bits + first, count, 0u);
      for (int64_t m = 0; m < tokens; ++m) {
        float logit[kGroup];
        if (count == kGroup)
          dots<kGroup>(row, x + m * s.hidden, s.hidden, logit);
        else
          for (int64_t k = 0; k < count; ++k)
            dots<1>(row + k, x + m * s.hidden, s.hidden, logit + k);
        for (int64_t k = 0; k < count; ++k) {
          const float value = logit[k] + (bias.data ? bias.at(first + k) : 0.0f);
          if (value > threshold) bits[first + k] |= 1u << m;  // false for NaN
        }
      }
    }
  });
}

void take(const bool* mask, int64_t tokens, const Shape& s, uint32_t* bits) {
  std::fill_n(bits, s.experts, 0u);
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t e = 0; e < s.experts; ++e)
      bits[e] |= static_cast<uint32_t>(mask[m * s.experts + e]) << m;
}

// Adds the output of K neurons that follow one another in one expert, for the tokens in `left`.
template <int K, bool Gated, class W>
inline void neurons(const W* first, const W* last, const Reader& bias, int64_t at, const float* x,
                    const Shape& s, uint32_t left, float* y) {
  constexpr int kRows = Gated ? 2 * K : K;
  const int64_t H = s.hidden;
  const W *row[kRows], *down[K];
  float b[kRows] = {};
  for (int k = 0; k < kRows; ++k) {
    const int64_t offset = k < K ? k : s.size + k - K;  // the gate's rows, then up's
    row[k] = first + offset * H;
    if (bias.data) b[k] = bias.at(at + offset);
  }
  for (int k = 0; k < K; ++k) down[k] = last + k * H;
  for (; left; left &= left - 1) {
    const int64_t m = __builtin_ctz(left);
    float value[kRows], h[K];
    dots<kRows>(row, x + m * H, H, value);
    for (int k = 0; k < K; ++k) {
      h[k] = activate(value[k] + b[k], s.activation);
      if (Gated) h[k] *= value[kRows - K + k] + b[kRows - K + k];
    }
    axpys<K>(h, down, y + m * H, H);
  }
}

// Adds the selected experts' output to y [tokens, hidden], which holds zeros.
template <bool Gated, class W>
void experts(const W* gate_up, const W* down, const Reader& bias, const float* x, int64_t tokens,
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
  if (threads > 1) scratch.assign((threads - 1) * tokens * H, 0.0f);

  run(threads, [&](int64_t t) {
    float* mine = t == 0 ? y : scratch.data() + (t - 1) * tokens * H;
    for (int64_t i = items * t / threads; i < items * (t + 1) / threads; ++i) {
      const int64_t e = chosen[i / groups];
      int64_t j = i % groups * kGroup;
      const int64_t end = std::min(S, j + kGroup);
      const auto go = [&](auto count) {
        neurons<decltype(count)::value, Gated>(gate_up + (e * rows + j) * H, down + (e * S + j) * H,
                                               bias, e * rows + j, x, s, bits[e], mine);
      };
      if (end - j == kGroup)
        go(std::integral_constant<int, kGroup>());
      else
        for (; j < end; ++j) go(std::integral_constant<int, 1>());
    }
  });
  for (int64_t t = 1; t < threads; ++t) {
    const float one = 1.0f;
    const float* part = scratch.data() + (t - 1) * tokens * H;
    axpys<1>(&one, &part, y, tokens * H);
  }
}

Tensor sparse_mlp_cpu(Tensor x, std::optional<Tensor> router_weight,
                      std::optional<Tensor> router_bias, Tensor gate_up, Tensor down_t,
                      std::optional<Tensor> gate_up_bias, std::optional<Tensor> down_bias,
                      std::optional<Tensor> mask, double threshold, int64_t activation) {
  STD_TORCH_CHECK(x.dim() >= 1 && down_t.dim() == 3 && gate_up.dim() == 3 && down_t.numel() > 0,
                  "sparse_mlp_cpu: gate_up and down_t must have 3 dimensions, x at least 1");
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations,
                  "sparse_mlp_cpu: activation must be 0 to ", kActivations - 1, ", got ",
                  activation);
  STD_TORCH_CHECK(router_weight.has_value() != mask.has_value() && !(mask && router_bias),
                  "sparse_mlp_cpu: either a router or a mask");
  STD_TORCH_CHECK(!std::isnan(threshold), "sparse_mlp_cpu: threshold must not be nan");
  Shape s{down_t.size(0), down_t.size(1), down_t.size(2),
          gate_up.size(1) == 2 * down_t.size(1), activation};
  const int64_t H = s.hidden, rows = s.gated ? 2 * s.size : s.size, M = x.numel() / H;
  STD_TORCH_CHECK(x.size(x.dim() - 1) == H, "sparse_mlp_cpu: x must end in ", H, " channels");
  check_shape(gate_up, "gate_up", {s.experts, rows, H});
  const bool half_x = is_bf16(x, "x");
  bool half_r = false;
  if (router_weight) {
    check_shape(*router_weight, "router_weight", {s.experts, H});
    half_r = is_bf16(*router_weight, "router_weight");
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
  x = dense(x);
  gate_up = dense(gate_up);
  down_t = dense(down_t);

  Tensor out = empty_like(x, half_x);
  const Reader in{x.data_ptr(), half_x};
  const int64_t most = std::min(kTile, M);
  std::vector<float> tile(most * H), y(most * H), scratch;
  std::vector<uint32_t> bits(s.experts);
  for (int64_t start = 0; start < M; start += kTile) {
    const int64_t tokens = std::min(kTile, M - start);
    for (int64_t i = 0; i < tokens * H; ++i) tile[i] = in.at(start * H + i);
    const float limit = static_cast<float>(threshold);
    if (mask)
      take(static_cast<const bool*>(mask->data_ptr()) + start * s.experts, tokens, s, bits.data());
    else if (half_r)
      route(static_cast<const BF16*>(router_weight->data_ptr()), br, tile.data(), tokens, s,
            limit, bits.data());
    else
      route(static_cast<const float*>(router_weight->data_ptr()), br, tile.data(), tokens, s,
            limit, bits.data());
    std::fill(y.begin(), y.end(), 0.0f);
    const auto run_experts = [&](auto gated, auto type) {
      using W = decltype(type);
      experts<decltype(gated)::value>(static_cast<const W*>(gate_up.data_ptr()),
                                      static_cast<const W*>(down_t.data_ptr()), bw, tile.data(),
                                      tokens, s, bits.data(), scratch, y.data());
    };
    if (half_w)
      s.gated ? run_experts(std::true_type(), BF16()) : run_experts(std::false_type(), BF16());
    else
      s.gated ? run_experts(std::true_type(), 0.0f) : run_experts(std::false_type(), 0.0f);
    for (int64_t i = 0; i < tokens * H; ++i) {
      const float value = y[i] + (bd.data ? bd.at(i % H) : 0.0f);
      if (half_x)
        static_cast<c10::BFloat16*>(out.data_ptr())[start * H + i] = c10::BFloat16(value);
      else
        static_cast<float*>(out.data_ptr())[start * H + i] = value;
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mlkit, m) {
  m.def(
      "sparse_mlp_cpu(Tensor x, Tensor? router_weight, Tensor? router_bias, Tensor gate_up, "
      "Tensor down_t, Tensor? gate_up_bias, Tensor? down_bias, Tensor? mask, float threshold, "
      "int activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlkit, CPU, m) {
  m.impl("sparse_mlp_cpu", TORCH_BOX(&sparse_mlp_cpu));
}
