// Device memory and pinned memory, between guards, and copies.

#include <sys/mman.h>

#include "driver.h"

static const size_t GUARD_BYTES = 256;
static const uint8_t GUARD = 0xc7;
/// Larger memory is poisoned only so far, as it would use up the machine's.
static const size_t POISON_BYTES = 256 << 20;

struct Allocation {
    size_t bytes;
    int device;
    bool pinned;
    /// What mmap gave.
    void* mapping;
    size_t mapped;
};

static std::map<Address, Allocation> allocations;
static std::map<int, uint64_t> used;

uint64_t memory_total() {
    static const uint64_t total = setting("DIBIT_EMULATE_MEMORY", 8ull << 30);
    return total;
}
uint64_t memory_used(int device) { return used[device]; }

static bool guard_intact(const uint8_t* p) {
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (p[i] != GUARD) return false;
    return true;
}

static void check(Address address, const Allocation& own, const std::string& after) {
    const uint8_t* p = (const uint8_t*)address;
    bool before = !guard_intact(p - GUARD_BYTES);
    if (before || !guard_intact(p + own.bytes))
        fail(after + ": a write " + (before ? "before" : "beyond") + " memory of " + std::to_string(own.bytes) + " bytes");
}

void check_guards(const std::string& after) {
    static const bool always = setting("DIBIT_EMULATE_GUARDS", 1);
    if (!always || allocations.size() > 4000) return;
    for (const auto& [address, own] : allocations) check(address, own, after);
}

static Result allocate(Address* address, size_t bytes, bool pinned) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (capture_forbids()) return complain(CAPTURE_UNSUPPORTED, "memory is allocated during a capture");
    if (bytes == 0) return INVALID_VALUE;
    int device = current_context->device;
    // Real memory comes in pieces, too.
    size_t counted = (bytes + 511) / 512 * 512;
    if (!pinned && used[device] + counted > memory_total()) return OUT_OF_MEMORY;
    // The end of the memory meets its guard, the beginning is aligned as the driver does it.
    size_t mapped = (GUARD_BYTES + bytes + GUARD_BYTES + 4095) / 4096 * 4096;
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return OUT_OF_MEMORY;
    uint8_t* p = (uint8_t*)mapping + GUARD_BYTES;
    memset(p - GUARD_BYTES, GUARD, GUARD_BYTES);
    memset(p, 0xff, bytes < POISON_BYTES ? bytes : POISON_BYTES);
    memset(p + bytes, GUARD, GUARD_BYTES);
    *address = (Address)p;
    allocations[*address] = {bytes, device, pinned, mapping, mapped};
    if (!pinned) used[device] += counted;
    return SUCCESS;
}

static Result release(Address address, bool pinned) {
    Lock lock(everything);
    if (address == 0) return SUCCESS;
    if (capture_forbids()) return complain(CAPTURE_UNSUPPORTED, "memory is freed during a capture");
    finish();
    auto found = allocations.find(address);
    if (found == allocations.end() || found->second.pinned != pinned)
        return complain(INVALID_VALUE, "an address is freed that was not allocated");
    Allocation own = found->second;
    check(address, own, "when memory is freed");
    allocations.erase(found);
    if (!pinned) used[own.device] -= (own.bytes + 511) / 512 * 512;
    munmap(own.mapping, own.mapped);
    return SUCCESS;
}

/// The allocation that a range lies in; null if there is none.
static const Allocation* find(Address address, size_t bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return nullptr;
    --next;
    return address + bytes <= next->first + next->second.bytes ? &next->second : nullptr;
}

static bool on_device(Address address, size_t bytes) {
    const Allocation* own = find(address, bytes);
    return own != nullptr && !own->pinned;
}

static bool pinned(const void* address, size_t bytes) {
    const Allocation* own = find((Address)address, bytes);
    return own != nullptr && own->pinned;
}

static Result outside(const std::string& what, Address address, size_t bytes) {
    char text[128];
    snprintf(text, sizeof text, " of %zu bytes at %#llx, which no device memory has", bytes, (unsigned long long)address);
    return complain(INVALID_VALUE, what + text);
}

static bool capturing(Stream* stream) { return (uintptr_t)stream > 2 && stream->graph != nullptr; }

template <class T>
static Result fill(const char* name, Address to, T value, size_t count, Stream* stream) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (count == 0) return SUCCESS;
    if (!on_device(to, count * sizeof(T))) return outside(name, to, count * sizeof(T));
    if (to % sizeof(T) != 0) return INVALID_VALUE;
    return enqueue(stream, name, [=] {
        for (size_t i = 0; i < count; i++) ((T*)to)[i] = value;
    });
}

/// After a call that waits.
static int finished(int result) {
    Lock lock(everything);
    if (result == SUCCESS) finish();
    return result;
}

extern "C" {

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    *total = memory_total();
    *free = memory_total() - used[current_context->device];
    return SUCCESS;
}

int cuMemAlloc_v2(Address* address, size_t bytes) { return allocate(address, bytes, false); }
int cuMemAllocManaged(Address* address, size_t bytes, unsigned) { return allocate(address, bytes, false); }
int cuMemAllocAsync(Address* address, size_t bytes, Stream*) { return allocate(address, bytes, false); }
int cuMemFree_v2(Address address) { return release(address, false); }
int cuMemFreeAsync(Address address, Stream*) { return release(address, false); }
int cuMemHostAlloc(void** address, size_t bytes, unsigned) { return allocate((Address*)address, bytes, true); }
int cuMemAllocHost_v2(void** address, size_t bytes) { return allocate((Address*)address, bytes, true); }
int cuMemFreeHost(void* address) { return release((Address)address, true); }

int cuMemHostGetDevicePointer_v2(Address* address, void* host, unsigned) {
    *address = (Address)host;
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (bytes == 0) return SUCCESS;
    if (!on_device(to, bytes)) return outside("cuMemcpyHtoDAsync", to, bytes);
    if (pinned(from, bytes) || capturing(stream))
        return enqueue(stream, "cuMemcpyHtoDAsync", [=] { memcpy((void*)to, from, bytes); });
    // The driver has read pageable memory when the call returns.
    auto copy = std::make_shared<std::vector<uint8_t>>((const uint8_t*)from, (const uint8_t*)from + bytes);
    return enqueue(stream, "cuMemcpyHtoDAsync", [=] { memcpy((void*)to, copy->data(), bytes); });
}

int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (bytes == 0) return SUCCESS;
    if (!on_device(from, bytes)) return outside("cuMemcpyDtoHAsync", from, bytes);
    Result result = enqueue(stream, "cuMemcpyDtoHAsync", [=] { memcpy(to, (const void*)from, bytes); });
    // The driver waits for copies to pageable memory.
    if (!pinned(to, bytes) && !capturing(stream)) finish();
    return result;
}

int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (bytes == 0) return SUCCESS;
    if (!on_device(to, bytes)) return outside("cuMemcpyDtoDAsync to a range", to, bytes);
    if (!on_device(from, bytes)) return outside("cuMemcpyDtoDAsync from a range", from, bytes);
    return enqueue(stream, "cuMemcpyDtoDAsync", [=] { memmove((void*)to, (const void*)from, bytes); });
}

int cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) {
    return finished(cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr));
}
int cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) {
    return finished(cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr));
}
int cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) {
    return finished(cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr));
}

int cuMemsetD8Async(Address to, unsigned char value, size_t count, Stream* stream) {
    return fill("cuMemsetD8Async", to, value, count, stream);
}
int cuMemsetD16Async(Address to, unsigned short value, size_t count, Stream* stream) {
    return fill("cuMemsetD16Async", to, value, count, stream);
}
int cuMemsetD32Async(Address to, unsigned value, size_t count, Stream* stream) {
    return fill("cuMemsetD32Async", to, value, count, stream);
}
int cuMemsetD8_v2(Address to, unsigned char value, size_t count) {
    return finished(cuMemsetD8Async(to, value, count, nullptr));
}
int cuMemsetD32_v2(Address to, unsigned value, size_t count) {
    return finished(cuMemsetD32Async(to, value, count, nullptr));
}

}  // extern "C"
