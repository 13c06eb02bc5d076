// Writing keys and values into a cache, and the form of queries. In int8 and int4 the vectors of a
// head are rotated first (by a Walsh-Hadamard matrix, its own inverse), which spreads outliers over
// all dimensions; the products of queries and keys do not change by it, values are rotated back.

// A group of x as halves.
template <typename S>
inline void to_half(const float* x, uint16_t* out) {
  for (int64_t i = 0; i < kKvGroup; i += S::kFloats) S::store_half(out + i, S::load_f(x + i));
}

// In runs of the largest power of two that divides n.
inline void rotate(float* x, int64_t n) {
  const int64_t run = n & -n;
  for (int64_t half = 1; half < run; half *= 2) {
    for (int64_t i = 0; i < n; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
  const float norm = 1.0f / __builtin_sqrtf(static_cast<float>(run));
  for (int64_t i = 0; i < n; ++i) x[i] *= norm;
}

// x [head_dim] -> out [dims], rotated where the type asks for it.
inline void pad(const KvShape& shape, KvType type, const float* x, float* out) {
  for (int64_t i = 0; i < shape.head_dim; ++i) out[i] = x[i];
  for (int64_t i = shape.head_dim; i < shape.dims(); ++i) out[i] = 0;
  if (kv_scaled(type)) rotate(out, shape.head_dim);
}

// The numbers that the codes of a group stand for: `scale` apart, from `low` on.
struct Range {
  uint16_t scale, low;  // binary16
};

// Codes of S::kFloats numbers, as floats.
template <typename S, typename Kv>
inline typename S::F codes_of(const float* x, float scale, float low) {
  using F = typename S::F;
  const F inverse = S::set(scale > 0 ? 1 / scale : 0);
  const F code = S::mul(S::sub(S::load_f(x), S::set(low)), inverse);
  return S::to_float(S::round_to_int(S::max(S::set(0), S::min(S::set(Kv::kMost), code))));
}

// The squared error of a group in that range.
template <typename S, typename Kv>
inline float group_error(const float* x, const Range& range) {
  using F = typename S::F;
  const float scale = half_to_float(range.scale), low = half_to_float(range.low);
  auto sums = Wide<S>::set(0);
  for (int64_t i = 0; i < kKvGroup; i += kLanes) {
    sums.each([&](F& sum, int lane) {
      const F code = codes_of<S, Kv>(x + i + lane, scale, low);
      const F value = S::add(S::mul(code, S::set(scale)), S::set(low));
      const F error = S::sub(S::load_f(x + i + lane), value);
      sum = S::add(sum, S::mul(error, error));
    });
  }
  return sums.sum();
}

// Codes [32] of a group of x, and its range: that of its numbers or, for few bits, the one of some
// narrower ones with the least squared error. What binary16 does not hold makes the scale NaN, and
// the codes whatever a NaN converts to.
template <typename S, typename Kv>
inline Range quantize_group(const float* x, int32_t* codes) {
  bool held = true;
  float lowest = x[0], highest = x[0];
  for (int64_t i = 0; i < kKvGroup; ++i) {
    held = held && __builtin_fabsf(x[i]) <= 65504.0f;
    lowest = x[i] < lowest ? x[i] : lowest;
    highest = x[i] > highest ? x[i] : highest;
  }
  const float middle = 0.5f * (lowest + highest), reach = 0.5f * (highest - lowest);
  const auto narrowed = [&](float share) -> Range {
    return {float_to_half(share * reach * (2 / Kv::kMost)), float_to_half(middle - share * reach)};
  };
  Range best = narrowed(1);
  if (!held) best = {float_to_half(__builtin_nanf("")), 0};
  if constexpr (Kv::kSearched) {
    float least = group_error<S, Kv>(x, best);
    for (const float share : {0.95f, 0.9f, 0.85f, 0.8f, 0.75f}) {
      const Range narrower = narrowed(share);
      const float error = group_error<S, Kv>(x, narrower);
      if (!(error < least)) continue;
      least = error;
      best = narrower;
    }
  }
  const float scale = half_to_float(best.scale), low = half_to_float(best.low);
  for (int64_t i = 0; i < kKvGroup; i += S::kFloats) {
    S::store_i(codes + i, S::round_to_int(codes_of<S, Kv>(x + i, scale, low)));
  }
  return best;
}

// Calls write(group, codes) for the codes of each group of x, and stores their ranges.
template <typename S, typename Write>
inline void quantize(const KvShape& shape, KvType type, const float* x, uint16_t* ranges,
                     int64_t capacity, const Write& write) {
  with_format(type, [&](auto format) {
    using Kv = decltype(format);
    if constexpr (Kv::kScaled) {
      for (int64_t group = 0; group < shape.groups(); ++group) {
        int32_t codes[kKvGroup];
        const Range range = quantize_group<S, Kv>(x + group * kKvGroup, codes);
        ranges[2 * group * capacity] = range.scale;
        ranges[(2 * group + 1) * capacity] = range.low;
        write(group, codes);
      }
    }
  });
}

// x [dims] as the key at `pos` of keys in fp16.
template <typename S>
inline void store_half_key(const KvShape& shape, uint8_t* keys, int64_t pos, const float* x) {
  auto* out = reinterpret_cast<uint16_t*>(keys) + pos / kKeyBlock * kKeyBlock * shape.dims() +
              pos % kKeyBlock;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    uint16_t halves[kKvGroup];
    to_half<S>(x + group * kKvGroup, halves);
    for (int64_t i = 0; i < kKvGroup; ++i) out[(group * kKvGroup + i) * kKeyBlock] = halves[i];
  }
}

template <typename S>
inline void store_half_value(const KvShape& shape, uint8_t* values, int64_t pos, const float* x) {
  auto* out = reinterpret_cast<uint16_t*>(values) + pos * shape.dims();
  for (int64_t i = 0; i < shape.dims(); i += kKvGroup) to_half<S>(x + i, out + i);
}

template <typename S>
void store_key(const KvShape& shape, const KvHead& head, int64_t pos, const float* k,
               float* scratch) {
  pad(shape, shape.keys, k, scratch);
  if (!kv_scaled(shape.keys)) return store_half_key<S>(shape, head.keys, pos, scratch);
  store_half_key<S>(shape, head.near_keys, pos % kNear, scratch);
  const int64_t lane = pos % kKeyBlock;
  uint8_t* keys = head.keys + pos / kKeyBlock * kKeyBlock * shape.vector_bytes(shape.keys);
  quantize<S>(shape, shape.keys, scratch, head.key_ranges + pos, head.capacity,
              [&](int64_t group, const int32_t* codes) {
                const int per_byte = 8 / kv_bits(shape.keys);
                uint8_t* out = keys + group * (kKvGroup / per_byte) * kKeyBlock + lane;
                for (int64_t i = 0; i < kKvGroup; i += per_byte) {
                  const int high = per_byte == 2 ? static_cast<uint8_t>(codes[i + 1]) << 4 : 0;
                  out[i / per_byte * kKeyBlock] = static_cast<uint8_t>(codes[i] | high);
                }
              });
}

template <typename S>
void store_value(const KvShape& shape, const KvHead& head, int64_t pos, const float* v,
                 float* scratch) {
  pad(shape, shape.values, v, scratch);
  if (!kv_scaled(shape.values)) return store_half_value<S>(shape, head.values, pos, scratch);
  store_half_value<S>(shape, head.near_values, pos % kNear, scratch);
  uint8_t* out = head.values + pos * shape.vector_bytes(shape.values);
  quantize<S>(shape, shape.values, scratch, head.value_ranges + pos, head.capacity,
              [&](int64_t group, const int32_t* codes) {
                const int64_t bytes = kKvGroup * kv_bits(shape.values) / 8;
                for (int64_t i = 0; i < bytes; ++i) {
                  const int high =
                      bytes < kKvGroup ? static_cast<uint8_t>(codes[i + bytes]) << 4 : 0;
                  out[group * bytes + i] = static_cast<uint8_t>(codes[i] | high);
                }
              });
}

// Behind the numbers stands the sum of each group, with which a key's lowest number is multiplied.
template <typename S>
void prepare_query(const KvShape& shape, const float* q, float* out) {
  using F = typename S::F;
  pad(shape, shape.keys, q, out);
  if (!kv_scaled(shape.keys)) return;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    auto sums = Wide<S>::set(0);
    for (int64_t i = 0; i < kKvGroup; i += kLanes) {
      sums.each([&](F& sum, int lane) {
        sum = S::add(sum, S::load_f(out + group * kKvGroup + i + lane));
      });
    }
    out[shape.dims() + group] = sums.sum();
  }
}
