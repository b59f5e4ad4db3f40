// Clusters of cooperative_groups.h, on simt.h.
#pragma once
#include "simt.h"

namespace cooperative_groups {
struct cluster_group {
  static unsigned block_rank() { return SIMT_NOW.block->rank; }
  static unsigned num_blocks() { return unsigned(simt::machine.cluster.size()); }
  static void sync(int line = __builtin_LINE()) { simt::wait(simt::AT_CLUSTER, line); }
  template <class T>
  static T* map_shared_rank(T* mine, unsigned rank) { return simt::shared_of(mine, rank); }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups
