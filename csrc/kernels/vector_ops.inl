// The float work between two matrix products: norm, activation, attention over an fp16 cache.

// Applies body(i) for whole vectors and tail(i) for the rest of [0, n).
template <typename S, typename Body, typename Tail>
inline void for_each_vector(int64_t n, const Body& body, const Tail& tail) {
  int64_t i = 0;
  for (; i + S::kFloats <= n; i += S::kFloats) body(i);
  for (; i < n; ++i) tail(i);
}

// e^x for x <= 88, relative error below 2e-7; 0 below -87. NaN stays NaN.
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

// One value through the vector path, so that a tail rounds like the rest.
template <typename S>
inline float exponential_of(float x) {
  float lanes[S::kFloats];
  S::store_f(lanes, exponential<S>(S::set(x)));
  return lanes[0];
}

template <typename S>
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  using F = typename S::F;
  F squares = S::set(0);
  float rest = 0;
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        const F v = S::load_f(x + i);
        squares = S::fma(v, v, squares);
      },
      [&](int64_t i) { rest += x[i] * x[i]; });
  const float mean = (S::sum(squares) + rest) / static_cast<float>(n);
  const float inverse = 1.0f / __builtin_sqrtf(mean + eps);
  for_each_vector<S>(
      n,
      [&](int64_t i) {
        S::store_f(out + i, S::mul(S::mul(S::load_f(x + i), S::set(inverse)), S::load_f(weight + i)));
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
      [&](int64_t i) { gate[i] = gate[i] / (1 + exponential_of<S>(-gate[i])) * up[i]; });
}

template <typename S>
void add(float* x, const float* y, int64_t n) {
  for_each_vector<S>(
      n, [&](int64_t i) { S::store_f(x + i, S::add(S::load_f(x + i), S::load_f(y + i))); },
      [&](int64_t i) { x[i] += y[i]; });
}

template <typename S>
void to_half(const float* x, uint16_t* out, int64_t n) {
  for_each_vector<S>(
      n, [&](int64_t i) { S::store_half(out + i, S::load_f(x + i)); },
      [&](int64_t i) { out[i] = float_to_half(x[i]); });
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

template <typename S>
void attend(const float* q, const uint16_t* keys, const uint16_t* values, int64_t n,
            int64_t head_dim, float scale, float* scores, float* out) {
  using F = typename S::F;
  float largest = -__FLT_MAX__;
  bool nan = false;
  for (int64_t t = 0; t < n; ++t) {
    const uint16_t* key = keys + t * head_dim;
    F products = S::set(0);
    float rest = 0;
    for_each_vector<S>(
        head_dim,
        [&](int64_t i) { products = S::fma(S::load_f(q + i), S::load_half(key + i), products); },
        [&](int64_t i) { rest += q[i] * half_to_float(key[i]); });
    const float score = scale * (S::sum(products) + rest);
    scores[t] = score;
    largest = score > largest ? score : largest;
    nan = nan || score != score;
  }
  if (nan) largest = __builtin_nanf("");
  F sums = S::set(0);
  float total = 0;
  for_each_vector<S>(
      n,
      [&](int64_t t) {
        const F e = exponential<S>(S::sub(S::load_f(scores + t), S::set(largest)));
        S::store_f(scores + t, e);
        sums = S::add(sums, e);
      },
      [&](int64_t t) { total += scores[t] = exponential_of<S>(scores[t] - largest); });
  total += S::sum(sums);

  const F share = S::set(1.0f / total);
  // `count` vectors of the output at a time, kept in registers.
  const auto weigh_values = [&](auto count, int64_t at) {
    constexpr int kCount = decltype(count)::value;
    F acc[kCount];
    for (F& a : acc) a = S::set(0);
    for (int64_t t = 0; t < n; ++t) {
      const F weight = S::set(scores[t]);
      for (int i = 0; i < kCount; ++i) {
        const uint16_t* value = values + t * head_dim + at + i * S::kFloats;
        acc[i] = S::fma(weight, S::load_half(value), acc[i]);
      }
    }
    for (int i = 0; i < kCount; ++i) S::store_f(out + at + i * S::kFloats, S::mul(acc[i], share));
  };
  int64_t at = 0;
  for (; at + 4 * S::kFloats <= head_dim; at += 4 * S::kFloats) weigh_values(Count<4>{}, at);
  for (; at + S::kFloats <= head_dim; at += S::kFloats) weigh_values(Count<1>{}, at);
  for (; at < head_dim; ++at) {
    float acc = 0;
    for (int64_t t = 0; t < n; ++t) acc += scores[t] * half_to_float(values[t * head_dim + at]);
    out[at] = acc / total;
  }
}
