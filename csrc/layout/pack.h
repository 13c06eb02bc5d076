#pragma once

#include <cstdint>

#include "layout/layout.h"

namespace tmac {

// Bytes of one constant (a scale or an offset) for each row of a tile.
constexpr int64_t kTileConstantBytes = 2 * kTileRows;

// As `pack`, but for the zeros behind the tiles: tiles [n_tiles * tile_bytes].
void pack_tiles(const LinearSpec& spec, const uint8_t* codes, const uint16_t* scales,
                const uint16_t* offsets, uint8_t* tiles);

}  // namespace tmac
