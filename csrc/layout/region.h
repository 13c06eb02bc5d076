#pragma once

#include "layout/layout.h"

namespace tmac {

// Activations are scaled by regions: weights, in chunk order, that share one unit. Everything that
// is summed within a region is an integer, so that all kernels get the same sum.
constexpr int kRegionWeights = 64;
constexpr int kRegionChunks = kRegionWeights / kChunkWeights;
constexpr int kTernaryRegionChunks = 4;
constexpr int kTernaryRegionWeights = kTernaryRegionChunks * kTernaryChunkWeights;

}  // namespace tmac
