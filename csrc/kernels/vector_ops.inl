// The float work between two matrix products: norms and activations; attention is in attention.inl.
//
// Every instruction set returns the same bits. What is computed lane by lane is the same anyway;
// sums run over 16 lanes whatever the vector width, and are added up by halving (lane i + lane
// i + 8, ...). The rest of a length that is no multiple of 16 is done one by one.
constexpr int kLanes = 16;

// 16 floats in as many vectors as that takes.
template <typename S>
struct Wide {
  static constexpr int kParts = kLanes / S::kFloats;
  typename S::F part[kParts];

  static Wide set(float x) {
    Wide w;
    for (auto& p : w.part) p = S::set(x);
    return w;
  }
  // body(vector, offset of its first lane)
  template <typename Body>
  void each(const Body& body) {
    for (int i = 0; i < kParts; ++i) body(part[i], i * S::kFloats);
  }
  float sum() {
    for (int half = kParts / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) part[i] = S::add(part[i], part[i + half]);
    }
    return S::sum(part[0]);
  }
};

// body(i) at every 16th place of [0, n), then tail(i) for each of the rest.
template <typename Body, typename Tail>
inline void for_each_16(int64_t n, const Body& body, const Tail& tail) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i);
  for (; i < n; ++i) tail(i);
}

// body(i) for every whole vector of [0, n), tail(i) for each of the rest. For work without sums.
template <typename S, typename Body, typename Tail>
inline void for_each_vector(int64_t n, const Body& body, const Tail& tail) {
  int64_t i = 0;
  for (; i + S::kFloats <= n; i += S::kFloats) body(i);
  for (; i < n; ++i) tail(i);
}

// e^x for x <= 88, relative error below 2e-7; e^-87 for anything below. NaN stays NaN.
// 2^n * P(r) with n = round(x log2 e), |r| <= ln2 / 2, P the Taylor polynomial of degree 7.
template <typename S>
inline typename S::F exponential(typename S::F x) {
  using F = typename S::F;
  // The constant comes first: where x is NaN, min and max return their second operand.
  x = S::max(S::set(-87.0f), S::min(S::set(88.0f), x));
  const typename S::I n = S::round_to_int(S::mul(x, S::set(1.44269504f)));
  const F turns = S::to_float(n);
  F r = S::fma(turns, S::set(-0.693359375f), x);  // ln 2 in two parts: the first has few bits
  r = S::fma(turns, S::set(2.12194440e-4f), r);
  F p = S::set(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = S::fma(p, r, S::set(c));
  }
  return S::mul(p, S::as_float(S::exponent_of_two(n)));
}

template <typename S>
inline float exponential_of(float x) {
  float lanes[S::kFloats];
  S::store_f(lanes, exponential<S>(S::set(x)));
  return lanes[0];
}

template <typename S>
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  using F = typename S::F;
  auto squares = Wide<S>::set(0);
  float rest = 0;
  for_each_16(
      n,
      [&](int64_t i) {
        squares.each([&](F& sum, int lane) {
          const F v = S::load_f(x + i + lane);
          sum = S::fma(v, v, sum);
        });
      },
      [&](int64_t i) { rest += x[i] * x[i]; });
  const float mean = (squares.sum() + rest) / static_cast<float>(n);
  const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F normed = S::mul(S::load_f(x + i), S::set(inverse));
        S::store_f(out + i, S::mul(normed, S::load_f(weight + i)));
      },
      [&](int64_t i) { out[i] = x[i] * inverse * weight[i]; });
}

template <typename S>
void silu_multiply(float* gate, const float* up, int64_t n) {
  using F = typename S::F;
  const F one = S::set(1);
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F g = S::load_f(gate + i);
        const F e = exponential<S>(S::sub(S::set(0), g));
        S::store_f(gate + i, S::mul(S::div(g, S::add(one, e)), S::load_f(up + i)));
      },
      [&](int64_t i) { gate[i] = gate[i] / (1 + exponential_of<S>(0 - gate[i])) * up[i]; });
}

// gelu(g) = g / (1 + e^-u), u = 2 sqrt(2 / pi) (g + 0.044715 g^3): GELU's approximation by tanh.
template <typename S>
void gelu_tanh_multiply(float* gate, const float* up, int64_t n) {
  using F = typename S::F;
  constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;
  const F one = S::set(1);
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F g = S::load_f(gate + i);
        const F slope = S::fma(S::mul(g, g), S::set(kCubic), S::set(kLinear));
        const F e = exponential<S>(S::sub(S::set(0), S::mul(g, slope)));
        S::store_f(gate + i, S::mul(S::div(g, S::add(one, e)), S::load_f(up + i)));
      },
      [&](int64_t i) {
        const float g = gate[i], slope = __builtin_fmaf(g * g, kCubic, kLinear);
        gate[i] = g / (1 + exponential_of<S>(0 - g * slope)) * up[i];
      });
}

template <typename S>
void relu2_multiply(float* gate, const float* up, int64_t n) {
  using F = typename S::F;
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F g = S::max(S::set(0), S::load_f(gate + i));  // NaN stays NaN, as in exponential
        S::store_f(gate + i, S::mul(S::mul(g, g), S::load_f(up + i)));
      },
      [&](int64_t i) {
        const float g = gate[i] < 0 ? 0 : gate[i];
        gate[i] = g * g * up[i];
      });
}

// cap * tanh(x / cap), tanh(y) = 1 - 2 / (e^2y + 1).
template <typename S>
void soft_cap(float* x, int64_t n, float cap) {
  using F = typename S::F;
  const F one = S::set(1), two = S::set(2);
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F e = exponential<S>(S::mul(two, S::div(S::load_f(x + i), S::set(cap))));
        S::store_f(x + i, S::mul(S::set(cap), S::sub(one, S::div(two, S::add(e, one)))));
      },
      [&](int64_t i) { x[i] = cap * (1 - 2 / (exponential_of<S>(2 * (x[i] / cap)) + 1)); });
}

template <typename S>
void add(float* x, const float* y, int64_t n) {
  for_each_vector<S>(
      n, [&](int64_t i) { S::store_f(x + i, S::add(S::load_f(x + i), S::load_f(y + i))); },
      [&](int64_t i) { x[i] += y[i]; });
}

template <typename S>
float max_abs(const float* x, int64_t n) {
  using F = typename S::F;
  F largest = S::set(0);
  float rest = 0;
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F value = S::load_f(x + i);
        largest = S::max(largest, S::max(value, S::sub(S::set(0), value)));
      },
      [&](int64_t i) { rest = __builtin_fabsf(x[i]) > rest ? __builtin_fabsf(x[i]) : rest; });
  const float of_vectors = S::largest(largest);
  return of_vectors > rest ? of_vectors : rest;
}

// The sum of e^(x[i] - largest).
template <typename S>
float sum_exponentials(const float* x, int64_t n, float largest) {
  using F = typename S::F;
  auto sums = Wide<S>::set(0);
  float rest = 0;
  for_each_16(
      n,
      [&](int64_t i) {
        sums.each([&](F& sum, int lane) {
          sum = S::add(sum, exponential<S>(S::sub(S::load_f(x + i + lane), S::set(largest))));
        });
      },
      [&](int64_t i) { rest += exponential_of<S>(x[i] - largest); });
  return sums.sum() + rest;
}
