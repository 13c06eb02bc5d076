// One region of one token as integers (layout/rows.h).

constexpr int kRegionQuads = kRegionWeights / kQuadWeights;

// The largest |x| of each quad.
inline void measure_quads(const float* x, float* sizes) {
  for (int j = 0; j < kRegionQuads; ++j) {
    sizes[j] = 0;
    for (int i = 0; i < kQuadWeights; ++i) {
      const float size = __builtin_fabsf(x[j * kQuadWeights + i]);
      sizes[j] = size > sizes[j] ? size : sizes[j];
    }
  }
}

struct LoudQuad {
  int quad;
  float limit, rest;  // the largest |x| of the loud quad and of all others
};

inline LoudQuad find_loud_quad(const float* sizes) {
  LoudQuad loud{0, sizes[0], 0};
  for (int j = 1; j < kRegionQuads; ++j) {
    const float smaller = sizes[j] > loud.limit ? loud.limit : sizes[j];
    loud.rest = smaller > loud.rest ? smaller : loud.rest;
    loud.quad = sizes[j] > loud.limit ? j : loud.quad;
    loud.limit = sizes[j] > loud.limit ? sizes[j] : loud.limit;
  }
  return loud;
}

// Inverse steps and multipliers of exact integers: a quad is a table of 4 (build_lut.inl).
template <typename S>
inline void choose_steps(const float* sizes, float limit, float to_units, float* inverse_step,
                         float* multiplier) {
  for (int j = 0; j < kRegionQuads; j += S::kFloats) {
    const auto chosen = multipliers_of<S>(S::load_f(sizes + j), limit, kExactMultiplier);
    S::store_f(multiplier + j, chosen);
    S::store_f(inverse_step + j, S::div(S::set(to_units), chosen));
  }
}

// x [64]; to_token_units is for Tables::kExact8. Integers go to out [parts][12][64] of the token,
// the other numbers to lane `lane` of `region`.
template <typename S>
void quantize_row(const float* x, Tables tables, float to_token_units, int lane, int8_t* out,
                  RowRegion* region) {
  using F = typename S::F;
  constexpr int64_t kPartStride = kBlockTokens * kRegionWeights;
  F poison = S::set(0);  // NaN where an x is infinite or NaN
  for (int i = 0; i < kRegionWeights; i += S::kFloats) {
    poison = S::fma(S::load_f(x + i), S::set(0), poison);
  }
  alignas(64) float sizes[kRegionQuads];
  measure_quads(x, sizes);
  const LoudQuad loud = find_loud_quad(sizes);
  Scale scale;
  if (tables == Tables::kExact8) {
    scale = choose_token_scale(S::sum(poison), to_token_units);
  } else if (tables == Tables::kExact) {
    scale = choose_scale(loud.limit, S::sum(poison), kExactMultiplier * kExactMax);
  } else {
    const float least = loud.limit * (1.0f / 64);  // 8128 / 127
    scale = choose_scale(loud.rest > least ? loud.rest : least, S::sum(poison), kInt8Max);
  }
  region->half_unit[lane] = 0.5f * scale.unit;

  alignas(64) float inverse_step[kRegionQuads], multiplier[kRegionQuads];
  for (int j = 0; j < kRegionQuads; ++j) {
    inverse_step[j] = scale.to_units;
    multiplier[j] = 1;
  }
  if (tables == Tables::kExact && scale.to_units != 0) {
    choose_steps<S>(sizes, loud.limit, scale.to_units, inverse_step, multiplier);
  }
  alignas(64) float steps[kRegionWeights], units[kRegionWeights];
  for (int i = 0; i < kRegionWeights; ++i) {
    steps[i] = inverse_step[i / kQuadWeights];
    units[i] = multiplier[i / kQuadWeights];
  }
  alignas(64) int32_t q[kRegionWeights] = {};  // zeros also where x is not finite
  for (int i = 0; i < kRegionWeights && scale.to_units != 0; i += S::kFloats) {
    const F whole = S::to_float(S::round_to_int(S::mul(S::load_f(x + i), S::load_f(steps + i))));
    S::store_i(q + i, S::round_to_int(S::mul(whole, S::load_f(units + i))));
  }
  int32_t total = 0;
  for (int c = 0; c < kRegionChunks; ++c) {
    int32_t sum = 0;
    for (int i = 0; i < kChunkWeights; ++i) sum += q[c * kChunkWeights + i];
    region->chunk_sum[c][lane] = sum;
    total += sum;
  }
  region->region_sum[lane] = total;
  region->loud_at[lane] = static_cast<uint32_t>(loud.quad * kQuadCodes);
  int8_t loud_parts[kQuadWeights] = {};
  for (int i = 0; i < kQuadWeights && tables == Tables::kInt8; ++i) {
    int32_t& low = q[loud.quad * kQuadWeights + i];
    loud_parts[i] = static_cast<int8_t>((low + kLoudBase / 2) >> kLoudShift);
    low -= loud_parts[i] * kLoudBase;
  }
  std::memcpy(&region->loud[lane], loud_parts, sizeof(loud_parts));
  if (tables == Tables::kExact) {
    for (int i = 0; i < kRegionWeights; ++i) {
      const int32_t half = q[i] < 0 ? -(kExactBase / 2) : kExactBase / 2;
      const int32_t high = (q[i] + half) / kExactBase;
      out[i] = static_cast<int8_t>(high);
      q[i] -= high * kExactBase;
    }
    out += kPartStride;
  }
  for (int i = 0; i < kRegionWeights; ++i) out[i] = static_cast<int8_t>(q[i]);
}
