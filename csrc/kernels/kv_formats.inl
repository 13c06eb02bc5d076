// Reading keys and values of a cache (layout/kv.h) as floats. Codes u in [0, kMost] stand for
// low + u * scale; what is read here is u.

// out[i] = dimension d + i of the keys of S::kFloats positions from `lane` on, d a multiple of 4;
// `keys` begin at the block. Values: out = a whole group of the vector that begins at `values`.
struct HalfKv {
  static constexpr int kBits = kv_bits(KvType::kF16);
  static constexpr bool kScaled = false;
  template <typename S>
  static void keys(const uint8_t* keys, int64_t d, int64_t lane, typename S::F (&out)[4]) {
    const auto* halves = reinterpret_cast<const uint16_t*>(keys) + d * kKeyBlock + lane;
    for (int i = 0; i < 4; ++i) out[i] = S::load_half(halves + i * kKeyBlock);
  }
  template <typename S>
  static void values(const uint8_t* values, int64_t group,
                     typename S::F (&out)[kKvGroup / S::kFloats]) {
    const auto* halves = reinterpret_cast<const uint16_t*>(values) + group * kKvGroup;
    for (int i = 0; i < kKvGroup / S::kFloats; ++i) out[i] = S::load_half(halves + i * S::kFloats);
  }
};

struct Int8Kv {
  static constexpr int kBits = kv_bits(KvType::kInt8);
  static constexpr bool kScaled = true;
  static constexpr float kMost = 255;
  static constexpr bool kSearched = false;
  template <typename S>
  static void keys(const uint8_t* keys, int64_t d, int64_t lane, typename S::F (&out)[4]) {
    for (int i = 0; i < 4; ++i) {
      out[i] = S::to_float(S::load_bytes(keys + (d + i) * kKeyBlock + lane));
    }
  }
  template <typename S>
  static void values(const uint8_t* values, int64_t group,
                     typename S::F (&out)[kKvGroup / S::kFloats]) {
    for (int i = 0; i < kKvGroup / S::kFloats; ++i) {
      out[i] = S::to_float(S::load_bytes(values + group * kKvGroup + i * S::kFloats));
    }
  }
};

struct Int4Kv {
  static constexpr int kBits = kv_bits(KvType::kInt4);
  static constexpr bool kScaled = true;
  static constexpr float kMost = 15;
  static constexpr bool kSearched = true;
  template <typename S>
  static void nibbles(const uint8_t* p, typename S::F& low, typename S::F& high) {
    const typename S::I both = S::load_bytes(p);
    low = S::to_float(S::and_i(both, S::set_i(15)));
    high = S::to_float(S::template shift_right<4>(both));
  }
  template <typename S>
  static void keys(const uint8_t* keys, int64_t d, int64_t lane, typename S::F (&out)[4]) {
    const uint8_t* at = keys + d / 2 * kKeyBlock + lane;
    nibbles<S>(at, out[0], out[1]);
    nibbles<S>(at + kKeyBlock, out[2], out[3]);
  }
  template <typename S>
  static void values(const uint8_t* values, int64_t group,
                     typename S::F (&out)[kKvGroup / S::kFloats]) {
    constexpr int kHalf = kKvGroup / S::kFloats / 2;
    for (int i = 0; i < kHalf; ++i) {
      nibbles<S>(values + group * (kKvGroup / 2) + i * S::kFloats, out[i], out[kHalf + i]);
    }
  }
};

// visit(format) with the format of the type.
template <typename Visit>
inline void with_format(KvType type, const Visit& visit) {
  if (type == KvType::kF16) visit(HalfKv());
  if (type == KvType::kInt8) visit(Int8Kv());
  if (type == KvType::kInt4) visit(Int4Kv());
}
