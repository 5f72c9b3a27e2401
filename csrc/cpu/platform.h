// What the system and the running CPU are asked for; platform.cpp knows how each system answers.
#pragma once

#include <cstddef>

namespace gptq {

// Levels whose instructions the CPU has and whose registers the system saves; false for those of another kind of CPU.
struct Features {
    bool avx2, avx_vnni, avx512, avx512_vnni;  // avx2: with FMA and F16C; avx512: F, BW, VL and DQ
    bool neon, neon_dotprod, neon_i8mm;        // each with those before it
};

Features cpu_features();

// Seconds that the calling thread has computed.
double thread_seconds();

// Asks for whole pages of 2 MB inside some memory, before it is written to: thousands of small ones per product would
// evict the translations of everything else, the calling Python's included. Advice only, hence no error.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace gptq
