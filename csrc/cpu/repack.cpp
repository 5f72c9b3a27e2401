// Checkpoint words <-> strips of words, and the dense weight.
#include <cstring>

#include "gemm.h"
#include "platform.h"

namespace gptq {
namespace {

// Where code `i` of a run lies: word of the run, shift, and for 3 bits also the shift in the high plane (word 2).
// The inverse of Codes::step in kernel_impl.h.
struct Field {
    int word, shift, high;
};

Field field_of(int bits, int i) {
    const int run = bits == 3 ? 16 : 32 / bits, word = i / run, k = i % run;
    const int field = k % 2 * (run / 2) + k / 2;  // channels 2j and 2j + 1 lie half a word apart
    return {word, field * (bits == 3 ? 2 : bits), word + 2 * (field % 4) + 8 * (field / 4)};
}

int run_of(int bits) {
    return bits == 3 ? 32 : 32 / bits;
}
int words_of(int bits) {
    return bits == 3 ? 3 : 1;
}

void put(int bits, const Field& f, uint32_t code, uint32_t* word) {
    if (bits != 3) {
        word[0] |= code << f.shift;
        return;
    }
    word[f.word * kStrip] |= (code & 3) << f.shift;
    word[2 * kStrip] |= (code >> 2) << f.high;
}

uint32_t get(int bits, const Field& f, const uint32_t* word) {
    if (bits != 3) return (word[0] >> f.shift) & ((1u << bits) - 1);
    return ((word[f.word * kStrip] >> f.shift) & 3) | (((word[2 * kStrip] >> f.high) & 1) << 2);
}

// visit(strip, channels, words of the run, field, input channel) for every slot that is not padding.
template <class Visit>
void for_each_slot(const Weight& w, int strip, int channels_in, uint32_t* words, Visit visit) {
    const int run = run_of(w.bits);
    Field fields[32];
    for (int i = 0; i < run; ++i) fields[i] = field_of(w.bits, i);
    words += size_t(strip) * (w.slots / 32) * w.bits * kStrip;
    for (int k = 0; k < w.slots; k += run, words += words_of(w.bits) * kStrip) {
        for (int i = 0; i < run; ++i) {
            const int channel = w.perm ? w.perm[k + i] : k + i;
            if (channel >= 0 && channel < channels_in) visit(words, fields[i], k + i, channel);
        }
    }
}

int width_of(const Weight& w, int strip) {
    return w.out_features - strip * kStrip < kStrip ? w.out_features - strip * kStrip : kStrip;
}

template <class T>
void pack_as(const Repack& r, int threads) {
    const Weight& w = *r.weight;
    const int per_row = r.word_bits / r.field_bits;
    const uint32_t mask = (1u << r.field_bits) - 1;
    const T* source = static_cast<const T*>(r.source);
    const size_t strip_words = size_t(w.slots / 32) * w.bits * kStrip;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int strip = 0; strip < w.strips(); ++strip) {
        const int width = width_of(w, strip);
        std::memset(r.words + strip * strip_words, 0, strip_words * sizeof(uint32_t));
        for_each_slot(w, strip, r.source_rows * per_row, r.words,
                      [&](uint32_t* words, const Field& field, int, int channel) {
                          const T* row = source + size_t(channel / per_row) * w.out_features + strip * kStrip;
                          const int shift = channel % per_row * r.field_bits;
                          for (int i = 0; i < width; ++i) put(w.bits, field, (row[i] >> shift) & mask, words + i);
                      });
    }
}

template <class T>
void unpack_as(const Repack& r, int threads) {
    const Weight& w = *r.weight;
    const int per_row = r.word_bits / r.field_bits;
    T* source = static_cast<T*>(r.source);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int strip = 0; strip < w.strips(); ++strip) {
        const int width = width_of(w, strip);
        for (int row = 0; row < r.source_rows; ++row) {
            std::memset(source + size_t(row) * w.out_features + strip * kStrip, 0, width * sizeof(T));
        }
        for_each_slot(w, strip, r.source_rows * per_row, r.words,
                      [&](uint32_t* words, const Field& field, int, int channel) {
                          T* row = source + size_t(channel / per_row) * w.out_features + strip * kStrip;
                          const int shift = channel % per_row * r.field_bits;
                          for (int i = 0; i < width; ++i) {
                              row[i] = T(row[i] | (get(w.bits, field, words + i) << shift));
                          }
                      });
    }
}

}  // namespace

void pack(const Repack& r, int threads) {
    advise_huge_pages(r.words, size_t(r.weight->strips()) * (r.weight->slots / 32) * r.weight->bits * kStrip * 4);
    r.word_bits == 8 ? pack_as<uint8_t>(r, threads) : pack_as<uint32_t>(r, threads);
}

void unpack(const Repack& r, int threads) {
    r.word_bits == 8 ? unpack_as<uint8_t>(r, threads) : unpack_as<uint32_t>(r, threads);
}

}  // namespace gptq
