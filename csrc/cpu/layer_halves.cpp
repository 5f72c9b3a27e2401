#include "layer_halves.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "gemm.h"
#include "row_sharing.h"
#include "scratch.h"

namespace gptq {
namespace {

void start(const LayerStart& layer, const Rows& whole, const void* x, const void* residual, void* y, void* sum,
           int threads) {
    const size_t row_bytes = size_t(whole.width) * size_of(whole.dtype);
    const Rows results = {whole.dtype, 0, layer.outputs()};
    in_parts(whole, [&](const Rows& some, int first) {
        char* const total = row_of(sum, whole, first);
        char* const from = const_cast<char*>(row_of(x, whole, first));  // only a norm would write to it
        if (residual) {
            add(nullptr, 1.0f, some, row_of(residual, whole, first), from, total, threads);
        } else {
            std::memcpy(total, from, some.rows * row_bytes);
        }
        char* const to = row_of(y, results, first);
        if (layer.inputs.size() == 1) {
            project(some, total, layer.norm, layer.inputs, {to}, threads);
            return;
        }
        // Each product has rows of its own, which then are put side by side.
        thread_local Scratch<char> kept;
        const size_t size = size_of(whole.dtype);
        char* place = kept.reserve(size_t(some.rows) * results.width * size);
        std::vector<void*> apart;
        for (const Linear* each : layer.inputs) {
            apart.push_back(place);
            place += size_t(some.rows) * each->weight.out_features * size;
        }
        project(some, total, layer.norm, layer.inputs, apart, threads);
        size_t column = 0;
        for (size_t i = 0; i < apart.size(); ++i) {
            const size_t bytes = layer.inputs[i]->weight.out_features * size;
            for (int row = 0; row < some.rows; ++row) {
                std::memcpy(to + row * results.width * size + column, static_cast<char*>(apart[i]) + row * bytes,
                            bytes);
            }
            column += bytes;
        }
    });
}

template <class Half>
class Numbered {
  public:
    void keep(int64_t key, const Half& half) {
        std::unique_lock lock(mutex_);
        halves_.insert_or_assign(key, half);
    }
    void forget(int64_t key) {
        std::unique_lock lock(mutex_);
        halves_.erase(key);
    }
    const Half* find(int64_t key) {
        std::shared_lock lock(mutex_);
        const auto found = halves_.find(key);
        return found == halves_.end() ? nullptr : &found->second;
    }

  private:
    std::shared_mutex mutex_;
    std::unordered_map<int64_t, Half> halves_;
};

Numbered<LayerStart>& starts() {
    static auto* const all = new Numbered<LayerStart>;  // outlives whoever forgets a number at the end of the process
    return *all;
}

Numbered<const Tail*>& ends() {
    static auto* const all = new Numbered<const Tail*>;
    return *all;
}

}  // namespace

void start_layer(const LayerStart& layer, const Rows& shape, const void* x, const void* residual, void* y, void* sum,
                 int threads) {
    const int64_t work = int64_t(shape.rows) * shape.width * layer.outputs();
    Crew::with(threads, work >= kSerialWork, [&] { start(layer, shape, x, residual, y, sum, threads); });
}

void keep_start(int64_t key, const LayerStart& start) {
    starts().keep(key, start);
}

void keep_end(int64_t key, const Tail& end) {
    ends().keep(key, &end);
}

void forget_half(int64_t key) {
    starts().forget(key);
    ends().forget(key);
}

const LayerStart* find_start(int64_t key) {
    return starts().find(key);
}

const Tail* find_end(int64_t key) {
    const Tail* const* const found = ends().find(key);
    return found ? *found : nullptr;
}

}  // namespace gptq
