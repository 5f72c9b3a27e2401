// How many threads to share work among, while others use the machine too.
#pragma once

#include <omp.h>

#include "platform.h"

namespace gptq {

// Threads that are worth asking for now, of those that the caller may use.
//
// A region ends when its last thread does. One that the system has put aside, in favour of another process, holds up
// all for milliseconds, in regions of microseconds. Whoever lost more than half of its time lately goes on with half as
// many. After a pause more are tried, step by step; a step that was in vain is taken back, and the next pause is
// longer.
//
// Callers pass the number of threads that they may use, not that of their tasks: libgomp ends the threads that a region
// does without, and starts them again for the next one.
int team_size(int threads);

// Measures what a region loses: how long its first thread waits for the others, or is put aside itself, be it for one
// of the others that waits for it.
class Watch {
  public:
    explicit Watch(int team) : team_(team), start_(omp_get_wtime()), busy_(thread_seconds()) {}
    // Called by the first thread: around a wait for the others, ...
    void wait() { since_ = omp_get_wtime(); }
    void go_on() { waited_ += omp_get_wtime() - since_; }
    // ... and before the end of the region, with the number of tasks that were done.
    void end(int done) {
        since_ = omp_get_wtime();
        busy_ = thread_seconds() - busy_;
        done_ = done;
    }
    // After the region.
    ~Watch();

  private:
    int team_, done_ = 0;
    double start_, busy_, since_ = 0, waited_ = 0;
};

}  // namespace gptq
