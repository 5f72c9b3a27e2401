// How many threads to share work among, while others use the machine too.
#pragma once

#include <omp.h>

namespace gptq {

// Threads that are worth asking for now, of those that the caller may use.
//
// A region ends when its last thread does. One that the system has put aside, in favour of another process, holds up all
// for milliseconds, in regions of microseconds. Whoever had to wait that long goes on with half as many, and tries more
// after a while, the later the more often it was in vain.
int team_size(int threads);

// Measures how long the first thread of a region waits for the others.
class Watch {
  public:
    explicit Watch(int team) : team_(team), start_(omp_get_wtime()) {}
    // Called by every thread, around a barrier or before the end of the region.
    void wait() {
        if (omp_get_thread_num() == 0) since_ = omp_get_wtime();
    }
    void go_on() {
        if (omp_get_thread_num() == 0) waited_ += omp_get_wtime() - since_;
    }
    // After the region.
    ~Watch();

  private:
    int team_;
    double start_, since_ = 0, waited_ = 0;
};

}  // namespace gptq
