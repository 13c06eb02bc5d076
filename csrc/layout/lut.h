#pragma once

#include <cstdint>

#include "layout/region.h"

namespace tmac {

// A table holds the signed sums of 4 activations: entry e is sum_i (bit i of e ? x : -x)[i].
constexpr int kTableEntries = 16;
constexpr int kRegionTables = kRegionWeights / kTableWeights;
// Half a region: the tables that kernels can look up side by side.
constexpr int kHalfChunks = 4;
constexpr int kHalfTables = 2 * kHalfChunks;
constexpr int kRegionHalves = kRegionChunks / kHalfChunks;
constexpr int kMultiplierWords = 16;  // that belong to half a region

// Tables of 3 activations for ternary weights: entry j is t0 x0 + t1 x1 + t2 x2 of the t in -1, 0,
// 1 with t0 + 3 t1 + 9 t2 = j; those of negative numbers are opposite. Each instruction set takes
// them in its own order, with or without the opposite ones behind. A region of them takes the place
// of up to 4 others.
constexpr int kTernaryMagnitudes = 13;
constexpr int kTernaryRegionTables = kTernaryRegionChunks * kTernaryChunkTables;
constexpr int kTernaryMostEntries = 32;

constexpr int ternary_places(int table_entries) {
  return kTernaryRegionTables * table_entries / (kRegionTables * kTableEntries);
}
constexpr int kTernaryMostPlaces = ternary_places(kTernaryMostEntries);

// The integers of a region of ternary weights, where an instruction set multiplies those of
// Tables::kExact8 and has no tables of them.
constexpr int kTernaryChunkQuads = kTernaryChunkWeights / 4;
struct TernaryIntegers {
  // [chunks][6][4]: weight i of the even tables, then of the odd ones, for i = 0, 1, 2.
  alignas(64) int8_t q[kTernaryRegionChunks][kTernaryChunkWeights];
  int32_t sum[kTernaryRegionChunks];         // of the integers of each chunk
  int32_t not_finite[kTernaryRegionChunks];  // 1 in a region with a NaN or an infinity
};
static_assert(sizeof(TernaryIntegers) == kRegionHalves * kMultiplierWords * sizeof(uint32_t));

// What activations are rounded to. Products of many tokens may do without tables (layout/rows.h):
// there kInt8 means integers of 8 bits, and the other two the same integers as here.
//
// A region has one unit; each of its tables has a multiplier, so that its steps of `multiplier`
// units follow its own largest entry and not the region's.
enum class Tables : uint8_t {
  // int8 entries: round(signed sum / step), |entry| <= 127. The largest entries of a region's
  // tables add up to at most kLimitSum * 127 units, each half a step more by rounding, so that its
  // sums of two weighed planes fit int16: 3 * (85 * 127 + 101 / 2) < 32767.
  // Ternary: activations are rounded to 1/128 of a step, their sums to steps; kTernaryLimitSum *
  // 127, and for rounding 0.512 * (256 + 32) units, fit int16: 32660.
  kInt8,
  // Activations rounded to 14 bits (|x| <= 8128 steps), their signed sums kept exactly in two int8
  // tables, low then high: sum = 255 * high + low. Base 255 makes both symmetric:
  // |sum| <= 4 * 8128 = 32512 = 255 * 127 + 127. Multipliers 1 to 4: |x| <= 32512 units.
  kExact,
  // The same with activations of 8 bits (|x| <= 127 units), one unit for the whole token and no
  // multipliers: the integer arithmetic that BitNet is trained with.
  kExact8,
};
constexpr int kTableKinds = 3;

constexpr int kInt8Max = 127;
constexpr int kLimitSum = 85;
constexpr int kMaxMultiplier = 15;  // times 8, the weight of a plane, it fits int8
constexpr int kTernaryLimitSum = 256;
constexpr int kTernaryMaxMultiplier = 127;
constexpr int kTernaryStepBits = 7;
constexpr int kExactMax = 8128;
constexpr int kExactMultiplier = 4;
constexpr int kExactBase = 255;

constexpr int table_parts(Tables tables) { return tables == Tables::kInt8 ? 1 : 2; }
constexpr int row_parts(Tables tables) { return tables == Tables::kExact ? 2 : 1; }

// The tables of a region of activations, in the order in which the kernels read them.
struct LutView {
  // [halves][parts][nibble][chunk][16]: for each half a region the parts of its tables, of a part
  // first the tables that the low nibbles of its 4 chunks index, then those of the high nibbles.
  // Ternary: [chunks][parts][tables][entries].
  int8_t* entries;
  // [halves][kMultiplierWords] the tables' multipliers times the weights of bit planes, arranged as
  // the active instruction set multiplies with them. Ternary: [chunks], those of the tables; or
  // TernaryIntegers.
  uint32_t* multipliers;
  float* half_unit;         // half the unit of the sums: u = (2^b - 1)/2 + sum 2^(p-1) beta_p
  float* chunk_sum;         // [chunks] sum of x; not for ternary
  float* half_sum;          // [halves] the chunks' sums, added up; likewise
  float* region_sum;        // sum of x; likewise
  const float* token_unit;  // factor of the product: the activations' unit where they have only one

  LutView from_region(int64_t region, int parts) const {
    return {entries + region * kRegionTables * parts * kTableEntries,
            multipliers + region * kRegionHalves * kMultiplierWords,
            half_unit + region,
            chunk_sum + region * kRegionChunks,
            half_sum + region * kRegionHalves,
            region_sum + region,
            token_unit};
  }
};

}  // namespace tmac
