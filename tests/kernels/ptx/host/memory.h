// The memories of a launch, each access checked: what compute-sanitizer's memcheck, racecheck and initcheck would say.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What a program may not do. The scheduler adds where.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Who accesses memory, and when: barriers of the block and of the thread's warp that are behind it.
struct Access {
    int thread;  // in its block
    int block;   // in the grid
    uint32_t barriers, warp_barriers;
};

// Shared memory of a block. Two accesses to a byte, one of them a write, by two threads without a barrier in between
// are a race; writing a value that is there already is none. A byte that an asynchronous copy is going to write is
// nobody's until the copying thread has waited.
class SharedMemory {
  public:
    static constexpr uint64_t kBase = 0x400;  // of its addresses, so that 0 is none

    explicit SharedMemory(size_t bytes);
    // bytes: 1 to 16, a power of two that divides the address.
    void read(uint64_t at, int bytes, unsigned char* to, const Access& who);
    void write(uint64_t at, int bytes, const unsigned char* from, const Access& who);
    void start_copy(uint64_t at, int bytes, const Access& who);
    void land_copy(uint64_t at, int bytes, const unsigned char* from, const Access& who);

  private:
    // Of a byte.
    struct Trace {
        int writer = -1, reader = -1;  // the last ones
        uint32_t write_barriers = 0, write_warp_barriers = 0, read_barriers = 0, read_warp_barriers = 0;
        bool more_lanes = false, more_warps = false;  // have read it since the last barrier, beside `reader`
        bool written = false, in_flight = false;
    };

    size_t offset(uint64_t at, int bytes, const Access& who) const;
    void check_write(const Trace& trace, size_t offset, bool same_value, const Access& who) const;
    static void record_write(Trace& trace, const Access& who);

    std::vector<unsigned char> bytes_;
    std::vector<Trace> traces_;
};

// The tensors that a launch may touch. Addresses are made up: each tensor has a part of the address space of its own,
// so that no mistake leads from one to another.
class GlobalMemory {
  public:
    void add(uintptr_t start, size_t bytes);
    void clear() { tensors_.clear(); }
    void start_launch();
    // An argument's 8 bytes: the made-up address, if they are an address inside of a tensor.
    uint64_t translate(uint64_t word) const;
    // A thread may not read what another one of the launch writes, nor write something else there.
    void read(uint64_t at, int bytes, unsigned char* to, const Access& who) const;
    void write(uint64_t at, int bytes, const unsigned char* from, const Access& who);
    void check(uint64_t at, int bytes, const Access& who) const { locate(at, bytes, who); }

  private:
    struct Tensor {
        uintptr_t start;
        size_t bytes;
        std::vector<int64_t> writers;  // of each byte in this launch; empty: none of any
    };
    static constexpr uint64_t kBase = uint64_t{1} << 62;  // no real address is as high
    static constexpr int kShift = 40;                     // of a tensor's number in an address
    static constexpr uint64_t kOffset = (uint64_t{1} << kShift) - 1;

    // -> which tensor.
    size_t locate(uint64_t at, int bytes, const Access& who) const;

    std::vector<Tensor> tensors_;
};

}  // namespace ptx
