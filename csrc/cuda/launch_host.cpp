// Runs the kernel bodies on the CPU: blocks in sequence, their phases in sequence, and a phase's threads in
// sequence.
//
// Shows that indices, bounds, arithmetic and the data passed between phases are right, under ASan and UBSan
// too. Can't show what the hardware adds: its memory model, divergence in a warp, timing, occupancy,
// alignment faults.
#include "launch_host.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "launch.h"

namespace hyperspace::cuda {

thread_local Order thread_order = Order::kForward;

namespace {

template <class Body>
void in_order(uint32_t count, Body body) {
    for (uint32_t i = 0; i < count; ++i) body(thread_order == Order::kForward ? i : count - 1 - i);
}

template <class Kernel>
const char* launch(const typename Kernel::Params& params) {
    static_assert(sizeof params <= 4096, "what a kernel takes by value on every architecture");
    using Shared = typename Kernel::Shared;
    const auto shared = std::make_unique<Shared>();
    in_order(Kernel::blocks(params), [&](uint32_t block) {
        std::memset(static_cast<void*>(shared.get()), 0xA5, sizeof(Shared));  // a block starts with garbage
        unroll<Kernel::kPhases>([&](auto phase) {
            in_order(Kernel::kThreads,
                     [&](uint32_t thread) { Kernel::template run<phase>(params, *shared, block, thread); });
        });
    });
    return nullptr;
}

}  // namespace

const char* why_unavailable() { return nullptr; }
bool is_device_memory(const void* pointer, int) { return pointer != nullptr; }

const char* copy_to_device(const void* from, size_t bytes, int, void** to) {
    *to = std::malloc(bytes);
    if (!*to) return "out of memory";
    std::memcpy(*to, from, bytes);
    return nullptr;
}
void free_on_device(void* pointer, int) { std::free(pointer); }

const char* launch_gather(const CopyParams& params, bool aligned, int, Stream) {
    return (aligned ? launch<Gather<true>> : launch<Gather<false>>)(params);
}
const char* launch_scatter(const CopyParams& params, bool aligned, int, Stream) {
    return (aligned ? launch<Scatter<true>> : launch<Scatter<false>>)(params);
}
const char* launch_encode(const EncodeParams& params, int, Stream) { return launch<Encode>(params); }
const char* launch_decode(const DecodeParams& params, int, Stream) { return launch<Decode>(params); }

}  // namespace hyperspace::cuda
