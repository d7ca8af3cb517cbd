// Helpers that share one call's columns with the thread that makes it.
#pragma once

#include <cstddef>

namespace hyperspace {

// Calls work(context, 0) .. work(context, pieces - 1), each once, on up to `threads` threads, and returns
// when all are done. The caller works too and never waits for a helper to come: with none (another call has
// them, this is a forked child's first call, the system is out of threads) it does everything itself.
void share_pieces(int threads, size_t pieces, void (*work)(void* context, size_t piece), void* context);

// Calls work(from, to) for column ranges that together are 0 .. bytes; all but the last end at a multiple of
// `align`. One thread gets them all in one call.
template <class Work>
void share_columns(int threads, size_t bytes, size_t align, Work work) {
    // Four pieces a thread: whoever was late or interrupted delays the others by a fraction.
    constexpr size_t kPiecesPerThread = 4, kPieceMin = 2048;
    size_t piece_bytes = threads <= 1 ? bytes : bytes / (static_cast<size_t>(threads) * kPiecesPerThread);
    if (piece_bytes < kPieceMin) piece_bytes = kPieceMin;
    piece_bytes = (piece_bytes + align - 1) / align * align;
    if (threads <= 1 || piece_bytes >= bytes) {
        work(size_t{0}, bytes);
        return;
    }
    struct Context {
        Work& work;
        size_t bytes, piece_bytes;
    } context{work, bytes, piece_bytes};
    share_pieces(
        threads, (bytes + piece_bytes - 1) / piece_bytes,
        [](void* opaque, size_t piece) {
            const Context& c = *static_cast<Context*>(opaque);
            const size_t from = piece * c.piece_bytes, to = from + c.piece_bytes;
            c.work(from, to < c.bytes ? to : c.bytes);
        },
        &context);
}

}  // namespace hyperspace
