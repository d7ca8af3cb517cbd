// The host build of the device code: what only tests ask of it.
#pragma once

namespace hyperspace::cuda {

// In which order the threads of a block run a phase, and the blocks of a grid. A kernel that lacks a barrier,
// or whose blocks write the same bytes, gives different results.
enum class Order { kForward, kBackward };
extern thread_local Order thread_order;

}  // namespace hyperspace::cuda
