// The kernels. All are deterministic: every sum has one order, whatever runs first.
#pragma once
#include "tiles.cuh"

namespace gptq {

template <class T>
DEVICE uint16_t to_bits(float value) {
    if constexpr (kSame<T, BF16>)
        return float_to_bf16(value);
    else
        return float_to_f16(value);
}

DEVICE float load_float(const void* from, int64_t index, Dtype dtype) {
    if (dtype == kFloat32) return load_cached(static_cast<const float*>(from) + index);
    const uint16_t bits = load_cached(static_cast<const uint16_t*>(from) + index);
    return dtype == kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

template <class T>
DEVICE void store_result(const Product& p, int row, int channel, float value) {
    if (p.bias) value += load_float(p.bias, channel, p.bias_dtype);
    p.y[int64_t(row) * p.weight.out_features + channel] = to_bits<T>(value);
}

// -- few tokens -------------------------------------------------------------------------------------------------------

// Tiles whose words and activations a warp has under way.
constexpr int kDepth = 4;

struct StreamingLoad {
    template <int Words>
    DEVICE void operator()(uint32_t* to, const uint32_t* from) const {
        load_streaming<Words>(to, from);
    }
};

// One block computes Strips * 16 output channels of Tokens * 8 tokens; its warps share the slots among them, stream
// weights and activations straight into the registers that multiply them, and add up once, at the end.
// Grid: (ceil(strips / Strips), ceil(rows / (Tokens * 8))). Shared memory: warps * Strips * Tokens * 512 bytes.
template <int Bits, class T, int Strips, int Tokens>
DEVICE void skinny(Product p) {
    const Weight& w = p.weight;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first_strip = blockIdx.x * Strips, first_row = blockIdx.y * Tokens * 8;
    const int begin = int64_t(w.tiles) * warp / warps, end = int64_t(w.tiles) * (warp + 1) / warps;

    uint32_t words[kDepth][Strips][Bits];
    uint4 x[kDepth][2][Tokens];
    auto load = [&](int slot, int tile) {
#pragma unroll
        for (int s = 0; s < Strips; ++s)
            if (first_strip + s < w.strips)
                load_words<Bits>(words[slot][s], w.words + (int64_t(first_strip + s) * w.tiles + tile) * 32 * Bits,
                                 lane, StreamingLoad());
#pragma unroll
        for (int unit = 0; unit < 2; ++unit)
#pragma unroll
            for (int t = 0; t < Tokens; ++t) {
                const int row = first_row + t * 8 + lane / 4, column = tile * kTile + unit * kUnit + lane % 4 * 8;
                x[slot][unit][t] =
                    row < p.rows && column < p.columns
                        ? load_cached(reinterpret_cast<const uint4*>(p.x + int64_t(row) * p.columns + column))
                        : uint4{0, 0, 0, 0};
            }
    };

    Sums<Bits, T, Strips, Tokens> sums;
    sums.start(w, first_strip, begin * 2, lane);
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot)
        if (begin + slot < end) load(slot, begin + slot);
    for (int tile = begin; tile < end; tile += kDepth) {
#pragma unroll
        for (int slot = 0; slot < kDepth; ++slot) {
            if (tile + slot >= end) break;
#pragma unroll
            for (int unit = 0; unit < 2; ++unit) {
                sums.enter(w, first_strip, (tile + slot) * 2 + unit, lane, [](int following) { return following; });
                sums.multiply(words[slot], unit, [&](int t) { return x[slot][unit][t]; });
            }
            if (tile + slot + kDepth < end) load(slot, tile + slot + kDepth);
        }
    }
    sums.flush();

    // [warp][Strips][16 channels][Tokens * 8]. A lane holds c0..c3 of the 16 x 8 result of mma.m16n8k16: rows g, g,
    // g + 8, g + 8 (output channels) and columns 2t, 2t + 1, 2t, 2t + 1 (tokens), with g = lane / 4, t = lane % 4.
    float* shared = reinterpret_cast<float*>(shared_memory());
    constexpr int kColumns = Tokens * 8, kOutputs = Strips * kStrip * kColumns;
#pragma unroll
    for (int s = 0; s < Strips; ++s)
#pragma unroll
        for (int t = 0; t < Tokens; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                shared[warp * kOutputs + (s * kStrip + lane / 4 + i / 2 * 8) * kColumns + t * 8 + lane % 4 * 2 +
                       i % 2] = sums.total[s][t][i];
    synchronize_block();
    for (int output = threadIdx.x; output < kOutputs; output += blockDim.x) {
        const int channel = output % (Strips * kStrip), token = output / (Strips * kStrip);
        const int row = first_row + token, out = first_strip * kStrip + channel;
        if (row >= p.rows || out >= w.out_features) continue;
        float sum = 0.f;
        for (int other = 0; other < warps; ++other) sum += shared[other * kOutputs + channel * kColumns + token];
        store_result<T>(p, row, out, sum);
    }
}

// -- more tokens ------------------------------------------------------------------------------------------------------

struct SharedLoad {
    template <int Words>
    DEVICE void operator()(uint32_t* to, const uint32_t* from) const {
        if constexpr (Words == 4)
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        else if constexpr (Words == 2)
            *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        else
            *to = *from;
    }
};

// One block computes 128 output channels of Tokens * 8 tokens over a share of the slots. Weights and activations arrive
// in shared memory by asynchronous copies, kStages - 1 stages of 128 slots ahead.
// Grid: (ceil(strips / 8), ceil(rows / (Tokens * 8)), splits).
template <int Bits, class T, int Tokens>
DEVICE void wide(Product p) {
    constexpr int kStrips = kWideStrips / 4;
    constexpr int kRowVectors = kStageTiles * kTile / 8;  // of 16 bytes, in a token's row of a stage
    constexpr int kStage = Tokens * 8 * kStageTokenBytes + Bits * kStageBitBytes;
    const Weight& w = p.weight;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int half = warp / 4;  // which tile of each stage
    const int block_strip = blockIdx.x * kWideStrips, first_strip = block_strip + warp % 4 * kStrips;
    const int first_row = blockIdx.y * Tokens * 8;
    const int stages = (w.tiles + kStageTiles - 1) / kStageTiles;
    const int begin = int64_t(stages) * blockIdx.z / gridDim.z, end = int64_t(stages) * (blockIdx.z + 1) / gridDim.z;

    unsigned char* shared = shared_memory();
    auto activations = [&](int stage) { return shared + stage % kStages * kStage; };
    auto weights = [&](int stage) { return activations(stage) + kRowVectors * 16 * Tokens * 8; };
    // Odd rows swap the halves of each 128 bytes, so that the 8 rows that a warp reads at once lie in different banks.
    auto vector_of = [](int row, int vector) { return row * kRowVectors + (vector ^ (row % 2 * 4)); };

    auto copy = [&](int stage) {
        for (int i = threadIdx.x; i < Tokens * 8 * kRowVectors; i += kWideWarps * 32) {
            const int token = i / kRowVectors, vector = i % kRowVectors;
            const int row = first_row + token, column = stage * kStageTiles * kTile + vector * 8;
            const bool valid = row < p.rows && column < p.columns;
            copy16(activations(stage) + vector_of(token, vector) * 16,
                   valid ? p.x + int64_t(row) * p.columns + column : p.x, valid);
        }
        constexpr int kTileVectors = 8 * Bits;
        for (int i = threadIdx.x; i < kWideStrips * kStageTiles * kTileVectors; i += kWideWarps * 32) {
            const int strip = block_strip + i / (kStageTiles * kTileVectors);
            const int tile = stage * kStageTiles + i / kTileVectors % kStageTiles;
            const bool valid = strip < w.strips && tile < w.tiles;
            const uint32_t* from = w.words + (int64_t(strip) * w.tiles + tile) * 32 * Bits + i % kTileVectors * 4;
            copy16(weights(stage) + i * 16, valid ? from : w.words, valid);
        }
    };

    Sums<Bits, T, kStrips, Tokens> sums;
    // The warp's first unit at or after another.
    auto following = [half](int unit) { return unit / 2 % 2 == half ? unit : (unit / 2 + 1) * 2; };
    sums.start(w, first_strip, (begin * kStageTiles + half) * 2, lane);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (begin + i < end) copy(begin + i);
        commit_copies();
    }
    for (int stage = begin; stage < end; ++stage) {
        wait_copies<kStages - 2>();
        synchronize_block();  // everyone's copies have landed, and everyone has left the stage that comes next
        if (stage + kStages - 1 < end) copy(stage + kStages - 1);
        commit_copies();
        const int tile = stage * kStageTiles + half;
        if (tile < w.tiles) {
            uint32_t words[kStrips][Bits];
#pragma unroll
            for (int s = 0; s < kStrips; ++s) {
                const unsigned char* from =
                    weights(stage) + ((warp % 4 * kStrips + s) * kStageTiles + half) * 128 * Bits;
                load_words<Bits>(words[s], reinterpret_cast<const uint32_t*>(from), lane, SharedLoad());
            }
#pragma unroll
            for (int unit = 0; unit < 2; ++unit) {
                sums.enter(w, first_strip, tile * 2 + unit, lane, following);
                sums.multiply(words, unit, [&](int t) {
                    const int vector = vector_of(t * 8 + lane / 4, half * 8 + unit * 4 + lane % 4);
                    return reinterpret_cast<const uint4*>(activations(stage))[vector];
                });
            }
        }
    }
    sums.flush();

    // The second half of the warps hands its sums over, a lane's together.
    synchronize_block();
    float* other = reinterpret_cast<float*>(shared) + warp % 4 * 32 * kStrips * Tokens * 4 + lane;
#pragma unroll
    for (int i = 0; i < kStrips * Tokens * 4; ++i)
        if (half == 1) other[i * 32] = sums.total[i / 4 / Tokens][i / 4 % Tokens][i % 4];
    synchronize_block();
    if (half == 1) return;
#pragma unroll
    for (int i = 0; i < kStrips * Tokens * 4; ++i) {
        const int s = i / 4 / Tokens, t = i / 4 % Tokens;
        // c0..c3 of a lane are rows g and g + 8 of the result, as in skinny.
        const int channel = (first_strip + s) * kStrip + lane / 4 + i % 4 / 2 * 8;
        const int row = first_row + t * 8 + lane % 4 * 2 + i % 2;
        if (channel >= w.out_features || row >= p.rows) continue;
        const float sum = sums.total[s][t][i % 4] + other[i * 32];
        if (gridDim.z == 1)
            store_result<T>(p, row, channel, sum);
        else
            p.partials[(int64_t(blockIdx.z) * p.rows + row) * w.out_features + channel] = sum;
    }
}

// y = bias + sum over the splits. One thread per output.
template <class T>
DEVICE void reduce(Product p, int splits) {
    const int64_t outputs = int64_t(p.rows) * p.weight.out_features;
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= outputs) return;
    float sum = 0.f;
    for (int split = 0; split < splits; ++split) sum += p.partials[split * outputs + i];
    store_result<T>(p, i / p.weight.out_features, i % p.weight.out_features, sum);
}

// -- helpers ----------------------------------------------------------------------------------------------------------

// Slots [0, columns) of output channels [first_channel, first_channel + channels) as a dense [channels][columns]
// matrix. One warp per tile: grid (ceil(tiles / warps), strips).
template <int Bits, class Out>
DEVICE void dequantize(Weight w, int first_strip, int channels, int columns, void* to) {
    const int lane = threadIdx.x % 32;
    const int tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, strip = first_strip + blockIdx.y;
    if (tile >= w.tiles) return;
    uint32_t words[Bits];
    load_words<Bits>(words, w.words + (int64_t(strip) * w.tiles + tile) * 32 * Bits, lane, StreamingLoad());
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
        const RawChunk raw = load_chunk(w, strip, (tile * 2 + unit) / w.chunk_units, lane);
        const float2 scales = scales_of(raw, w.scales_dtype);
        uint32_t zeros[2];
        zeros_of<Bits, F16>(zeros, raw, w.zeros != nullptr);
        const int column = tile * kTile + unit * kUnit + lane % 4 * 8;
        if (column >= columns) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int channel = blockIdx.y * kStrip + lane / 4 + half * 8;
            if (channel >= channels) continue;
            float values[8];
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const uint32_t codes = unpack<Bits, F16>(words, unit, half, pair, zeros[half]);
                const float scale = half ? scales.y : scales.x;
                values[pair * 2] = f16_to_float(codes & 0xFFFF) * scale;
                values[pair * 2 + 1] = f16_to_float(codes >> 16) * scale;
            }
            const int64_t at = int64_t(channel) * columns + column;
            if constexpr (kSame<Out, float>) {
                float4* out = reinterpret_cast<float4*>(static_cast<float*>(to) + at);
                out[0] = {values[0], values[1], values[2], values[3]};
                out[1] = {values[4], values[5], values[6], values[7]};
            } else {
                uint32_t packed[4];
#pragma unroll
                for (int pair = 0; pair < 4; ++pair)
                    packed[pair] = to_bits<Out>(values[pair * 2]) | uint32_t(to_bits<Out>(values[pair * 2 + 1])) << 16;
                *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = {packed[0], packed[1], packed[2],
                                                                              packed[3]};
            }
        }
    }
}

// Activations in slot order: to[row][slot] = x[row][perm[slot]], zero where perm is out of range (padding).
// Element: an unsigned integer of the activations' size. Grid: (ceil(slots / threads), rows).
template <class Element>
DEVICE void gather(const Element* x, const int32_t* perm, Element* to, int columns, int slots) {
    const int slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot >= slots) return;
    const int channel = load_cached(perm + slot);
    const int64_t row = blockIdx.y;
    to[row * slots + slot] = channel >= 0 && channel < columns ? load_cached(x + row * columns + channel) : Element(0);
}

}  // namespace gptq
