// Helpers that share one call's columns with the calling thread.
#pragma once

#include <cstddef>

namespace hyperspace {

// Calls work(context, 0) .. work(context, pieces - 1), each once, on up to `threads` threads, and returns
// when all are done. The caller works too and never waits for a helper to start: without helpers (another
// call uses them, this is a forked child's first call, the system is out of threads) it does everything
// itself.
void share_pieces(int threads, size_t pieces, void (*work)(void* context, size_t piece), void* context);

// Calls work(from, to) for column ranges that together are 0 .. bytes; all but the last end at a multiple of
// `align`, and their sizes differ by one `align` at most. One thread gets them all in one call.
template <class Work>
void share_columns(int threads, size_t bytes, size_t align, Work work) {
    // Four pieces per thread: a late or interrupted thread delays the others by a fraction only.
    constexpr size_t kPiecesPerThread = 4, kPieceMin = 2048;
    const size_t most = bytes / kPieceMin, wanted = static_cast<size_t>(threads) * kPiecesPerThread;
    const size_t pieces = most < wanted ? most : wanted;
    if (threads <= 1 || pieces < 2) {
        work(size_t{0}, bytes);
        return;
    }
    struct Context {
        Work& work;
        size_t bytes, align, pieces;

        size_t start_of(size_t piece) const {
            return piece == pieces ? bytes : bytes / align * piece / pieces * align;
        }
    } context{work, bytes, align, pieces};
    share_pieces(
        threads, pieces,
        [](void* opaque, size_t piece) {
            const Context& c = *static_cast<Context*>(opaque);
            c.work(c.start_of(piece), c.start_of(piece + 1));
        },
        &context);
}

}  // namespace hyperspace
