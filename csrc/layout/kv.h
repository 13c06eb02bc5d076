#pragma once

#include <cstdint>

#include "core/aligned.h"

namespace tmac {

// How a KV cache stores numbers; docs/attention.md has the bytes.
enum class KvType { kF16, kInt8, kInt4 };
constexpr int kKvTypes = 3;

constexpr int64_t kKvGroup = 32;      // numbers of one vector that share a range
constexpr int64_t kKeyBlock = 16;     // positions whose keys stand together, interleaved
constexpr int64_t kAttendBlock = 64;  // positions whose scores are computed together
constexpr int64_t kAttendPart = 256;  // positions that are added up apart from others
constexpr int64_t kNear = 256;        // the newest positions, in fp16 beside their codes
constexpr int64_t kMostQueries = 32;  // that read keys and values together
constexpr int64_t kStateHead = 16;    // floats of a query's state before its weighted values

constexpr int kv_bits(KvType type) {
  return type == KvType::kF16 ? 16 : type == KvType::kInt8 ? 8 : 4;
}
constexpr bool kv_scaled(KvType type) { return type != KvType::kF16; }

// The vectors of one head, padded with zeros to `dims`.
struct KvShape {
  KvType keys, values;
  int64_t head_dim;

  int64_t dims() const { return round_up(head_dim, kKvGroup); }
  int64_t groups() const { return dims() / kKvGroup; }
  int64_t vector_bytes(KvType type) const { return dims() * kv_bits(type) / 8; }
  // Ranges of a vector: for each group its scale and its lowest number, binary16.
  int64_t ranges(KvType type) const { return kv_scaled(type) ? 2 * groups() : 0; }
  // Bytes of a vector beside its codes, in fp16.
  int64_t near_bytes(KvType type) const { return kv_scaled(type) ? 2 * dims() : 0; }
  // Floats of a query as kernels read it, and of what its attention has added up so far.
  int64_t query_floats() const { return dims() + groups(); }
  int64_t state_floats() const { return kStateHead + dims(); }
};

// Keys and values of one head of one layer. `capacity` positions, a multiple of kAttendBlock:
//   keys [capacity / 16, dims, 16], int4: [capacity / 16, dims / 2, 16], even dims in low nibbles
//   values [capacity, dims], int4: [capacity, groups, 16], a group's second half in high nibbles
//   near_keys, near_values: of position p those at p % kNear, as in a cache of fp16
//   ranges [groups, 2, capacity]: scales, lowest numbers
struct KvHead {
  uint8_t* keys;
  uint8_t* values;
  uint8_t* near_keys;
  uint8_t* near_values;
  uint16_t* key_ranges;
  uint16_t* value_ranges;
  int64_t capacity;
};

// The first position that queries at `pos` read in fp16, be the cache in codes: that of their
// block.
constexpr int64_t near_from(int64_t pos) { return pos / kAttendBlock * kAttendBlock; }

// Queries that read the same keys and values.
struct AttendQueries {
  int64_t count;         // at most kMostQueries
  const float* q;        // [count, query_floats]
  const int64_t* first;  // [count] the first position that each attends to
  const int64_t* end;    // [count] the one after its last
  int64_t near;          // near_from of all of them
  float scale;           // of products
  float softcap;         // scores are softcap * tanh(score / softcap); 0: as they are
};

}  // namespace tmac
