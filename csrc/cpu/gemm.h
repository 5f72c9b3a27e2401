// The extension's functions, free of Python.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace gptq {

// Activations of this many rows go through all steps before the next: a few MB, and the weights' traffic per row is
// negligible.
constexpr int kRowsAtATime = 480;

inline int size_of(Dtype dtype) {
    return dtype == Dtype::f32 ? 4 : 2;
}

// Levels that this CPU runs, slowest first.
std::vector<std::string> levels();
// The one in use: the last of levels(), or the one that GPTQ_BACKEND_CPU_LEVEL names. Throws std::runtime_error for a
// name that does not exist or that this CPU lacks.
const Level& level();

// Fills in the workspaces of calls with as many rows each, and computes their y on `threads` threads, as if they were
// one. Neighbours with the same x and layout share the integers that x becomes.
void gemm(const std::vector<Call>& calls, int threads);

// The experts of a layer: `parts` weights for each, as tensors with a leading dimension [parts][count].
struct Experts {
    uintptr_t ids;  // address of [rows] of id_size bytes: the expert of each row, outside of 0..count-1 for none
    int id_size, count, parts, top_k;
};
// Row r of y [rows][parts][out_features], r < call.rows, is row r / top_k of x times the weights of r's expert, or
// zeros. `call` describes the first weight, its bias likewise.
void moe_gemm(Call call, const Experts& experts, int threads);

// Checkpoint words <-> the layout of Weight::words. `source` holds rows of out_features words of `word_bits` (8 or 32)
// bits; a row holds word_bits / field_bits input channels, lowest bits first. `perm` as in Weight, or null.
struct Repack {
    const Weight* weight;  // words, zeros and scales are not read
    void* source;
    uint32_t* words;
    int source_rows, word_bits, field_bits;
};
void pack(const Repack&, int threads);
void unpack(const Repack&, int threads);  // channels that no slot names come out as zero

// Bytes per second of `passes` reads of `bytes` bytes: the roof that the benchmark holds the kernels against.
double read_bandwidth(const void* data, size_t bytes, int passes, int threads);

}  // namespace gptq
