// A decoder layer whose attention somebody else computes, in two calls: what lies before it, and what follows (tail.h).
#pragma once

#include <cstdint>

#include "tail.h"

namespace gptq {

// sum = x + residual, y = norm(sum) times the transpose of each weight, the outputs of all side by side.
struct LayerStart {
    const Norm* norm;  // or null
    std::vector<const Linear*> inputs;

    int width() const { return inputs[0]->weight.in_features; }
    int outputs() const {
        int sum = 0;
        for (const Linear* each : inputs) sum += each->weight.out_features;
        return sum;
    }
};
// shape: of x, residual and sum. residual: or null. y: [rows][outputs()].
void start_layer(const LayerStart&, const Rows& shape, const void* x, const void* residual, void* y, void* sum,
                 int threads);

// Graphs name the half of a layer by a number that they read when they run, which means nothing in another process. The
// caller keeps the parts until it forgets the number, and forgets it while no call uses it. Null: no such number.
void keep_start(int64_t key, const LayerStart&);
void keep_end(int64_t key, const Tail&);
void forget_half(int64_t key);
const LayerStart* find_start(int64_t key);
const Tail* find_end(int64_t key);

}  // namespace gptq
