// What the tests set from outside.
#include "instructions.cuh"

extern "C" __attribute__((visibility("default"))) void emulator_seed(uint64_t seed) {
    emulator::seed = seed;
}
