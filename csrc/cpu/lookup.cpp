// Shares the rows to look up among threads.
#include "lookup.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "crew.h"
#include "gemm.h"
#include "scratch.h"

namespace gptq {

void look_up(const LookupCall& c, int threads) {
    const auto bad =
        std::find_if(c.ids, c.ids + c.rows, [&](int64_t id) { return id < 0 || id >= c.weight.out_features; });
    if (bad != c.ids + c.rows) {
        throw std::out_of_range("token id " + std::to_string(*bad) + " is not in the vocabulary of " +
                                std::to_string(c.weight.out_features) + "; tokenize with the model's own tokenizer");
    }
    const Level& isa = level();
    const auto one = [&](int row) {
        thread_local Scratch<float> scratch;
        isa.look_up(c, row, scratch.reserve(c.weight.in_features));
    };
    Crew::with(threads, int64_t(c.rows) * c.weight.in_features >= kSerialWork, [&] { share(c.rows, true, one); });
}

}  // namespace gptq
