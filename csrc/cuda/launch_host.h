// The host build of the device code: the part that only tests use.
#pragma once

namespace hyperspace::cuda {

// The order in which a block's threads run a phase, and the blocks of a grid run. A kernel that lacks a
// barrier, or whose blocks write the same bytes, gives different results.
enum class Order { kForward, kBackward };
extern thread_local Order thread_order;

}  // namespace hyperspace::cuda
