// Operations of PTX that a warp or a block does together: barriers, jumps, shuffles, and the matrix instructions with
// their layouts of registers (PTX ISA, "Warp Level Matrix Instructions").
#include "half.h"
#include "machine.h"

namespace ptx {
namespace {

void need_all_lanes(Mask mask) {
    if (mask != ~Mask{0}) throw Fault("lanes of the warp have ended or are switched off here");
}

// D = A B + C. A: 16 x K, B: K x 8, 16-bit floats; C, D: 16 x 8 float. Operands: 4 registers of D, K / 4 of A, K / 8 of
// B, 4 of C. With g = lane / 4 and t = lane % 4, register i of A holds row g + i % 2 * 8, columns 2t and 2t + 1 from
// i / 2 * 8 on; register i of B rows 2t and 2t + 1 from i * 8 on, column g; of C and D row g + i / 2 * 8, column
// 2t + i % 2.
template <class T, int K>
void multiply_matrices(Warp& warp, const Instruction& i, Mask mask) {
    need_all_lanes(mask);
    const Slot *const d = &i.operands[0], *const a = d + 4, *const b = a + K / 4, *const c = b + K / 8;
    float left[16][K], right[K][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < K / 4; ++r) {
            const uint32_t pair = warp.get<uint32_t>(a[r], lane);
            left[g + r % 2 * 8][r / 2 * 8 + 2 * t] = T::to_float(pair & 0xFFFF);
            left[g + r % 2 * 8][r / 2 * 8 + 2 * t + 1] = T::to_float(pair >> 16);
        }
        for (int r = 0; r < K / 8; ++r) {
            const uint32_t pair = warp.get<uint32_t>(b[r], lane);
            right[r * 8 + 2 * t][g] = T::to_float(pair & 0xFFFF);
            right[r * 8 + 2 * t + 1][g] = T::to_float(pair >> 16);
        }
    }
    double sums[16][8];
    for (int r = 0; r < 4; ++r)
        for (int lane = 0; lane < kLanes; ++lane)
            sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = warp.get<float>(c[r], lane);
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int column = 0; column < 8; ++column) sums[row][column] += double(left[row][k]) * right[k][column];
    for (int r = 0; r < 4; ++r)
        for (int lane = 0; lane < kLanes; ++lane)
            warp.set(d[r], lane, float(sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]));
}

// Count matrices of 8 x 8 16-bit numbers; lane 8 m + r has the address of row r of matrix m. A lane gets row lane / 4,
// columns 2 (lane % 4) and the next one, or of the transposed matrix.
template <int Count, bool Transposed>
void load_matrices(Warp& warp, const Instruction& i, Mask mask) {
    need_all_lanes(mask);
    uint32_t rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        rows[lane] =
            uint32_t(warp.get<uint64_t>(i.operands[Count], lane) + warp.get<uint64_t>(i.operands[Count + 1], lane));
    for (int lane = 0; lane < kLanes; ++lane)
        for (int m = 0; m < Count; ++m) {
            uint16_t pair[2];
            for (int n = 0; n < 2; ++n) {
                const int major = lane / 4, minor = lane % 4 * 2 + n;
                const uint32_t row = rows[m * 8 + (Transposed ? minor : major)];
                if (row % 16) throw Fault("a misaligned row of a matrix");
                unsigned char bytes[2];
                warp.block.shared.read(row + (Transposed ? major : minor) * 2, 2, bytes, warp.access(lane));
                std::memcpy(&pair[n], bytes, 2);
            }
            warp.set(i.operands[m], lane, pair[0] | uint32_t(pair[1]) << 16);
        }
}

// Operands: result, value, bits to flip of the lane's number (Flip) or the number of a lane, 31, all lanes.
template <bool Flip>
void shuffle(Warp& warp, const Instruction& i, Mask mask) {
    need_all_lanes(mask);
    uint32_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        if (warp.get<uint32_t>(i.operands[3], lane) != 31 || warp.get<uint32_t>(i.operands[4], lane) != ~0u)
            throw Fault("a shuffle of a part of the warp is not supported");
        values[lane] = warp.get<uint32_t>(i.operands[1], lane);
    }
    for (int lane = 0; lane < kLanes; ++lane)
        warp.set(i.operands[0], lane, values[((Flip ? lane : 0) ^ warp.get<uint32_t>(i.operands[2], lane)) % kLanes]);
}

template <class T>
void add_matrices(Operations& to, const std::string& type) {
    const std::string tail = ".row.col.f32." + type + "." + type + ".f32";
    to["mma.sync.aligned.m16n8k16" + tail] = {Kind::warp, multiply_matrices<T, 16>};
    to["mma.sync.aligned.m16n8k8" + tail] = {Kind::warp, multiply_matrices<T, 8>};
}

}  // namespace

void add_warp_operations(Operations& to) {
    const auto nothing = [](Warp&, const Instruction&, Mask) {};
    to["bra"] = {Kind::branch, nothing};
    to["ret"] = to["exit"] = {Kind::exit, nothing};
    to["bar.sync"] = to["barrier.sync"] = {Kind::block, nothing};
    to["bar.warp.sync"] = {Kind::warp, [](Warp& warp, const Instruction&, Mask) { ++warp.barriers; }};
    to["shfl.sync.bfly.b32"] = {Kind::warp, shuffle<true>};
    to["shfl.sync.idx.b32"] = {Kind::warp, shuffle<false>};
    add_matrices<Half>(to, "f16");
    add_matrices<BHalf>(to, "bf16");
    to["ldmatrix.sync.aligned.m8n8.x1.shared.b16"] = {Kind::warp, load_matrices<1, false>};
    to["ldmatrix.sync.aligned.m8n8.x2.shared.b16"] = {Kind::warp, load_matrices<2, false>};
    to["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = {Kind::warp, load_matrices<4, false>};
    to["ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16"] = {Kind::warp, load_matrices<1, true>};
    to["ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16"] = {Kind::warp, load_matrices<2, true>};
    to["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {Kind::warp, load_matrices<4, true>};
}

}  // namespace ptx
