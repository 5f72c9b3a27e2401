#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace ptx {
namespace {

std::string thread_name(int thread) {
    return "thread " + std::to_string(thread);
}

[[noreturn]] void fail(const Access& who, uint64_t at, const std::string& what) {
    char address[32];
    std::snprintf(address, sizeof address, "%#llx", static_cast<unsigned long long>(at));
    throw Fault(thread_name(who.thread) + ", address " + address + ": " + what);
}

// Whether no barrier lies between an earlier access and this one.
bool unordered(int thread, uint32_t barriers, uint32_t warp_barriers, const Access& who) {
    if (thread < 0 || thread == who.thread || barriers != who.barriers) return false;
    return thread / 32 != who.thread / 32 || warp_barriers == who.warp_barriers;
}

// Of a thread in the whole grid, from 1.
int64_t number(const Access& who) {
    return int64_t(who.block) << 32 | (who.thread + 1);
}

}  // namespace

// -- shared

SharedMemory::SharedMemory(size_t bytes) : bytes_(bytes, 0xFF), traces_(bytes) {}

size_t SharedMemory::offset(uint64_t at, int bytes, const Access& who) const {
    if (at < kBase || at - kBase + bytes > bytes_.size())
        fail(who, at, "outside of the " + std::to_string(bytes_.size()) + " bytes of shared memory");
    if (at % bytes) fail(who, at, "a misaligned access to shared memory");
    return at - kBase;
}

void SharedMemory::read(uint64_t at, int bytes, unsigned char* to, const Access& who) {
    const size_t first = offset(at, bytes, who);
    for (size_t i = first; i < first + bytes; ++i) {
        Trace& trace = traces_[i];
        if (trace.in_flight) fail(who, at, "a race: an asynchronous copy to what is read has not been waited for");
        if (!trace.written) fail(who, at, "shared memory that was never written is read");
        if (unordered(trace.writer, trace.write_barriers, trace.write_warp_barriers, who))
            fail(who, at, "a race: read after a write of " + thread_name(trace.writer) + " without a barrier");
        if (trace.reader < 0 || trace.read_barriers != who.barriers) {
            trace.more_lanes = trace.more_warps = false;
            trace.reader = who.thread;
        } else if (trace.reader / 32 != who.thread / 32) {
            trace.more_warps = true;
            continue;
        } else if (trace.reader != who.thread) {
            trace.more_lanes = true;
        }
        trace.read_barriers = who.barriers;
        trace.read_warp_barriers = who.warp_barriers;
    }
    std::memcpy(to, &bytes_[first], bytes);
}

void SharedMemory::check_write(const Trace& trace, size_t offset, bool same_value, const Access& who) const {
    const uint64_t at = offset + kBase;
    if (trace.in_flight) fail(who, at, "a race: an asynchronous copy to what is written has not been waited for");
    if (!same_value && unordered(trace.writer, trace.write_barriers, trace.write_warp_barriers, who))
        fail(who, at, "a race: written after a write of " + thread_name(trace.writer) + " without a barrier");
    if (trace.reader < 0 || trace.read_barriers != who.barriers) return;
    const bool other_warp = trace.more_warps || trace.reader / 32 != who.thread / 32;
    const bool other_lane = trace.more_lanes || trace.reader != who.thread;
    if (other_warp || (other_lane && trace.read_warp_barriers == who.warp_barriers))
        fail(who, at, "a race: written after a read of " + thread_name(trace.reader) + " or another without a barrier");
}

void SharedMemory::record_write(Trace& trace, const Access& who) {
    trace.writer = who.thread;
    trace.write_barriers = who.barriers;
    trace.write_warp_barriers = who.warp_barriers;
}

void SharedMemory::write(uint64_t at, int bytes, const unsigned char* from, const Access& who) {
    const size_t first = offset(at, bytes, who);
    for (int i = 0; i < bytes; ++i) {
        Trace& trace = traces_[first + i];
        check_write(trace, first + i, trace.written && bytes_[first + i] == from[i], who);
        record_write(trace, who);
        trace.written = true;
        bytes_[first + i] = from[i];
    }
}

void SharedMemory::start_copy(uint64_t at, int bytes, const Access& who) {
    const size_t first = offset(at, bytes, who);
    for (size_t i = first; i < first + bytes; ++i) {
        check_write(traces_[i], i, false, who);
        traces_[i].in_flight = true;
    }
}

void SharedMemory::land_copy(uint64_t at, int bytes, const unsigned char* from, const Access& who) {
    const size_t first = offset(at, bytes, who);
    for (int i = 0; i < bytes; ++i) {
        Trace& trace = traces_[first + i];
        record_write(trace, who);
        trace.in_flight = false;
        trace.written = true;
        bytes_[first + i] = from[i];
    }
}

// -- global

void GlobalMemory::add(uintptr_t start, size_t bytes) {
    tensors_.push_back({start, bytes, {}});
}

void GlobalMemory::start_launch() {
    for (Tensor& each : tensors_) each.writers.clear();
}

uint64_t GlobalMemory::translate(uint64_t word) const {
    for (size_t i = 0; i < tensors_.size(); ++i)
        if (word - tensors_[i].start < tensors_[i].bytes)
            return kBase + (uint64_t(i) << kShift) + word - tensors_[i].start;
    return word;
}

size_t GlobalMemory::locate(uint64_t at, int bytes, const Access& who) const {
    const uint64_t tensor = (at - kBase) >> kShift, offset = at & kOffset;
    if (tensor >= tensors_.size()) fail(who, at, "global memory outside of every tensor");
    const size_t size = tensors_[tensor].bytes;
    if (offset + bytes > size)
        fail(who, at, "byte " + std::to_string(offset) + " of a tensor of " + std::to_string(size) + " bytes");
    if (at % bytes) fail(who, at, "a misaligned access to global memory");
    return tensor;
}

void GlobalMemory::read(uint64_t at, int bytes, unsigned char* to, const Access& who) const {
    const Tensor& from = tensors_[locate(at, bytes, who)];
    const uint64_t offset = at & kOffset;
    for (int i = 0; i < bytes && !from.writers.empty(); ++i)
        if (from.writers[offset + i] && from.writers[offset + i] != number(who))
            fail(who, at, "a race: global memory that another thread has written is read");
    std::memcpy(to, reinterpret_cast<const void*>(from.start + offset), bytes);
}

void GlobalMemory::write(uint64_t at, int bytes, const unsigned char* from, const Access& who) {
    Tensor& to = tensors_[locate(at, bytes, who)];
    const uint64_t offset = at & kOffset;
    unsigned char* const target = reinterpret_cast<unsigned char*>(to.start + offset);
    if (to.writers.empty()) to.writers.assign(to.bytes, 0);
    for (int i = 0; i < bytes; ++i) {
        int64_t& writer = to.writers[offset + i];
        if (writer && writer != number(who) && target[i] != from[i])
            fail(who, at, "a race: global memory that another thread has written is written");
        writer = number(who);
        target[i] = from[i];
    }
}

}  // namespace ptx
