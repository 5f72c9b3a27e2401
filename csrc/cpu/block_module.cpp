// Python bindings of block.h. Tensors arrive as addresses and sizes. gptq_backend/kernels/cpu_block.py checks the
// tensors; numbers are checked here, where it costs nothing. std::invalid_argument becomes a ValueError. What may be
// None is a pointer, what may not a reference.
#include "block_module.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dense.h"
#include "layer_halves.h"

namespace gptq {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Linear linear(uintptr_t words, uintptr_t scales, int scales_dtype, uintptr_t zeros, uintptr_t perm, uintptr_t blocks,
              int bits, int in_features, int out_features, int slots, int groups, int n_blocks, uintptr_t bias,
              int bias_dtype, bool a8) {
    return {{at<uint32_t>(words), at<void>(scales), at<uint8_t>(zeros), at<int32_t>(perm), at<int32_t>(blocks),
             Dtype(scales_dtype), bits, in_features, out_features, slots, groups, n_blocks},
            at<void>(bias),
            Dtype(bias_dtype),
            a8};
}

Norm norm(uintptr_t weight, uintptr_t bias, int dtype, float eps, float offset, bool centered, int size) {
    return {at<void>(weight), at<void>(bias), Dtype(dtype), eps, offset, centered, size};
}

[[noreturn]] void refuse(const char* what, int found, const char* expected, int limit) {
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(found) + "; expected " + expected + " " +
                                std::to_string(limit));
}

void check_size(const Norm* norm, int size) {
    if (norm && norm->size && norm->size != size) refuse("the size of a norm", norm->size, "that of its input,", size);
}

void check_inputs(const char* what, const Linear& linear, int width) {
    if (linear.weight.in_features != width)
        refuse(what, linear.weight.in_features, "the width of what it reads,", width);
}

void check_head(const char* what, int channels) {
    if (channels > kMaxHead) refuse(what, channels, "at most", kMaxHead);
}

void check_turning(const Rotary& rotary, int head_dim) {
    const int channels = rotary.channels();
    if (channels % 2 || channels > head_dim) refuse("channels that turn", channels, "an even number up to", head_dim);
    check_head("channels that turn", channels);
}

void project_rows(int dtype, int rows, int width, uintptr_t x, const Norm* norm,
                  const std::vector<const Linear*>& weights, const std::vector<uintptr_t>& ys, int threads) {
    check_size(norm, width);
    if (ys.size() != weights.size()) refuse("results", int(ys.size()), "one for each weight,", int(weights.size()));
    for (const Linear* each : weights) check_inputs("inputs of a weight", *each, width);
    std::vector<void*> to;
    for (uintptr_t y : ys) to.push_back(at<void>(y));
    project({Dtype(dtype), rows, width}, at<void>(x), norm, weights, to, threads);
}

void rotate_rows(int dtype, int rows, int width, uintptr_t x, int heads, const Norm* norm, int angles_dtype, int dims,
                 int pairs, int positions, uintptr_t cos, uintptr_t sin, int threads) {
    if (heads <= 0 || width % heads) refuse("the number of heads", heads, "a divisor of", width);
    check_size(norm, width / heads);
    const Rotary rotary = {Dtype(angles_dtype), dims, Pairs(pairs)};
    check_turning(rotary, width / heads);
    rotate({Dtype(dtype), rows, width}, heads, norm, rotary, positions, at<void>(cos), at<void>(sin), at<void>(x),
           threads);
}

// How many experts a row chooses.
int tail_ids(const Tail& tail) {
    return tail.mixture ? tail.mixture->router->top_k : 0;
}

using Strides = std::array<int64_t, 4>;  // the last is 1

template <size_t N>
void copy(const Strides& from, int64_t (&to)[N]) {
    std::copy_n(from.begin(), N, to);
}

void attend_rows(int dtype, const std::array<int, 7>& sizes, uintptr_t q, const Strides& q_strides, uintptr_t keys,
                 const Strides& k_strides, uintptr_t values, const Strides& v_strides, uintptr_t mask,
                 bool mask_is_bool, const std::array<int64_t, 2>& mask_strides, float scale, float softcap,
                 uintptr_t sinks, int sinks_dtype, uintptr_t out, int threads) {
    Attention a{};
    a.q = at<void>(q), a.keys = at<void>(keys), a.values = at<void>(values), a.out = at<void>(out);
    a.dtype = Dtype(dtype);
    a.batch = sizes[0], a.rows = sizes[1], a.heads = sizes[2], a.kv_heads = sizes[3];
    a.head_dim = sizes[4], a.value_dim = sizes[5], a.length = sizes[6];
    copy(q_strides, a.q_strides);
    copy(k_strides, a.k_strides);
    copy(v_strides, a.v_strides);
    std::copy_n(mask_strides.begin(), 2, a.mask_strides);
    a.mask = at<void>(mask), a.mask_is_bool = mask_is_bool;
    a.scale = scale, a.softcap = softcap;
    a.sinks = at<void>(sinks), a.sinks_dtype = Dtype(sinks_dtype);
    if (a.kv_heads <= 0 || a.heads % a.kv_heads)
        refuse("heads of q", a.heads, "a multiple of those of keys,", a.kv_heads);
    check_head("the head size of q", a.head_dim);
    check_head("the head size of values", a.value_dim);
    attend(a, threads);
}

void finish_rows(const Tail& tail, int dtype, int rows, int width, uintptr_t x, uintptr_t residual, uintptr_t y,
                 uintptr_t ids, int threads) {
    if (tail.mixture && rows && !ids) refuse("the address of ids", 0, "room for the experts of a row,", tail_ids(tail));
    finish_layer(tail, {Dtype(dtype), rows, width}, at<void>(x), at<void>(residual), at<void>(y), at<int32_t>(ids),
                 threads);
}

Output output(const Linear& o, const Norm* after_attention, const Norm* before_mlp, float factor, bool parallel) {
    return {&o, after_attention, before_mlp, factor, parallel};
}

void finish_attention_rows(const Output& output, int dtype, int rows, int width, uintptr_t x, uintptr_t residual,
                           uintptr_t h, uintptr_t n, int threads) {
    finish_attention(output, {Dtype(dtype), rows, width}, at<void>(x), at<void>(residual), at<void>(h), at<void>(n),
                     threads);
}

ExpertMLPs expert_mlps(const Linear& gate_up, int parts, int count, int activation, const Linear& down) {
    const int outputs = parts * gate_up.weight.out_features, inner = down.weight.in_features;
    if (parts < 1 || count < 1 || (outputs != inner && outputs != 2 * inner)) {
        refuse("outputs of gate and up", outputs, "once or twice the inputs of down,", inner);
    }
    if (gate_up.weight.in_features != down.weight.out_features) {
        refuse("inputs of gate and up", gate_up.weight.in_features, "the outputs of down,", down.weight.out_features);
    }
    return {gate_up, parts, count, Activation(activation), down};
}

void run_expert_rows(const ExpertMLPs& experts, int dtype, int tokens, int top_k, uintptr_t x, uintptr_t ids,
                     int id_size, uintptr_t factors, uintptr_t y, int threads) {
    run_experts(experts, {tokens, top_k, ids, id_size, at<float>(factors)}, Dtype(dtype), at<void>(x), at<void>(y),
                threads);
}

Dense dense(uintptr_t weight, int dtype, int outputs, int width, uintptr_t bias, int bias_dtype) {
    return {at<void>(weight), Dtype(dtype), outputs, width, at<void>(bias), Dtype(bias_dtype)};
}

void multiply_rows(const Dense& dense, int dtype, int rows, uintptr_t x, uintptr_t y, int threads) {
    multiply(dense, {Dtype(dtype), rows, dense.width}, at<void>(x), Dtype(dtype), at<void>(y), threads);
}

Router router(const Dense& gate, bool rounded, bool sigmoid, uintptr_t correction, int correction_dtype, int groups,
              int chosen_groups, int best, int top_k, bool normalized, float scale) {
    const int experts = gate.outputs;
    if (groups < 1 || experts % groups) refuse("groups", groups, "a divisor of the experts,", experts);
    if (chosen_groups < 1 || chosen_groups > groups) refuse("chosen_groups", chosen_groups, "1 to groups,", groups);
    const int size = experts / groups, candidates = chosen_groups * size;
    if (best < 1 || best > size) refuse("best", best, "1 to the experts of a group,", size);
    if (top_k < 1 || top_k > candidates) refuse("top_k", top_k, "1 to the experts of the groups,", candidates);
    return {&gate, rounded,    sigmoid, at<void>(correction), Dtype(correction_dtype), groups, chosen_groups, best,
            top_k, normalized, scale};
}

void route_rows(const Router& router, int dtype, int rows, uintptr_t x, uintptr_t ids, uintptr_t factors, int threads) {
    route(router, {Dtype(dtype), rows, router.gate->width}, at<void>(x), at<int32_t>(ids), at<float>(factors), threads);
}

MLP mlp(const std::vector<const Linear*>& gate_up, bool gated, int activation, const Linear& down) {
    const int inner = down.weight.in_features, count = int(gate_up.size());
    if (count != 1 && !(gated && count == 2)) refuse("weights of gate and up", count, "1, or if gated", 2);
    const int expected = gated && count == 1 ? 2 * inner : inner;
    for (const Linear* each : gate_up) {
        const int outputs = each->weight.out_features;
        if (outputs != expected) refuse("outputs of gate and up", outputs, "by the inputs of down", expected);
        check_inputs("inputs of gate and up", *each, down.weight.out_features);
    }
    return {gate_up, gated, Activation(activation), &down};
}

Mixture mixture(const Router& router, const ExpertMLPs& experts, const Dense* mlp_gate) {
    const int width = experts.down.weight.out_features;
    if (router.gate->outputs != experts.count) {
        refuse("outputs of the router", router.gate->outputs, "the number of experts,", experts.count);
    }
    if (router.gate->width != width) refuse("inputs of the router", router.gate->width, "those of experts,", width);
    if (mlp_gate && mlp_gate->outputs != 1) refuse("outputs of mlp_gate", mlp_gate->outputs, "just", 1);
    if (mlp_gate && mlp_gate->width != width) refuse("inputs of mlp_gate", mlp_gate->width, "those of experts,", width);
    return {&router, &experts, mlp_gate};
}

Tail tail(const Output& output, const MLP* mlp, const Mixture* mixture, const Norm* after_mlp) {
    const int width = output.o->weight.out_features;
    if (!mlp && !mixture) refuse("the number of MLPs and mixtures", 0, "at least", 1);
    if (mlp && mlp->down->weight.out_features != width) {
        refuse("outputs of an MLP", mlp->down->weight.out_features, "those of o,", width);
    }
    if (mixture && mixture->router->gate->width != width) {
        refuse("inputs of a mixture", mixture->router->gate->width, "outputs of o,", width);
    }
    return {output, mlp, mixture, after_mlp};
}

Layer layer(const Norm* before_attention, const std::vector<const Linear*>& inputs, const Norm* q_norm,
            const Norm* k_norm, int pairs, int heads, int kv_heads, int head_dim, float scale, float softcap,
            const Tail& tail) {
    if (kv_heads <= 0 || heads <= 0 || heads % kv_heads) refuse("heads", heads, "a multiple of kv_heads,", kv_heads);
    check_head("head_dim", head_dim);
    const int q = heads * head_dim, kv = kv_heads * head_dim;
    const std::vector<int> parts = {q, kv, kv}, joined = {q + 2 * kv};
    std::vector<int> found;
    for (const Linear* each : inputs) found.push_back(each->weight.out_features);
    if (found != parts && found != joined) {
        refuse("the outputs of q, k and v or of all", found.empty() ? 0 : found[0], "those of heads,", q);
    }
    const Weight& o = tail.output.o->weight;
    if (o.in_features != q) refuse("inputs of o", o.in_features, "heads * head_dim,", q);
    const int width = o.out_features;
    for (const Linear* each : inputs) check_inputs("inputs of q, k and v", *each, width);
    check_size(before_attention, width);
    if (q_norm && q_norm->size != q) check_size(q_norm, head_dim);
    if (k_norm && k_norm->size != kv) check_size(k_norm, head_dim);
    return {before_attention, inputs, {q_norm, k_norm}, pairs >= 0, Pairs(std::max(pairs, 0)), heads, kv_heads,
            head_dim,         scale,  softcap,          &tail};
}

Ending ending(const Norm& norm, const Linear* quantized, const Dense* dense) {
    if (!quantized == !dense) refuse("the number of heads", quantized ? 2 : 0, "just", 1);
    const Ending found = {&norm, quantized, dense};
    check_size(&norm, found.width());
    return found;
}

// (keys, values, length, capacity)
using CacheNumbers = std::tuple<uintptr_t, uintptr_t, int, int>;

void run(const std::vector<const Layer*>& layers, const std::vector<CacheNumbers>& numbers, int dtype,
         const std::array<int, 3>& shape, uintptr_t x, const std::array<uintptr_t, 2>& angles, int angles_dtype,
         int angle_rows, int dims, uintptr_t mask, bool mask_is_bool, const std::array<int64_t, 2>& mask_strides,
         uintptr_t ys, uintptr_t ids, int64_t ids_stride, const Ending* ending, const std::array<uintptr_t, 2>& results,
         int threads) {
    Step step{};
    step.dtype = Dtype(dtype);
    step.batch = shape[0], step.positions = shape[1], step.width = shape[2];
    step.cos = at<void>(angles[0]), step.sin = at<void>(angles[1]), step.angles_dtype = Dtype(angles_dtype);
    step.angle_rows = angle_rows, step.dims = dims;
    step.mask = at<void>(mask), step.mask_is_bool = mask_is_bool;
    std::copy_n(mask_strides.begin(), 2, step.mask_strides);
    if (numbers.size() != layers.size()) refuse("caches", numbers.size(), "one for each layer,", layers.size());
    std::vector<KeysAndValues> caches;
    for (size_t i = 0; i < layers.size(); ++i) {
        const auto [keys, values, length, capacity] = numbers[i];
        if (length + step.positions > capacity) refuse("capacity", capacity, "at least", length + step.positions);
        caches.push_back({at<void>(keys), at<void>(values), length, capacity});
        const Layer& layer = *layers[i];
        const int64_t chosen = tail_ids(*layer.tail) * int64_t(step.batch) * step.positions;
        if (chosen && (!ids || chosen > ids_stride)) refuse("ids_stride", int(ids_stride), "at least", int(chosen));
        const int width = layer.tail->output.o->weight.out_features;
        if (width != step.width) refuse("the width of a layer", width, "that of x,", step.width);
        if (layer.turns && dims <= 0) refuse("dims of cos", dims, "at least", 1);
        if (layer.turns) check_turning({step.angles_dtype, dims, layer.pairs}, layer.head_dim);
    }
    if (ending && layers.empty()) refuse("layers before an ending", 0, "at least", 1);
    if (ending) check_size(ending->norm, step.width);
    if (ending && ending->width() != step.width) refuse("inputs of a head", ending->width(), "those of x,", step.width);
    run_layers(layers, caches, step, at<void>(x), at<void>(ys), at<int32_t>(ids), ids_stride, ending,
               {at<void>(results[0]), at<void>(results[1])}, threads);
}

void keep_start_at(int64_t key, const Norm* norm, const std::vector<const Linear*>& inputs) {
    if (inputs.empty()) refuse("weights", 0, "at least", 1);
    const LayerStart start = {norm, inputs};
    check_size(norm, start.width());
    for (const Linear* each : inputs) check_inputs("inputs of a weight", *each, start.width());
    keep_start(key, start);
}

void keep_end_at(int64_t key, const Tail& tail) {
    if (tail.mixture || tail.output.factor != 1.0f) refuse("mixtures or factors", 1, "an end with", 0);
    keep_end(key, tail);
}

void start_rows(int64_t key, int dtype, int rows, uintptr_t x, uintptr_t residual, uintptr_t y, uintptr_t sum,
                int threads) {
    const LayerStart* const start = find_start(key);
    if (!start) throw std::invalid_argument("no layer has that key");
    start_layer(*start, {Dtype(dtype), rows, start->width()}, at<void>(x), at<void>(residual), at<void>(y),
                at<void>(sum), threads);
}

void end_rows(int64_t key, int dtype, int rows, uintptr_t x, uintptr_t residual, uintptr_t y, uintptr_t h,
              int threads) {
    const Tail* const end = find_end(key);
    if (!end) throw std::invalid_argument("no layer has that key");
    end_layer(*end, {Dtype(dtype), rows, end->output.o->weight.out_features}, at<void>(x), at<void>(residual),
              at<void>(y), at<void>(h), threads);
}

bool same_bytes(uintptr_t a, uintptr_t b, size_t bytes) {
    return !std::memcmp(at<void>(a), at<void>(b), bytes);
}

}  // namespace

void bind_blocks(PyObject* module) {
    using namespace python;
    static const std::vector<PyMethodDef> functions = {
        function<&project_rows>("project"),     function<&rotate_rows>("rotate"),
        function<&attend_rows>("attend"),       function<&finish_attention_rows>("finish_attention"),
        function<&finish_rows>("finish_layer"), function<&run_expert_rows>("run_experts"),
        function<&run>("run_layers"),           function<&route_rows>("route"),
        function<&multiply_rows>("multiply"),   function<&same_bytes>("same_bytes"),
        function<&keep_start_at>("keep_start"), function<&keep_end_at>("keep_end"),
        function<&forget_half>("forget_half"),  function<&start_rows>("start_layer"),
        function<&end_rows>("end_layer"),
    };
    add_functions(module, functions);
    add_type<&linear>(module, "gptq_backend._cpu.Linear");
    add_type<&norm>(module, "gptq_backend._cpu.Norm");
    // The parts are kept by the caller.
    add_type<&output>(module, "gptq_backend._cpu.Output");
    add_type<&dense>(module, "gptq_backend._cpu.Dense");
    add_type<&router>(module, "gptq_backend._cpu.Router");
    add_type<&mlp>(module, "gptq_backend._cpu.MLP");
    add_type<&expert_mlps>(module, "gptq_backend._cpu.ExpertMLPs");
    add_type<&mixture>(module, "gptq_backend._cpu.Mixture");
    add_type<&tail>(module, "gptq_backend._cpu.Tail");
    add_type<&layer>(module, "gptq_backend._cpu.Layer");
    add_type<&ending>(module, "gptq_backend._cpu.Ending");
}

}  // namespace gptq
