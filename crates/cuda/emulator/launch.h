#pragma once
// Runs the blocks of a grid on threads of the host.

#include <link.h>
#include <signal.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "fiber.h"

namespace emulate {

/// Blocks that no grid uses at the moment, with their stacks.
struct Pool {
    std::mutex mutex;
    std::vector<Block*> idle;
};
inline Pool pool;

/// Kernels of this module, with their functions.
struct Known {
    const void* function;
    const Kernel* kernel;
    const Known* next;
    static inline const Known* first = nullptr;

    Known(const void* function, const Kernel* kernel) : function(function), kernel(kernel), next(first) { first = this; }
};

/// The __shared__ variables of this module and this host thread, with all its other thread-local variables.
inline void find_statics(Block* block) {
    // The variable's address is taken so that the variables exist.
    struct Search {
        const u8* inside;
        Block* block;
    } search = {(const u8*)&current, block};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Search* search = (Search*)data;
            u8* start = (u8*)info->dlpi_tls_data;
            if (start == nullptr) return 0;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
                size_t bytes = info->dlpi_phdr[i].p_memsz;
                if (search->inside < start || search->inside >= start + bytes) continue;
                search->block->statics = start;
                search->block->static_bytes = bytes;
                return 1;
            }
            return 0;
        },
        &search);
}

inline Block* make_block() {
    Block* block = new Block();
    block->shared_memory = (u8*)aligned_alloc(1024, SHARED_CAPACITY + 2048);
    block->random_state = 0x9e3779b97f4a7c15ull;
    return block;
}

inline void make_fiber(Block* block) {
    Fiber* fiber = new Fiber();
    fiber->block = block;
    fiber->number = (int)block->fibers.size();
    void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) {
        fprintf(stderr, "CUDA emulator: no memory for stacks\n");
        abort();
    }
    fiber->stack = (u8*)stack;
    memset(fiber->stack, GUARD, GUARD_BYTES);
    block->fibers.push_back(fiber);
}

inline void prepare_fiber(Fiber* fiber, Block* block) {
    u32 n = (u32)fiber->number;
    fiber->thread_index = {n % block->shape.x, n / block->shape.x % block->shape.y,
                           n / block->shape.x / block->shape.y};
    fiber->ended = false;
    fiber->waits_at = nullptr;
    fiber->mask = 0;
    fiber->copies.clear();
    fiber->groups = 0;
    // Stacks begin at different lines of the cache.
    u64* top = (u64*)(fiber->stack + STACK_BYTES - (n % 31 + 1) * 128);
    *--top = 0;
    *--top = (u64)(void*)&fiber_main;
    for (int i = 0; i < 6; i++) *--top = 0;
    fiber->stack_pointer = top;
}

/// Runs one block on this host thread.
inline void run_block(Block* block, u64 number) {
    const dim3& g = block->grid;
    block->index = {(u32)(number % g.x), (u32)(number / g.x % g.y), (u32)(number / g.x / g.y)};
    if (block->static_bytes > 0) memset(block->statics, 0xff, block->static_bytes);
    // Shared memory lies between two guards.
    u8* end = block->shared + block->shared_bytes;
    memset(block->shared - GUARD_BYTES, GUARD, GUARD_BYTES);
    memset(block->shared, 0xff, block->shared_bytes);
    memset(end, GUARD, GUARD_BYTES);
    memset(block->waiting, 0, sizeof block->waiting);
    block->ended = block->arrived = 0;
    block->ready_head = block->ready_tail = nullptr;
    Fiber* order[1024];
    for (int i = 0; i < block->count; i++) {
        order[i] = block->fibers[i];
        prepare_fiber(order[i], block);
    }
    make_ready(block, order, block->count);
    current = take_ready(block);
    switch_stack(&block->scheduler, current->stack_pointer);
    for (size_t i = 0; i < GUARD_BYTES; i++) {
        if (block->shared[(i64)i - (i64)GUARD_BYTES] != GUARD) fail(block->fibers[0], "a write before shared memory");
        if (end[i] != GUARD) fail(block->fibers[0], "a write beyond dynamic shared memory");
    }
}

inline void on_fault(int signal, siginfo_t* info, void*) {
    char message[64];
    snprintf(message, sizeof message, "%s at address %p", strsignal(signal), info->si_addr);
    if (current != nullptr) fail(current, message);
    // The fault is not a kernel's: it comes again without a handler.
    ::signal(signal, SIG_DFL);
}

/// Lets faults of kernels name the thread. Handlers need a stack of their own, as a fiber's may be full.
class FaultHandler {
    u8 memory[32 << 10];
    stack_t before;

public:
    FaultHandler() {
        static const bool installed = [] {
            struct sigaction action = {};
            action.sa_sigaction = on_fault;
            action.sa_flags = SA_SIGINFO | SA_ONSTACK;
            sigaction(SIGSEGV, &action, nullptr);
            sigaction(SIGBUS, &action, nullptr);
            sigaction(SIGFPE, &action, nullptr);
            return true;
        }();
        (void)installed;
        stack_t own = {};
        own.ss_sp = memory;
        own.ss_size = sizeof memory;
        sigaltstack(&own, &before);
    }
    ~FaultHandler() { sigaltstack(&before, nullptr); }
};

inline Order order_from_environment() {
    const char* s = getenv("CUDA_EMULATE_ORDER");
    if (s == nullptr || !strcmp(s, "forward")) return Order::forward;
    if (!strcmp(s, "reverse")) return Order::reverse;
    if (!strcmp(s, "random")) return Order::random;
    fprintf(stderr, "CUDA emulator: CUDA_EMULATE_ORDER is forward, reverse or random, not %s\n", s);
    abort();
}

inline void run_grid(const char* name, void (*call)(void**), dim3 grid, dim3 shape, unsigned shared_bytes,
                     void** parameters) {
    static const Order order = order_from_environment();
    static const char* setting = getenv("CUDA_EMULATE_THREADS");
    static const int threads = setting ? atoi(setting) : 2;
    u64 blocks = grid.count(), count = shape.count();
    if (blocks == 0 || count == 0 || count > 1024 || grid.y > 65535 || grid.z > 65535 || shape.z > 64 ||
        shared_bytes > SHARED_CAPACITY) {
        fprintf(stderr, "CUDA emulator: kernel %s cannot be launched: grid %u x %u x %u, block %u x %u x %u, %u bytes\n",
                name, grid.x, grid.y, grid.z, shape.x, shape.y, shape.z, shared_bytes);
        abort();
    }
    std::atomic<u64> next{0};
    auto work = [&] {
        Block* block = nullptr;
        {
            std::lock_guard<std::mutex> lock(pool.mutex);
            if (!pool.idle.empty()) {
                block = pool.idle.back();
                pool.idle.pop_back();
            }
        }
        if (block == nullptr) block = make_block();
        block->kernel = name;
        block->grid = grid;
        block->shape = shape;
        block->count = (int)count;
        block->call = call;
        block->parameters = parameters;
        block->shared = block->shared_memory + 1024;
        block->shared_bytes = shared_bytes;
        block->order = order;
        find_statics(block);
        while (block->fibers.size() < count) make_fiber(block);
        FaultHandler handler;
        for (u64 i; (i = next.fetch_add(1)) < blocks;) run_block(block, i);
        std::lock_guard<std::mutex> lock(pool.mutex);
        pool.idle.push_back(block);
    };
    std::vector<std::thread> others;
    for (u64 i = 1; i < blocks && i < (u64)threads; i++) others.emplace_back(work);
    work();
    for (std::thread& t : others) t.join();
}

template <class... P>
struct Types {
    static constexpr unsigned sizes[sizeof...(P) + 1] = {sizeof(P)..., 0};
};

template <auto function, class... P, size_t... I>
void call_unpacked(void** parameters, void (*)(P...), std::index_sequence<I...>) {
    function(*(P*)parameters[I]...);
}

template <auto function, class... P>
constexpr Kernel describe_as(const char* name, void (*)(P...)) {
    return Kernel{name,
                  [](const Kernel& kernel, dim3 grid, dim3 block, unsigned shared_bytes, void** parameters) {
                      run_grid(kernel.name, kernel.call, grid, block, shared_bytes, parameters);
                  },
                  [](void** parameters) {
                      call_unpacked<function>(parameters, (void (*)(P...))nullptr, std::index_sequence_for<P...>());
                  },
                  (int)sizeof...(P), Types<P...>::sizes};
}

template <auto function>
constexpr Kernel describe(const char* name) {
    return describe_as<function>(name, function);
}

/// Launches a kernel that EXPORT names, and waits for it.
template <class... P, class... A>
void launch(void (*function)(P...), dim3 grid, dim3 block, unsigned shared_bytes, A... arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    const Known* known = Known::first;
    while (known != nullptr && known->function != (const void*)function) known = known->next;
    if (known == nullptr) {
        fprintf(stderr, "CUDA emulator: launch of a kernel that has no EXPORT\n");
        abort();
    }
    std::tuple<P...> converted((P)arguments...);
    std::apply(
        [&](P&... p) {
            void* parameters[] = {(void*)&p..., nullptr};
            run_grid(known->kernel->name, known->kernel->call, grid, block, shared_bytes, parameters);
        },
        converted);
}

}  // namespace emulate
