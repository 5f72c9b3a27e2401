// Scores experts and chooses the best, as the routers of mixtures do in torch.
#include "router.h"

#include <algorithm>
#include <cmath>

#include "dense.h"
#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"

namespace gptq {
namespace {

struct Candidate {
    float score;
    int32_t index;
};

bool better(const Candidate& a, const Candidate& b) {
    return (std::isnan(a.score) && !std::isnan(b.score)) || a.score > b.score;
}

// Brings the k best to the front. The algorithms are those of torch.topk: which of equal ones they take hangs on that.
void bring_best(Candidate* all, int count, int k) {
    if (k * 64 <= count) {
        std::partial_sort(all, all + k, all + count, better);
    } else {
        std::nth_element(all, all + k - 1, all + count, better);
    }
}

// Logits become scores.
void score(const Router& r, float* x) {
    const int n = r.gate->outputs;
    if (r.sigmoid) {
        for (int i = 0; i < n; ++i) x[i] = 1.0f / (1.0f + std::exp(-x[i]));
        return;
    }
    const float largest = *std::max_element(x, x + n);
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) sum += x[i] = std::exp(x[i] - largest);
    for (int i = 0; i < n; ++i) x[i] /= sum;
}

// The scores of experts outside of the best groups become -infinity. some: room for as many candidates as experts.
void limit_to_groups(const Router& r, Candidate* experts, Candidate* some) {
    const int size = r.gate->outputs / r.groups;
    thread_local Scratch<Candidate> kept;
    Candidate* const groups = kept.reserve(r.groups);
    for (int g = 0; g < r.groups; ++g) {
        std::copy_n(experts + g * size, size, some);
        bring_best(some, size, r.best);
        groups[g] = {0.0f, g};
        for (int i = 0; i < r.best; ++i) groups[g].score += some[i].score;
    }
    bring_best(groups, r.groups, r.chosen_groups);
    for (int i = r.chosen_groups; i < r.groups; ++i) {
        for (int j = 0; j < size; ++j) experts[groups[i].index * size + j].score = -INFINITY;
    }
}

void choose(const Router& r, float* scores, const float* correction, int32_t* ids, float* factors) {
    const int n = r.gate->outputs;
    thread_local Scratch<Candidate> kept;
    Candidate* const experts = kept.reserve(2 * n);
    score(r, scores);
    for (int i = 0; i < n; ++i) experts[i] = {correction ? scores[i] + correction[i] : scores[i], i};
    if (r.chosen_groups < r.groups) limit_to_groups(r, experts, experts + n);
    bring_best(experts, n, r.top_k);
    float sum = 1e-20f;
    for (int k = 0; k < r.top_k; ++k) {
        ids[k] = experts[k].index;
        factors[k] = scores[ids[k]];
        sum += factors[k];
    }
    const float divisor = r.normalized ? sum : 1.0f;
    for (int k = 0; k < r.top_k; ++k) factors[k] = factors[k] / divisor * r.scale;
}

}  // namespace

void route(const Router& r, const Rows& shape, const void* x, int32_t* ids, float* factors, int threads) {
    if (!shape.rows) return;
    const RowKernels& kernels = *level().rows;
    const int n = r.gate->outputs;
    const Dtype dtype = r.rounded ? shape.dtype : Dtype::f32;
    thread_local Scratch<char> kept_logits;
    thread_local Scratch<float> kept, kept_correction;
    char* const logits = kept_logits.reserve(size_t(shape.rows) * n * size_of(dtype));
    multiply(*r.gate, shape, x, dtype, logits, threads);
    float* const scores = kept.reserve(size_t(shape.rows) * n);
    float* correction = nullptr;
    if (r.correction) {
        correction = kept_correction.reserve(n);
        kernels.widen(r.correction_dtype, r.correction, correction, n);
    }
    kernels.widen(dtype, logits, scores, shape.rows * n);
    share_elements(shape.rows, int64_t(shape.rows) * n * 16, threads, [&](int row) {
        choose(r, scores + int64_t(row) * n, correction, ids + int64_t(row) * r.top_k,
               factors + int64_t(row) * r.top_k);
    });
}

}  // namespace gptq
