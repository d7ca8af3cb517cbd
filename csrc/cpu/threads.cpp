// A pool that starts a thread when one is first needed, and keeps it.
//
// Context: a 64 KiB chunk's row is coded in 70 us; starting and joining a thread takes 50. Choice: helpers
// stay, look for the next call for 50 us and then sleep. Rejected: OpenMP (its runtime would run beside
// Torch's; breaks after fork). Cost: 50 us of a core after each threaded call.
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
constexpr int kThreadsMax = 64;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `happened` became true within kLookFor.
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

// Each thread has a range of pieces, and takes from the others' when its own is done: the data of the last
// call on the same memory is still in its core's cache. (With pieces taken first come, first served, two
// threads were no faster than one.)
struct Job {
    void (*work)(void*, size_t);
    void* context;
    size_t pieces;
    int threads;
    std::atomic<size_t> taken[kThreadsMax] = {};

    void run(int thread) {
        for (int i = 0; i < threads; ++i) run_range((thread + i) % threads);
    }

  private:
    void run_range(int thread) {
        const size_t from = first_of(thread), size = first_of(thread + 1) - from;
        for (size_t k; (k = taken[thread].fetch_add(1, std::memory_order_relaxed)) < size;)
            work(context, from + k);
    }
    size_t first_of(int thread) const {
        return pieces * static_cast<size_t>(thread) / static_cast<size_t>(threads);
    }
};

// Awake helpers join and leave without a lock: two that end at once would sleep for it, which takes a tenth
// as long as the work.
class Pool {
  public:
    void share(Job& job) {
        // One job at a time: a second caller finds the cores busy anyway.
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (!only) {
            job.run(0);
            return;
        }
        start(job.threads - 1);
        job_.store(&job);
        posted_.fetch_add(1);
        if (sleeping_.load() != 0) {
            std::lock_guard<std::mutex>{mutex_};  // a thread that saw no job posted is in wait() by now
            wake_.notify_all();
        }
        job.run(0);
        job_.store(nullptr);  // a helper that joins from now on finds nothing
        const auto all_left = [this] { return working_.load() == 0; };
        while (!look_for(all_left)) std::this_thread::sleep_for(kLookFor);  // one was interrupted
    }

  private:
    void start(int helpers) {
        for (; helpers_ < helpers; ++helpers_) {
            try {
                std::thread([this, thread = helpers_ + 1] { help(thread); }).detach();
            } catch (const std::system_error&) {
                return;  // the caller and the existing helpers do the work
            }
        }
    }

    [[noreturn]] void help(int thread) {
        for (uint64_t seen = 0;;) {
            const auto posted = [&] { return posted_.load() != seen; };
            if (!look_for(posted)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, posted);
                sleeping_.fetch_sub(1);
            }
            seen = posted_.load();
            working_.fetch_add(1);  // before looking: the caller withdraws the job and then looks here
            Job* job = job_.load();
            if (job && thread < job->threads) job->run(thread);
            working_.fetch_sub(1);
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    int helpers_ = 0;
    std::atomic<Job*> job_{nullptr};
    std::atomic<int> working_{0}, sleeping_{0};
    std::atomic<uint64_t> posted_{0};
};

// Never destroyed: helpers may outlive main(). A forked child has none of its parent's threads and can't
// trust its locks, so it gets a new pool.
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
    const size_t useful = std::min<size_t>(pieces, kThreadsMax);
    Job job{work, context, pieces, static_cast<int>(std::min<size_t>(static_cast<size_t>(threads), useful))};
    if (job.threads < 2) {
        job.run(0);
    } else {
        pool().share(job);
    }
}

}  // namespace hyperspace
