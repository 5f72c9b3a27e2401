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

// Of output channels channel..channel + 3; `channel` is a multiple of 4.
template <class T>
DEVICE void store_results(const Product& p, int row, int channel, float4 values) {
    const int out_features = p.weight.out_features;
    if (out_features % 4) {
        const float each[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (channel + i < out_features) store_result<T>(p, row, channel + i, each[i]);
        return;
    }
    if (channel >= out_features) return;
    if (p.bias) {
        values.x += load_float(p.bias, channel, p.bias_dtype);
        values.y += load_float(p.bias, channel + 1, p.bias_dtype);
        values.z += load_float(p.bias, channel + 2, p.bias_dtype);
        values.w += load_float(p.bias, channel + 3, p.bias_dtype);
    }
    *reinterpret_cast<uint2*>(p.y + int64_t(row) * out_features + channel) = {
        to_bits<T>(values.x) | uint32_t(to_bits<T>(values.y)) << 16,
        to_bits<T>(values.z) | uint32_t(to_bits<T>(values.w)) << 16};
}

DEVICE void store_partials(const Product& p, int row, int channel, float4 values) {
    const int out_features = p.weight.out_features;
    float* to = p.partials + (int64_t(blockIdx.z) * p.rows + row) * out_features + channel;
    if (out_features % 4) {
        const float each[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (channel + i < out_features) to[i] = each[i];
    } else if (channel < out_features) {
        *reinterpret_cast<float4*>(to) = values;
    }
}

DEVICE int smaller(int a, int b) {
    return a < b ? a : b;
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
    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), warps = blockDim.x / 32;
    const int first_strip = blockIdx.x * Strips, first_row = blockIdx.y * Tokens * 8;
    const int begin = uint32_t(w.tiles) * warp / warps, end = uint32_t(w.tiles) * (warp + 1) / warps;

    // Tiles and columns that there are from here on; tiles that need no check, all of their columns being there.
    int tiles = end - begin, columns = p.columns - begin * kTile - lane % 4 * 8;
    int whole = smaller(end, p.columns / kTile) - begin;
    // Instead of rows and strips behind the last, the last is read: nobody looks at what becomes of it.
    const uint32_t* from[Strips];
    const uint16_t* row[Tokens];
#pragma unroll
    for (int s = 0; s < Strips; ++s)
        from[s] = w.words + (int64_t(smaller(first_strip + s, w.strips - 1)) * w.tiles + begin) * (32 * Bits);
#pragma unroll
    for (int t = 0; t < Tokens; ++t)
        row[t] =
            p.x + int64_t(smaller(first_row + t * 8 + lane / 4, p.rows - 1)) * p.columns + begin * kTile + lane % 4 * 8;

    uint32_t words[kDepth][Strips][Bits];
    uint4 x[kDepth][2][Tokens];
    const auto load = [&](int slot, int ahead, bool check) {
#pragma unroll
        for (int s = 0; s < Strips; ++s)
            load_words<Bits>(words[slot][s], from[s] + ahead * 32 * Bits, lane, StreamingLoad());
#pragma unroll
        for (int unit = 0; unit < 2; ++unit)
#pragma unroll
            for (int t = 0; t < Tokens; ++t) {
                const int column = ahead * kTile + unit * kUnit;
                x[slot][unit][t] = !check || column < columns
                                       ? load_cached(reinterpret_cast<const uint4*>(row[t] + column))
                                       : uint4{0, 0, 0, 0};
            }
    };
    Sums<Bits, T, Strips, Tokens, Every<kDepth>> sums(w, first_strip, begin * 2, lane);
#pragma unroll
    for (int slot = 0; slot < kDepth; ++slot)
        if (slot < tiles) load(slot, slot, true);
    for (; tiles > 0; tiles -= kDepth) {
        const bool unchecked = whole >= 2 * kDepth;
#pragma unroll
        for (int slot = 0; slot < kDepth; ++slot) {
            if (!unchecked && slot >= tiles) break;
#pragma unroll
            for (int unit = 0; unit < 2; ++unit)
                sums.add(w, words[slot], slot * 2 + unit, [&](int t) { return x[slot][unit][t]; });
            if (unchecked)
                load(slot, slot + kDepth, false);
            else if (slot + kDepth < tiles)
                load(slot, slot + kDepth, true);
        }
#pragma unroll
        for (int s = 0; s < Strips; ++s) from[s] += kDepth * 32 * Bits;
#pragma unroll
        for (int t = 0; t < Tokens; ++t) row[t] += kDepth * kTile;
        columns -= kDepth * kTile;
        whole -= kDepth;
        sums.advance();
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

// What a thread of the wide kernel copies of every stage: always the same places, so that all it computes for a copy is
// one address.
template <int Bits, int Tokens>
struct StageCopy {
    static constexpr int kThreads = kWideWarps * 32;
    static constexpr int kRowVectors = kStageTiles * kTile / 8;  // of 16 bytes, in a token's row of a stage
    static constexpr int kRowsAtOnce = kThreads / kRowVectors;   // even: a thread's rows are all odd or all even
    static constexpr int kTileVectors = 8 * Bits;
    static constexpr int kStripVectors = kStageTiles * kTileVectors;  // side by side in global memory too
    static constexpr int kStripsAtOnce = kThreads / kStripVectors;  // of 3 bits, the last threads have no place in one
    static_assert(kRowsAtOnce % 2 == 0 && Tokens * 8 % kRowsAtOnce == 0 && kWideStrips % kStripsAtOnce == 0);

    static constexpr int kRows = Tokens * 8 / kRowsAtOnce, kStrips = kWideStrips / kStripsAtOnce;  // of a thread

    const unsigned char* x;      // the block's first row
    const unsigned char* words;  // the place in the first strip of stage 0
    int row, last_row;           // the thread's first row, from the block's first
    int strip, last_strip;       // likewise
    uint32_t rows[kRows];        // from the block's first, in bytes per column
    uint32_t strips[kStrips];    // from the block's first, in bytes per tile
    int column, tile;            // in a stage
    int x_to, words_to;          // in shared memory

    // Instead of rows and strips behind the last, the last is copied: nobody looks at what becomes of it.
    DEVICE StageCopy(const Product& p, int first_row, int first_strip) {
        const Weight& w = p.weight;
        const int vector = threadIdx.x % kRowVectors;
        row = threadIdx.x / kRowVectors;
        last_row = p.rows - 1 - first_row;
        x = kept(reinterpret_cast<const unsigned char*>(p.x + int64_t(first_row) * p.columns));
#pragma unroll
        for (int i = 0; i < kRows; ++i) rows[i] = kept(int(row_bytes(row, i)));
        column = kept(vector * 8);
        // Odd rows swap the halves of each 128 bytes, so that the 8 rows that a warp reads at once lie in different
        // banks.
        x_to = kept((row * kRowVectors + (vector ^ row % 2 * 4)) * 16);
        const int inside = threadIdx.x % kStripVectors;
        strip = threadIdx.x / kStripVectors;
        last_strip = w.strips - 1 - first_strip;
        words = kept(reinterpret_cast<const unsigned char*>(w.words) +
                     (int64_t(first_strip) * w.tiles * kTileVectors + inside) * 16);
#pragma unroll
        for (int i = 0; i < kStrips; ++i) strips[i] = kept(int(strip_bytes(strip, i)));
        tile = kept(strip < kStripsAtOnce ? inside / kTileVectors : 1 << 30);  // there is none without a place
        words_to = kept(Tokens * 8 * kRowVectors * 16 + (strip * kStripVectors + inside) * 16);
    }

    // Where the thread's rows and strips are, given its first.
    DEVICE uint32_t row_bytes(int own, int i) const { return smaller(own + i * kRowsAtOnce, last_row) * 2; }
    DEVICE uint32_t strip_bytes(int own, int i) const {
        return smaller(own + i * kStripsAtOnce, last_strip) * kTileVectors * 16;
    }

    DEVICE void operator()(const Product& p, int stage, unsigned char* to) const {
        const int slot = stage * kStageTiles * kTile + column;
        const bool valid = slot < p.columns;
        const unsigned char* from = kept(x + (valid ? slot : 0) * uint64_t(2));
        // Of 8 bits, too few registers are free to keep what can be computed again.
        const int own_row = Bits == 8 ? kept(row) : row, own_strip = Bits == 8 ? kept(strip) : strip;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const uint32_t bytes = Bits == 8 ? row_bytes(own_row, i) : rows[i];
            copy16(to + x_to + i * kThreads * 16, from + bytes * uint64_t(uint32_t(p.columns)), valid);
        }
        if (stage * kStageTiles + tile >= p.weight.tiles) return;  // nor are tiles behind the last multiplied
        from = kept(words + uint32_t(stage) * uint64_t(kStripVectors * 16));
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
            const uint32_t bytes = Bits == 8 ? strip_bytes(own_strip, i) : strips[i];
            copy16(to + words_to + i * kStripsAtOnce * kStripVectors * 16,
                   from + bytes * uint64_t(uint32_t(p.weight.tiles)), true);
        }
    }
};

// One block computes 128 output channels of Tokens * 8 tokens over a share of the slots. Weights and activations arrive
// in shared memory by asynchronous copies, a stage of 256 slots at a time. Of each, a warp multiplies one half: the 128
// slots that a scale most often has.
// Grid: (ceil(strips / 8), ceil(rows / (Tokens * 8)), splits).
template <int Bits, class T, int Tokens>
DEVICE void wide(Product p) {
    constexpr int kStrips = kWideStrips / 4, kHalf = kStageTiles / 2;
    constexpr int kRow = kStageTiles * kTile * 2;  // bytes of a token in a stage
    constexpr int kStage = wide_stage_bytes(Bits, Tokens), kStages = wide_stages(Bits, Tokens, kBlockSharedBytes);
    const Weight& w = p.weight;
    const int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const int half = warp / 4;  // of each stage
    const int block_strip = blockIdx.x * kWideStrips, first_strip = block_strip + warp % 4 * kStrips;
    const int first_row = blockIdx.y * Tokens * 8;
    const int stages = (w.tiles + kStageTiles - 1) / kStageTiles;
    const int begin = uint32_t(stages) * blockIdx.z / gridDim.z, end = uint32_t(stages) * (blockIdx.z + 1) / gridDim.z;

    unsigned char* shared = shared_memory();
    const StageCopy<Bits, Tokens> copy(p, first_row, block_strip);
    auto after = [](int place) { return place == (kStages - 1) * kStage ? 0 : place + kStage; };

    // Where a lane's activations are in a stage: of token block 0 and the first tile of its half, for both units.
    const int parity = lane / 4 % 2, own = lane / 4 * kRow + half * kHalf * kTile * 2 + lane % 4 * 16;
    const int of_unit[2] = {kept(own + parity * 64), kept(own + 64 - parity * 64)};  // odd rows are swapped
    const int of_words = kept(Tokens * 8 * kRow + (warp % 4 * kStrips * kStageTiles + half * kHalf) * 128 * Bits);

    Sums<Bits, T, kStrips, Tokens, EveryOther<kHalf>> sums(w, first_strip, (begin * kStageTiles + half * kHalf) * 2,
                                                           lane);
    int filled = 0, current = 0;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (begin + i < end) copy(p, begin + i, shared + filled);
        filled = after(filled);
        commit_copies();
    }
    for (int stage = begin; stage < end; ++stage) {
        wait_copies<kStages - 2>();
        synchronize_block();  // everyone's copies have landed, and everyone has left the stage that comes next
        if (stage + kStages - 1 < end) copy(p, stage + kStages - 1, shared + filled);
        filled = after(filled);
        commit_copies();
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            const int tile = stage * kStageTiles + half * kHalf + i;
            if (tile >= w.tiles) break;
            uint32_t words[kStrips][Bits];
#pragma unroll
            for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
                for (int s = 0; s < kStrips; ++s) {
                    const auto* tile_words = reinterpret_cast<const uint32_t*>(shared + current + of_words +
                                                                               (s * kStageTiles + i) * 128 * Bits);
                    if constexpr (Bits == 8)  // all of a tile's would take more registers than there are
                        load_unit(words[s], tile_words, lane, unit, SharedLoad());
                    else if (unit == 0)
                        load_words<Bits>(words[s], tile_words, lane, SharedLoad());
                }
                const unsigned char* from = shared + current + of_unit[unit] + i * kTile * 2;
                sums.add(w, words, i * 2 + unit,
                         [&](int t) { return *reinterpret_cast<const uint4*>(from + t * 8 * kRow); });
            }
        }
        sums.advance();
        current = after(current);
    }
    sums.flush();

    // [token][channel]: the second half of the warps hands its sums over, and the first half adds. Lanes hold c0..c3 as
    // in skinny. The padding keeps the 4 tokens that a warp writes at once in different banks.
    constexpr int kChannels = kWideStrips * kStrip, kPitch = kChannels + 4;
    float* outputs = reinterpret_cast<float*>(shared);
    const int mine = lane % 4 * 2 * kPitch + warp % 4 * kStrips * kStrip + lane / 4;
#pragma unroll
    for (int turn = 1; turn >= 0; --turn) {
        synchronize_block();
#pragma unroll
        for (int i = 0; i < kStrips * Tokens * 4; ++i) {
            const int s = i / 4 / Tokens, t = i / 4 % Tokens;
            float& output = outputs[mine + (t * 8 + i % 2) * kPitch + s * kStrip + i % 4 / 2 * 8];
            if (half == turn) output = turn ? sums.total[s][t][i % 4] : sums.total[s][t][i % 4] + output;
        }
    }
    synchronize_block();
    const int channel = block_strip * kStrip + lane * 4;
    for (int token = warp; token < Tokens * 8 && first_row + token < p.rows; token += kWideWarps) {
        const float4 sum = *reinterpret_cast<const float4*>(outputs + token * kPitch + lane * 4);
        if (gridDim.z == 1)
            store_results<T>(p, first_row + token, channel, sum);
        else
            store_partials(p, first_row + token, channel, sum);
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
        const RawChunk raw[1] = {ChunkPointer(w, strip, lane).load(w, (tile * 2 + unit) / w.chunk_units)};
        float2 scales[1];
        scales_of(scales, raw, w.scales_dtype);
        Zero<Bits, F16> zeros[2];
        zeros_of<Bits, F16>(zeros, raw[0], w.zeros != nullptr);
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
                const float scale = half ? scales[0].y : scales[0].x;
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
