// How a quantized weight lies in memory, and how a warp turns it into operands of the matrix units. docs/kernels.md
// draws it.
//
//   strip = 16 output channels, tile = a strip x 64 slots, unit = 32 slots, chunk = the slots that share a scale
//
// A slot is an input channel after sorting by group; every group is padded to whole chunks and all chunks have the same
// number of slots. The weight is the left operand of mma.m16n8k16 (rows = output channels), activations are the right
// one (columns = tokens), so that few tokens waste little. Lane (g, t) = (lane / 4, lane % 4) of a warp holds, of a
// unit, output channels g and g + 8 by slots 8t..8t+7: which of the 32 slots the instruction calls k = 0, 1, ... is
// free as long as both operands agree, and this choice makes a lane's activations 16 consecutive bytes.
#pragma once
#include "instructions.cuh"

namespace gptq {

// -- codes -> packed 16-bit floats
// -------------------------------------------------------------------------------------

// 2^p as two packed floats with p mantissa bits: OR-ing a code into one adds the code's value.
template <class T>
struct Magic;
template <>
struct Magic<F16> {
    static constexpr uint32_t bits = 0x64006400;  // 1024
};
template <>
struct Magic<BF16> {
    static constexpr uint32_t bits = 0x43004300;  // 128
};
constexpr uint32_t kFloatMagic = 0x4B000000;  // 2^23

// What `unpack` needs to turn a code into code - zero. `scaled`: -(64 + zero), of 4-bit codes that are OR-ed into fp16
// four bits too high: a sixteenth of such a number is 64 + code.
template <int Bits, class T>
struct Zero {
    uint32_t plain, scaled;

    DEVICE explicit Zero(uint32_t zero = 0) {
        // 8 bits do not fit beside bf16's 128: they go through float.
        plain = Bits == 8 && kSame<T, BF16> ? kFloatMagic + zero : Magic<T>::bits + zero * 0x00010001u;
        scaled = 0xD400D400 + zero * 0x00100010u;
    }
};
constexpr uint32_t kSixteenth = 0x2C002C00;  // two of fp16

// Codes minus zero, exact, as two packed floats: output channel g + 8 * half, slots 8t + 2 * pair + {0, 1} of the unit.
// words: the lane's of one tile, its codes in the order (half, unit, slot). In a word of b-bit codes, codes 2j and 2j +
// 1 begin at bits b*j and b*j + 16, so that one shift and one mask yield a pair.
template <int Bits, class T>
DEVICE uint32_t unpack(const uint32_t (&words)[Bits], int unit, int half, int pair, const Zero<Bits, T>& zero) {
    const int index = half * 8 + unit * 4 + pair;  // 0..15
    if constexpr (Bits == 8) {
        const uint32_t word = words[index / 2];
        const uint32_t low = index % 2, high = low + 2;
        if constexpr (kSame<T, BF16>) {
            const float first = as_float(permute_bytes(word, kFloatMagic, 0x7440 | low)) - as_float(zero.plain);
            const float second = as_float(permute_bytes(word, kFloatMagic, 0x7440 | high)) - as_float(zero.plain);
            return permute_bytes(as_bits(first), as_bits(second), 0x7632);  // below 256: truncation is exact
        } else {
            return subtract2<T>(permute_bytes(word, Magic<T>::bits, 0x5050 | high << 8 | low), zero.plain);
        }
    } else if constexpr (Bits == 4) {
        const uint32_t word = words[index / 4];
        if constexpr (kSame<T, F16>) {  // one shift for two pairs
            const uint32_t shifted = word >> index % 4 / 2 * 8;
            if (index % 2) return multiply_add2(and_or(shifted, 0x00F000F0, Magic<F16>::bits), kSixteenth, zero.scaled);
            return subtract2<F16>(and_or(shifted, 0x000F000F, Magic<F16>::bits), zero.plain);
        } else {
            return subtract2<T>(and_or(word >> 4 * (index % 4), 0x000F000F, Magic<T>::bits), zero.plain);
        }
    } else {
        uint32_t code = and_or(words[index / 8] >> 2 * (index % 8), 0x00030003, Magic<T>::bits);
        if constexpr (Bits == 3) code = and_or(rotate_right(words[2], index), 0x00040004, code);
        return subtract2<T>(code, zero.plain);
    }
}

// Words of a lane of one tile, from vectors of at most 16 bytes that are contiguous over the warp.
template <int Bits, class Load>
DEVICE void load_words(uint32_t (&words)[Bits], const uint32_t* tile, int lane, Load load) {
    if constexpr (Bits == 8) {
        load.template operator()<4>(words, tile + lane * 4);
        load.template operator()<4>(words + 4, tile + 128 + lane * 4);
    } else if constexpr (Bits == 3) {
        load.template operator()<2>(words, tile + lane * 2);
        load.template operator()<1>(words + 2, tile + 64 + lane);
    } else {
        load.template operator()<Bits>(words, tile + lane * Bits);
    }
}

// Of 8 bits, those of one unit.
template <class Load>
DEVICE void load_unit(uint32_t (&words)[8], const uint32_t* tile, int lane, int unit, Load load) {
    load.template operator()<2>(words + unit * 2, tile + lane * 4 + unit * 2);
    load.template operator()<2>(words + 4 + unit * 2, tile + 128 + lane * 4 + unit * 2);
}

// -- scales and zero points of a chunk
// ---------------------------------------------------------------------------------

// As loaded, so that the load can be under way while the chunk before is multiplied.
struct RawChunk {
    uint2 scales;
    uint32_t zeros;
};

// Where a lane finds those of output channels g and g + 8 of any strip.
struct ChunkPointer {
    const unsigned char* scales;
    const unsigned char* zeros;  // null when there are none
    uint32_t pitch;              // bytes of a chunk's scales

    DEVICE ChunkPointer(const Weight& w, int strip, int lane) {
        const int64_t at = int64_t(strip) * w.chunks * 8 + lane / 4;
        const int bytes = w.scales_dtype == kFloat32 ? 8 : 4;
        pitch = kept(bytes * 8);
        scales = kept(static_cast<const unsigned char*>(w.scales) + at * bytes);
        zeros = kept(w.zeros ? w.zeros + at * 2 : nullptr);
    }

    // chunk: counted from the strip's first.
    DEVICE RawChunk load(const Weight& w, uint32_t chunk) const {
        RawChunk raw{};
        const uint32_t* from = reinterpret_cast<const uint32_t*>(scales + chunk * uint64_t(pitch));
        raw.scales.x = load_cached(from);
        if (w.scales_dtype == kFloat32) raw.scales.y = load_cached(from + 1);
        if (w.zeros) raw.zeros = load_cached(reinterpret_cast<const uint16_t*>(zeros + chunk * uint64_t(16)));
        return raw;
    }
};

// Scales of output channels g and g + 8 of some strips.
template <int Strips>
DEVICE void scales_of(float2 (&scales)[Strips], const RawChunk (&raw)[Strips], Dtype dtype) {
    if (dtype == kFloat16) {
#pragma unroll
        for (int s = 0; s < Strips; ++s)
            scales[s] = {f16_to_float(raw[s].scales.x & 0xFFFF), f16_to_float(raw[s].scales.x >> 16)};
    } else if (dtype == kBFloat16) {
#pragma unroll
        for (int s = 0; s < Strips; ++s)
            scales[s] = {as_float(raw[s].scales.x << 16), as_float(raw[s].scales.x & 0xFFFF0000)};
    } else {
#pragma unroll
        for (int s = 0; s < Strips; ++s) scales[s] = {as_float(raw[s].scales.x), as_float(raw[s].scales.y)};
    }
}

template <int Bits, class T>
DEVICE void zeros_of(Zero<Bits, T> (&zeros)[2], const RawChunk& raw, bool stored) {
    zeros[0] = Zero<Bits, T>(stored ? raw.zeros & 0xFF : 1u << (Bits - 1));
    zeros[1] = Zero<Bits, T>(stored ? raw.zeros >> 8 : 1u << (Bits - 1));
}

// -- a warp's sums
// -----------------------------------------------------------------------------------------------------

// Which units a warp multiplies, by windows of some tiles: all of each window.
template <int Tiles>
struct Every {
    static constexpr int kWindow = Tiles * 2;

    // The first of the warp's units at or after another. Units are counted from the first of a window.
    static DEVICE int following(int unit) { return unit; }
};

// Likewise, but after each window comes one of another warp.
template <int Tiles>
struct EveryOther {
    static constexpr int kUnits = Tiles * 2, kWindow = kUnits * 2;
    static_assert((kUnits & (kUnits - 1)) == 0 && kUnits <= 8);  // up to 15, Sums::reciprocal is exact

    static DEVICE int following(int unit) { return unit & kUnits ? (unit + kUnits) & -kUnits : unit; }
};

// Sums of a warp over `Strips` strips by `Tokens` * 8 tokens. The products of a chunk are summed as integers times
// activations, and scaled once: more exact than rounding scaled weights to 16 bits, and cheaper.
//
// Units are counted from the first of the warp's window (Windows: above), so that most of what is compared are
// constants.
template <int Bits, class T, int Strips, int Tokens, class Windows>
struct Sums {
    float total[Strips][Tokens][4];
    float part[Strips][Tokens][4];
    float2 scales[Strips];
    Zero<Bits, T> zeros[Strips][2];
    RawChunk next[Strips];
    ChunkPointer from;  // of the first strip
    int chunk_end;      // first unit after the current chunk
    int next_end;       // and after the one that `next` holds
    int next_chunk;     // which that is
    int reciprocal;     // of a chunk's units, times 256, rounded up
    int strips;         // of the warp that there are

    // first_strip: of the warp. first_unit: of its first window, among all.
    DEVICE Sums(const Weight& w, int first_strip, int first_unit, int lane)
        : from(w, first_strip < w.strips ? first_strip : 0, lane) {
#pragma unroll
        for (int s = 0; s < Strips; ++s) {
#pragma unroll
            for (int t = 0; t < Tokens; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[s][t][i] = part[s][t][i] = 0.f;
            scales[s] = {0.f, 0.f};
            next[s] = {};
            zeros_of<Bits, T>(zeros[s], next[s], false);
        }
        strips = w.strips - first_strip;
        reciprocal = (256 + w.chunk_units - 1) / w.chunk_units;
        next_chunk = first_unit / w.chunk_units;
        next_end = (next_chunk + 1) * w.chunk_units - first_unit;
        chunk_end = 0;
        fetch(w);
    }

    // Add the products of a unit of the window. words: of its tile. x: (t) -> the lane's 16 bytes of activations of
    // token block t.
    template <class Activations>
    DEVICE void add(const Weight& w, const uint32_t (&words)[Strips][Bits], int unit, Activations x) {
        if (unit < chunk_end) {
            multiply<false>(words, unit % 2, x);
        } else {
            enter(w);
            multiply<true>(words, unit % 2, x);
        }
    }

    // To the next window.
    DEVICE void advance() {
        chunk_end -= Windows::kWindow;
        next_end -= Windows::kWindow;
    }

    // Add the current chunk's products to the totals.
    DEVICE void flush() {
#pragma unroll
        for (int s = 0; s < Strips; ++s)
#pragma unroll
            for (int t = 0; t < Tokens; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[s][t][i] += (i < 2 ? scales[s].x : scales[s].y) * part[s][t][i];
    }

  private:
    // To the next chunk, whose first products overwrite `part`.
    DEVICE void enter(const Weight& w) {
        flush();
        scales_of(scales, next, w.scales_dtype);
        if (w.zeros)
#pragma unroll
            for (int s = 0; s < Strips; ++s) zeros_of<Bits, T>(zeros[s], next[s], true);
        chunk_end = next_end;
        // Chunks of which the warp has nothing are skipped.
        const uint32_t skipped = (Windows::following(chunk_end) - chunk_end) * reciprocal / 256u;
        next_chunk += 1 + skipped;
        next_end += (1 + skipped) * w.chunk_units;
        fetch(w);
    }

    // First: of a chunk.
    template <bool First, class Activations>
    DEVICE void multiply(const uint32_t (&words)[Strips][Bits], int unit, Activations x) {
        uint32_t a[Strips][2][4];
#pragma unroll
        for (int s = 0; s < Strips; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                a[s][i / 4][i % 4] = unpack<Bits, T>(words[s], unit, i % 2, i / 2, zeros[s][i % 2]);
        constexpr float kNothing[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
            const uint4 b = x(t);
#pragma unroll
            for (int s = 0; s < Strips; ++s) {
                if constexpr (First)
                    mma<T>(part[s][t], a[s][0], b.x, b.y, kNothing);
                else
                    mma<T>(part[s][t], a[s][0], b.x, b.y, part[s][t]);
                mma<T>(part[s][t], a[s][1], b.z, b.w, part[s][t]);
            }
        }
    }

    DEVICE void fetch(const Weight& w) {
        const int chunk = next_chunk < w.chunks ? next_chunk : w.chunks - 1;
#pragma unroll
        for (int s = 0; s < Strips; ++s)  // for strips that there are not, those of the first: nobody looks at them
            next[s] = from.load(w, s < strips ? s * w.chunks + chunk : chunk);
    }
};

}  // namespace gptq
