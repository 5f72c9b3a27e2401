// Rows of activations, shared among threads.
#pragma once

#include <algorithm>

#include "block.h"
#include "crew.h"
#include "gemm.h"

namespace gptq {

// Below this many elements waking a second thread costs more than it saves; and telling one that stands by.
constexpr int64_t kSerialElements = 1 << 15, kSharedElements = 1 << 13;

inline const char* row_of(const void* x, const Rows& shape, int64_t row) {
    return static_cast<const char*>(x) + row * shape.width * size_of(shape.dtype);
}

inline char* row_of(void* x, const Rows& shape, int64_t row) {
    return static_cast<char*>(x) + row * shape.width * size_of(shape.dtype);
}

// share() with as many threads as the `elements` that all touch are worth.
template <class Each>
void share_elements(int count, int64_t elements, int threads, Each each) {
    const bool worth = count > 1 && elements >= (Crew::current() ? kSharedElements : kSerialElements);
    Crew::with(threads, worth, [&] { share(count, worth, each); });
}

// Calls each(rows, first) for parts of so many rows as are done at a time, of which `first` come before the part.
template <class Each>
void in_parts(const Rows& whole, Each each) {
    for (int first = 0; first < whole.rows; first += kRowsAtATime) {
        each(Rows{whole.dtype, std::min(kRowsAtATime, whole.rows - first), whole.width}, first);
    }
}

}  // namespace gptq
