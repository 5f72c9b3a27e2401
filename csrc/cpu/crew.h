// Threads that stay together for many short pieces of work.
//
// A parallel region of OpenMP costs microseconds to begin and to end, as much as a product of a small layer. Here one
// region is begun, and its threads look out for jobs that the first of them posts: a fraction of a microsecond for
// each. And nobody waits for a thread that the system has put aside before it took a task.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "team.h"

namespace gptq {

// Below this many multiplications waking a second thread costs more than it saves; and telling one that stands by.
constexpr int64_t kSerialWork = 1 << 17, kSharedWork = 1 << 15;

class Crew {
  public:
    // The crew whose first thread the caller is, or null.
    static Crew*& current() {
        thread_local Crew* crew = nullptr;
        return crew;
    }

    // By the first thread: each(i) for i < count, by every thread that comes in time.
    template <class Each>
    void run(int count, Each& each) {
        each_ = &each;
        call_ = [](void* found, int i) { (*static_cast<Each*>(found))(i); };
        for (int i = 0; i < size_; ++i) {
            ranges_[i].next.store(int(int64_t(count) * i / size_), std::memory_order_relaxed);
            ranges_[i].end = int(int64_t(count) * (i + 1) / size_);
        }
        const unsigned open = state_.load() + 1;
        state_.store(open);
        work(0);
        state_.store(open + 1);
        watch_.wait();
        for (int tries = 0; inside_.load(); ++tries) relax(tries);
        watch_.go_on();
    }

    // Calls body() while further threads stand by, `threads` in all; on the caller's own if those are one, if they
    // stand by already, or if it is not worth more. What body() throws arrives at the caller: no exception may leave a
    // parallel region.
    template <class Body>
    static void with(int threads, bool worth, Body body) {
        const int size = current() || !worth ? 1 : team_size(threads);
        if (size == 1) return body();
        Watch watch(size);
        Crew crew(size, watch);
        std::exception_ptr error;
#pragma omp parallel num_threads(size)
        {
            if (omp_get_thread_num() == 0) {
                current() = &crew;
                try {
                    body();
                } catch (...) {
                    error = std::current_exception();
                }
                current() = nullptr;
                crew.ended_.store(true);
                watch.end(crew.jobs());
            } else {
                crew.stand_by(omp_get_thread_num());
            }
        }
        if (error) std::rethrow_exception(error);
    }

  private:
    // Tasks that are a thread's own as long as nobody helps: two cores that count on one number would pass its cache
    // line to and fro, for as long as a task takes.
    struct alignas(64) Range {
        std::atomic<int> next;
        int end;
    };

    Crew(int size, Watch& watch) : size_(size), watch_(watch), ranges_(size) {}

    void work(int thread) {
        for (int k = 0; k < size_; ++k) {
            Range& range = ranges_[(thread + k) % size_];
            for (int i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) call_(each_, i);
        }
    }

    int jobs() const { return int(state_.load() / 2); }

    static void relax(int tries) {
        if (tries < 1000) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        } else {
            std::this_thread::yield();  // perhaps to the thread that is waited for
        }
    }

    void stand_by(int thread) {
        unsigned seen = 0;
        for (int tries = 0; !ended_.load(); ++tries) {
            const unsigned state = state_.load();
            if (state % 2 && state != seen) {
                // The first thread closes a job before it looks who is inside. So whoever sees it open after coming in
                // is waited for.
                inside_.fetch_add(1);
                if (state_.load() == state) work(thread);
                inside_.fetch_sub(1);
                seen = state;
                tries = 0;
            } else {
                relax(tries);
            }
        }
    }

    const int size_;
    Watch& watch_;
    std::vector<Range> ranges_;
    void (*call_)(void*, int) = nullptr;  // these are written while no job is open
    void* each_ = nullptr;
    alignas(64) std::atomic<unsigned> state_{0};  // odd: a job is open; half of it: how many there were
    alignas(64) std::atomic<int> inside_{0};      // threads that may be in a job, besides the first
    std::atomic<bool> ended_{false};
};

// Calls each(i) for i < count, shared among the crew if there is one and they are worth it. `each` does not throw.
template <class Each>
void share(int count, bool worth, Each each) {
    Crew* const crew = worth && count > 1 ? Crew::current() : nullptr;
    if (!crew) {
        for (int i = 0; i < count; ++i) each(i);
        return;
    }
    crew->run(count, each);
}

}  // namespace gptq
