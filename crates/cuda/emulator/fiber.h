#pragma once
// The threads of a block as fibers, and the barriers between them.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <vector>

#include "shape.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

namespace emulate {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t SHARED_CAPACITY = 227 << 10;
constexpr size_t GUARD_BYTES = 256;
constexpr u8 GUARD = 0xc7;

struct Block;

/// A copy_16 that nobody has waited for.
struct Copy {
    void* to;
    const void* from;
    int group;
};

/// One CUDA thread.
struct Fiber {
    void* stack_pointer;
    Fiber* next;
    Block* block;
    uint3 thread_index;
    int number;
    bool ended;
    /// The collective that the fiber waits at, null where it runs; the lanes that take part in it, and its operands.
    const char* waits_at;
    u32 mask;
    void* operands;
    /// Copies in the order of their groups, and how many groups are committed.
    std::vector<Copy> copies;
    int groups;
    u8* stack;

    int lane() const { return number % 32; }
};

/// The order in which fibers go on after a barrier (CUDA_EMULATE_ORDER=reverse or random; else forward).
enum class Order { forward, reverse, random };

/// A block while it runs, and what the next one on the same host thread uses again.
struct Block {
    const char* kernel;
    dim3 grid, shape;
    uint3 index;
    int count;
    int ended;
    /// Fibers at __syncthreads.
    int arrived;
    std::vector<Fiber*> fibers;
    /// The lanes of each warp that are at a collective.
    u32 waiting[32];
    Fiber* ready_head;
    Fiber* ready_tail;
    void* scheduler;
    void (*call)(void** parameters);
    void** parameters;
    u8* shared_memory;
    u8* shared;
    unsigned shared_bytes;
    /// The host thread's variables of this module, __shared__ ones among them.
    u8* statics;
    size_t static_bytes;
    Order order;
    u64 random_state;
};

inline thread_local Fiber* current = nullptr;

/// Ends the process with a message about a thread.
[[noreturn]] inline __attribute__((noinline)) void fail(const Fiber* fiber, const char* message) {
    const Block* b = fiber->block;
    fprintf(stderr, "CUDA emulator: kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n", b->kernel, b->index.x,
            b->index.y, b->index.z, fiber->thread_index.x, fiber->thread_index.y, fiber->thread_index.z, message);
    fflush(stderr);
    abort();
}

/// Saves the registers that a call preserves, and goes on where `to` was saved.
__attribute__((naked, noinline, noipa)) inline void switch_stack(void** /*from*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

inline u64 random_number(Block* block) {
    u64 x = block->random_state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return block->random_state = x;
}

/// Puts fibers in front of those that are ready.
inline void make_ready(Block* block, Fiber** fibers, int count) {
    if (block->order == Order::random) {
        for (int i = count - 1; i > 0; i--) {
            int j = (int)(random_number(block) % (i + 1));
            Fiber* t = fibers[i];
            fibers[i] = fibers[j];
            fibers[j] = t;
        }
    }
    for (int i = count - 1; i >= 0; i--) {
        Fiber* fiber = fibers[block->order == Order::reverse ? count - 1 - i : i];
        fiber->waits_at = nullptr;
        fiber->next = block->ready_head;
        block->ready_head = fiber;
        if (fiber->next == nullptr) block->ready_tail = fiber;
    }
    // In a random order the warp may also go last.
    if (block->order == Order::random && count > 0 && (random_number(block) & 1)) {
        Fiber* last = fibers[count - 1];
        if (last->next != nullptr) {
            Fiber* first = block->ready_head;
            block->ready_head = last->next;
            last->next = nullptr;
            block->ready_tail->next = first;
            block->ready_tail = last;
        }
    }
}

[[noreturn]] inline __attribute__((noinline)) void report_deadlock(Block* block) {
    fprintf(stderr, "CUDA emulator: kernel %s, block (%u, %u, %u): no thread can go on\n", block->kernel,
            block->index.x, block->index.y, block->index.z);
    // Neighbours in the same state make one line.
    for (int i = 0; i < block->count;) {
        const Fiber* f = block->fibers[i];
        int end = i + 1;
        while (end < block->count && block->fibers[end]->ended == f->ended &&
               block->fibers[end]->waits_at == f->waits_at && block->fibers[end]->mask == f->mask)
            end++;
        const Fiber* l = block->fibers[end - 1];
        fprintf(stderr, "  threads %d..%d, (%u, %u, %u) to (%u, %u, %u): ", i, end - 1, f->thread_index.x,
                f->thread_index.y, f->thread_index.z, l->thread_index.x, l->thread_index.y, l->thread_index.z);
        if (f->ended)
            fprintf(stderr, "ended\n");
        else if (f->mask)
            fprintf(stderr, "wait at %s of lanes %08x\n", f->waits_at, f->mask);
        else
            fprintf(stderr, "wait at %s\n", f->waits_at);
        i = end;
    }
    fflush(stderr);
    abort();
}

inline Fiber* take_ready(Block* block) {
    Fiber* fiber = block->ready_head;
    if (fiber == nullptr) report_deadlock(block);
    block->ready_head = fiber->next;
    if (block->ready_head == nullptr) block->ready_tail = nullptr;
    return fiber;
}

/// Lets others run until somebody makes this fiber ready.
inline __attribute__((noinline)) void suspend(Fiber* fiber) {
    Fiber* next = take_ready(fiber->block);
    current = next;
    switch_stack(&fiber->stack_pointer, next->stack_pointer);
}

/// Where fibers begin.
[[noreturn]] inline __attribute__((noinline)) void fiber_main() {
    Block* block = current->block;
    block->call(block->parameters);
    Fiber* fiber = current;
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (fiber->stack[i] != GUARD) fail(fiber, "stack overflow (64 KiB)");
    fiber->ended = true;
    void* ignored;
    if (++block->ended == block->count) {
        current = nullptr;
        switch_stack(&ignored, block->scheduler);
    } else {
        Fiber* next = take_ready(block);
        current = next;
        switch_stack(&ignored, next->stack_pointer);
    }
    __builtin_unreachable();
}

/// The barrier of __syncthreads. The last fiber calls `body` before the others go on.
template <class Body>
inline void block_barrier(const char* what, void* operands, Body body) {
    Fiber* fiber = current;
    Block* block = fiber->block;
    fiber->operands = operands;
    fiber->waits_at = what;
    fiber->mask = 0;
    if (++block->arrived < block->count) return suspend(fiber);
    block->arrived = 0;
    Fiber* others[1024];
    int count = 0;
    for (int i = 0; i < block->count; i++) {
        if (block->fibers[i]->waits_at != what) fail(block->fibers[i], "another kind of __syncthreads than the others");
        if (block->fibers[i] != fiber) others[count++] = block->fibers[i];
    }
    body(block);
    fiber->waits_at = nullptr;
    make_ready(block, others, count);
}

/// The lanes that meet at a collective.
struct Lanes {
    u32 mask;
    Fiber** fibers;

    bool has(int lane) const { return lane >= 0 && lane < 32 && (mask >> lane & 1); }
    template <class T>
    T& operands(int lane) const {
        return *(T*)fibers[lane]->operands;
    }
};

/// A barrier among lanes of a warp; the last one calls `body`, which may write all lanes' operands.
template <class T, class Body>
inline void warp_barrier(u32 mask, const char* what, T& operands, Body body) {
    Fiber* fiber = current;
    Block* block = fiber->block;
    int first = fiber->number - fiber->lane();
    if (!(mask >> fiber->lane() & 1)) fail(fiber, "a collective whose mask does not have the caller's lane");
    if (block->count - first < 32) mask &= (1u << (block->count - first)) - 1;
    Fiber** fibers = &block->fibers[first];
    fiber->operands = &operands;
    fiber->waits_at = what;
    fiber->mask = mask;
    u32& waiting = block->waiting[first / 32];
    waiting |= 1u << fiber->lane();
    if ((waiting & mask) != mask) return suspend(fiber);
    Fiber* others[32];
    int count = 0;
    for (u32 rest = mask; rest; rest &= rest - 1) {
        Fiber* other = fibers[__builtin_ctz(rest)];
        if (other->waits_at != what || other->mask != mask) return suspend(fiber);
        if (other != fiber) others[count++] = other;
    }
    waiting &= ~mask;
    body(Lanes{mask, fibers});
    fiber->waits_at = nullptr;
    make_ready(block, others, count);
}

/// Ends the process unless an address is in shared memory and aligned.
inline void check_shared(const void* address, size_t bytes) {
    Fiber* fiber = current;
    const Block* block = fiber->block;
    const u8* p = (const u8*)address;
    bool dynamic = p >= block->shared && p + bytes <= block->shared + block->shared_bytes;
    bool fixed = p >= block->statics && p + bytes <= block->statics + block->static_bytes;
    if (!dynamic && !fixed) fail(fiber, "an address that must be in shared memory is not");
    if ((uintptr_t)p % bytes != 0) fail(fiber, "an address in shared memory is not aligned to 16 bytes");
}

}  // namespace emulate
