// The ternary tables of one region of 96 activations (layout/lut.h). Their entries are sums of
// int16 numbers: steps of exact tables, or 128ths of those of int8 tables.

// One for each table.
template <typename N>
using TernaryTables = typename N::F[kTernaryRegionTables / N::kFloats];

// The vectors put together by halving, as the lanes of the last one then are.
template <typename N, typename Combine>
inline typename N::F halve(const TernaryTables<N>& tables, const Combine& combine) {
  constexpr int kVectors = kTernaryRegionTables / N::kFloats;
  typename N::F rest[kVectors];
  for (int v = 0; v < kVectors; ++v) rest[v] = tables[v];
  for (int n = kVectors / 2; n > 0; n /= 2) {
    for (int v = 0; v < n; ++v) rest[v] = combine(rest[v], rest[v + n]);
  }
  return rest[0];
}

// As for other tables. All 32 alike leave 8.
inline int largest_ternary_multiplier(float limit, float sum) {
  constexpr int kLeast = kTernaryLimitSum / kTernaryRegionTables;
  const float fits = static_cast<float>(kTernaryLimitSum) * (limit / sum);
  if (!(fits > kLeast)) return kLeast;
  return fits < kTernaryMaxMultiplier ? static_cast<int>(fits) : kTernaryMaxMultiplier;
}

// entries[j - 1] is the sum of number j.
template <typename N, typename W = typename N::W>
inline void ternary_sums(const W (&x)[kTernaryTableWeights], W (&entries)[kTernaryMagnitudes]) {
  const W plus = N::add_words(x[1], x[0]), minus = N::sub_words(x[1], x[0]);
  const W small[] = {x[0], minus, x[1], plus};
  for (int j = 0; j < 4; ++j) {
    entries[j] = small[j];
    entries[7 - j] = N::sub_words(x[2], small[j]);
    entries[9 + j] = N::add_words(x[2], small[j]);
  }
  entries[8] = x[2];
}

template <typename S, typename W = typename S::Narrow::W>
inline void write_ternary(const W (&entries)[kTernaryMagnitudes], int8_t* out,
                          int64_t chunk_bytes) {
  using N = typename S::Narrow;
  W pairs[8];
  pairs[0] = N::join_bytes(N::set_words(0), entries[0]);
  for (int i = 1; i < 7; ++i) pairs[i] = N::join_bytes(entries[2 * i - 1], entries[2 * i]);
  pairs[7] = N::set_words(0);
  S::Trits::write_tables(pairs, out, chunk_bytes);
}

// Splits sums into 255 * high + low.
template <typename N, typename W = typename N::W>
inline void split_exact(W (&entries)[kTernaryMagnitudes], W (&high)[kTernaryMagnitudes]) {
  static_assert(kExactBase == 255);
  // With 0 <= u < 65535, u / 255 = (u + 1 + u / 256) / 256, all rounded down.
  constexpr int kAbove = 128;
  static_assert(kTernaryTableWeights * kExactMax + 127 + 255 * kAbove < 65535 - 255);
  for (int j = 0; j < kTernaryMagnitudes; ++j) {
    const W sum = entries[j];
    const W u = N::add_words(sum, N::set_words(static_cast<int16_t>(127 + 255 * kAbove)));
    const W quotient = N::template shift_words_right_unsigned<8>(N::add_words(
        N::add_words(u, N::set_words(1)), N::template shift_words_right_unsigned<8>(u)));
    high[j] = N::sub_words(quotient, N::set_words(kAbove));
    entries[j] = N::sub_words(N::add_words(sum, high[j]), N::template shift_words_left<8>(high[j]));
  }
}

// x [96]; to_token_units is for Tables::kExact8.
template <typename S>
void build_ternary_region(const float* x, Tables tables, float to_token_units, const LutView& lut) {
  using N = typename S::Narrow;
  using F = typename N::F;
  using W = typename N::W;
  constexpr int kVectors = kTernaryRegionTables / N::kFloats;
  const bool exact = tables != Tables::kInt8;

  F lanes[kVectors][kTernaryTableWeights];
  TernaryTables<N> limits;
  const F zero = N::set(0);
  F poisons = zero;
  for (int v = 0; v < kVectors; ++v) {
    N::deal_threes(x + v * kTernaryTableWeights * N::kFloats, lanes[v]);
    limits[v] = zero;
    for (const F value : lanes[v]) {
      const F size = N::max(value, N::sub(zero, value));
      limits[v] = exact ? N::max(limits[v], size) : N::add(limits[v], size);
      poisons = N::fma(value, zero, poisons);
    }
  }
  const auto larger = [](F a, F b) { return N::max(a, b); };
  const float limit = N::largest(halve<N>(limits, larger)), poison = N::sum(poisons);
  int most = tables == Tables::kExact ? kExactMultiplier : 1;
  if (!exact) {
    const auto plus = [](F a, F b) { return N::add(a, b); };
    most = largest_ternary_multiplier(limit, N::sum(halve<N>(limits, plus)));
  }
  const Scale scale = tables == Tables::kExact8
                          ? choose_token_scale(poison, to_token_units)
                          : choose_scale(limit, poison, most * (exact ? kExactMax : kInt8Max));
  lut.half_unit[0] = 0.5f * scale.unit;

  constexpr int kPartBytes = kTernaryChunkTables * S::Trits::kEntries;
  const int64_t chunk_bytes = table_parts(tables) * kPartBytes;
  constexpr int kChunks = 2 * N::kFloats / kTernaryChunkTables;  // of a vector of int16
  for (int c = 0; c < kTernaryRegionChunks; c += kChunks) {
    const int first = c * kTernaryChunkTables / N::kFloats;
    F multiplier[2], inverse_step[2];
    for (int v = 0; v < 2; ++v) {
      multiplier[v] = N::set(1);
      inverse_step[v] = N::set(scale.to_units);
      if (scale.to_units == 0) {
        for (F& values : lanes[first + v]) values = zero;
      } else if (most > 1) {
        multiplier[v] = multipliers_of<N>(limits[first + v], limit, most);
        inverse_step[v] = N::div(N::set(scale.to_units), multiplier[v]);
      }
      if (!exact) inverse_step[v] = N::mul(inverse_step[v], N::set(1 << kTernaryStepBits));
    }
    const auto words = [&](const auto& of) {
      return N::words(N::round_to_int(of(0)), N::round_to_int(of(1)));
    };
    S::Trits::write_multipliers(words([&](int v) { return multiplier[v]; }),
                                lut.multipliers + c * S::Trits::kWords);
    W values[kTernaryTableWeights], entries[kTernaryMagnitudes];
    for (int i = 0; i < kTernaryTableWeights; ++i) {
      values[i] = words([&](int v) { return N::mul(lanes[first + v][i], inverse_step[v]); });
    }
    ternary_sums<N>(values, entries);
    int8_t* out = lut.entries + c * chunk_bytes;
    if (exact) {
      W high[kTernaryMagnitudes];
      split_exact<N>(entries, high);
      write_ternary<S>(high, out + kPartBytes, chunk_bytes);
    } else {
      constexpr int kHalfStep = 1 << (kTernaryStepBits - 1);
      for (W& entry : entries) {
        entry = N::template shift_words_right<kTernaryStepBits>(
            N::add_words(entry, N::set_words(kHalfStep)));
      }
    }
    write_ternary<S>(entries, out, chunk_bytes);
  }
}
