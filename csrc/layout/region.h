#pragma once

#include "layout/layout.h"

namespace tmac {

// Activations are scaled by regions: weights, in chunk order, that share one unit. Everything that
// is summed within a region is an integer, so that all kernels get the same sum.
constexpr int kRegionWeights = 64;
constexpr int kRegionChunks = kRegionWeights / kChunkWeights;

// True if a group of the matrix ends within a region.
inline bool cuts_regions(const LinearSpec& spec) {
  return spec.n_chunks() % kRegionChunks != 0 ||
         (spec.n_groups() > 1 && spec.group_chunks() % kRegionChunks != 0);
}

}  // namespace tmac
