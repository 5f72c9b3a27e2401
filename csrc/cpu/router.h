// Which experts of a mixture see which token, and what their results count.
#pragma once

#include "block.h"

namespace gptq {

// A score of each expert, from the logits of a small product. The experts with the best ones are chosen; their scores
// are what they count.
struct Router {
    const Dense* gate;  // logits
    bool rounded;       // whether logits are rounded to the dtype of x
    bool sigmoid;       // scores are that of each logit; else the softmax of all
    // Float [experts] of a dtype, added to the scores in the choice only; or null.
    const void* correction;
    Dtype correction_dtype;
    // Neighbouring experts form `groups`. Only those of the `chosen_groups` best can be chosen: of a group the `best`
    // highest scores count, in sum.
    int groups, chosen_groups, best;
    int top_k;
    bool normalized;  // counts are divided by their sum
    float scale;      // and multiplied by this
};

// ids and factors: [rows][top_k]. Of equal scores the same are chosen as by torch.topk on a CPU.
void route(const Router&, const Rows& shape, const void* x, int32_t* ids, float* factors, int threads);

}  // namespace gptq
