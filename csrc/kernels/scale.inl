// The units of one region, or of a token.
struct Scale {
  float unit;      // NaN if an activation is not finite
  float to_units;  // 0 if there is nothing to round
};

// `limit` becomes `units` units; poison is not 0 if an activation is not finite.
inline Scale choose_scale(float limit, float poison, int units) {
  const float range = static_cast<float>(units);
  if (!(poison == 0 && limit <= __FLT_MAX__)) return {__builtin_nanf(""), 0};
  if (!(limit >= range * 0x1p-120f)) return {0, 0};  // the inverse would overflow: counts as zero
  return {limit / range, range / limit};
}

// The same for Tables::kExact8, whose unit is left to the end of the product.
inline Scale choose_token_scale(float poison, float to_token_units) {
  if (poison == 0) return {1, to_token_units};
  return {__builtin_nanf(""), 0};
}

// Units in a step of each of some tables, of the largest values given: the smallest multipliers, of
// at most `most`, with which none has more steps than the one with the region's largest, `limit`,
// has (a whole quotient may be rounded up).
template <typename S>
inline typename S::F multipliers_of(typename S::F limits, float limit, int most) {
  const float largest = static_cast<float>(most);
  const auto wanted = S::mul(limits, S::set(largest / limit));
  const auto rounded = S::to_float(S::round_to_int(S::add(wanted, S::set(0.5f))));
  return S::min(S::max(rounded, S::set(1)), S::set(largest));
}
