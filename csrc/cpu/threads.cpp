// A pool that starts a thread when one is first asked for, and keeps it.
//
// Context: a 64 KiB chunk's row is coded in 70 us; starting and joining a thread takes 50. Choice: helpers
// stay, look for the next call for 50 us and then sleep. Rejected: OpenMP (its run time beside Torch's own;
// breaks after fork). Cost: 50 us of a core after each threaded call.
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace hyperspace {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kLookFor = std::chrono::microseconds(50);
constexpr int kHelpersMax = 63;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `happened` did within kLookFor.
template <class Condition>
bool look_for(Condition happened) {
    for (const auto until = Clock::now() + kLookFor; Clock::now() < until;) {
        for (int i = 0; i < 32; ++i) {
            if (happened()) return true;
            relax();
        }
    }
    return happened();
}

struct Job {
    void (*work)(void*, size_t);
    void* context;
    size_t pieces;
    std::atomic<size_t> next{0};

    void run() {
        for (size_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            work(context, piece);
        }
    }
};

class Pool {
  public:
    void share(int helpers, Job& job) {
        // One job at a time: a second caller finds the cores busy anyway.
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (!only) {
            job.run();
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            start(helpers);
            job_ = &job;
            places_ = helpers;
            posted_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        job.run();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = nullptr;  // nobody joins any more
        }
        const auto all_left = [this] { return working_.load(std::memory_order_acquire) == 0; };
        if (look_for(all_left)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        left_.wait(lock, all_left);
    }

  private:
    void start(int helpers) {
        for (; helpers_ < std::min(helpers, kHelpersMax); ++helpers_) {
            try {
                std::thread([this] { help(); }).detach();
            } catch (const std::system_error&) {
                return;  // the caller and those that there are do the work
            }
        }
    }

    [[noreturn]] void help() {
        for (uint64_t seen = 0;;) {
            const auto posted = [&] { return posted_.load(std::memory_order_acquire) != seen; };
            look_for(posted);
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, posted);
            seen = posted_.load(std::memory_order_relaxed);
            if (!job_ || places_ == 0) continue;
            --places_;
            Job& job = *job_;
            working_.fetch_add(1, std::memory_order_relaxed);
            lock.unlock();
            job.run();
            lock.lock();
            working_.fetch_sub(1, std::memory_order_release);
            lock.unlock();
            left_.notify_all();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, left_;
    Job* job_ = nullptr;
    int places_ = 0, helpers_ = 0;
    std::atomic<int> working_{0};
    std::atomic<uint64_t> posted_{0};
};

// Never destroyed: helpers may outlive main(). A forked child has none of its parent's threads and can't
// trust its locks, so it gets a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    static_cast<void>(registered);
    Pool* current = the_pool.load(std::memory_order_acquire);
    if (current) return *current;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

}  // namespace

void share_pieces(int threads, size_t pieces, void (*work)(void*, size_t), void* context) {
    Job job{work, context, pieces};
    const int helpers = static_cast<int>(std::min<size_t>(static_cast<size_t>(threads), pieces)) - 1;
    if (helpers < 1) {
        job.run();
    } else {
        pool().share(helpers, job);
    }
}

}  // namespace hyperspace
