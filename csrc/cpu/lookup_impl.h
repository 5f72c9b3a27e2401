// The kernel of lookup.h, written once; a level supplies the Isa of kernel_impl.h.
#pragma once

#include "kernel_impl.h"
#include "lookup.h"

namespace gptq {
namespace {

// Code number `i` of a run; words: the run's first one, of one output channel. The order is that of repack.cpp: codes
// 2j and 2j + 1 lie half a word apart, and of 3 bits the highest ones of two words lie in a third.
template <int Bits>
GPTQ_INLINE int code_at(const uint32_t* words, int i) {
    constexpr int run = Bits == 3 ? 16 : 32 / Bits;
    const int word = i / run, k = i % run, field = k % 2 * (run / 2) + k / 2;
    if constexpr (Bits != 3) return words[0] >> field * Bits & ((1u << Bits) - 1);
    const uint32_t low = words[word * kStrip] >> field * 2 & 3;
    return low | (words[2 * kStrip] >> (word + 2 * (field % 4) + 8 * (field / 4)) & 1) << 2;
}

template <class Isa, int Bits>
GPTQ_INLINE void dequantize_row(const Weight& w, int64_t id, float* row) {
    constexpr int run = Bits == 3 ? 32 : 32 / Bits, run_words = Bits == 3 ? 3 : 1;
    const size_t strip = id / kStrip, lane = id % kStrip;
    const uint32_t* words = w.words + strip * (w.slots / 32) * Bits * kStrip + lane;
    for (int b = 0; b < w.n_blocks; ++b) {
        const int first = w.blocks[3 * b], end = w.blocks[3 * b + 1];
        const size_t at = (strip * w.groups + w.blocks[3 * b + 2]) * kStrip + lane;
        const int zero = w.zeros ? w.zeros[at] : 1 << (Bits - 1);
        float scale;
        to_float<Isa>(w.scales_dtype, static_cast<const char*>(w.scales) + at * size_of(w.scales_dtype), &scale, 1);
        for (int k = first; k < end; k += run) {
            const uint32_t* here = words + size_t(k / run) * run_words * kStrip;
            GPTQ_UNROLL for (int i = 0; i < run; ++i) {
                const int channel = w.perm ? w.perm[k + i] : k + i;
                // As unsigned numbers, negative ones are large.
                if (unsigned(channel) >= unsigned(w.in_features)) continue;
                row[channel] = float(code_at<Bits>(here, i) - zero) * scale;
            }
        }
    }
}

// scratch: [in_features]
template <class Isa>
void look_up_row(const LookupCall& c, int row, float* scratch) {
    const Weight& w = c.weight;
    const int64_t id = c.ids[row];
    switch (w.bits) {
        case 2:
            dequantize_row<Isa, 2>(w, id, scratch);
            break;
        case 3:
            dequantize_row<Isa, 3>(w, id, scratch);
            break;
        case 4:
            dequantize_row<Isa, 4>(w, id, scratch);
            break;
        default:
            dequantize_row<Isa, 8>(w, id, scratch);
    }
    char* y = static_cast<char*>(c.y) + size_t(row) * w.in_features * size_of(c.dtype);
    from_float<Isa>(c.dtype, scratch, y, w.in_features);
}

}  // namespace
}  // namespace gptq
