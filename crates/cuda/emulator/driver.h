#pragma once
// What the parts of the driver share.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "shape.h"

typedef uint64_t Address;

/// Numbers of CUresult.
enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_PTX = 218,
    SHARED_OBJECT_INIT_FAILED = 303,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
};

/// Something that a stream does.
struct Operation {
    std::string name;
    std::function<void()> run;
};

struct Graph {
    std::vector<Operation> operations;
};

struct Context {
    int device;
    int retained;
};

/// A stream being captured has a graph.
struct Stream {
    std::shared_ptr<Graph> graph;
    /// Whether the capture began here, and not by waiting for an event of a captured stream.
    bool origin = false;
    int mode = 0;
    std::thread::id thread;
};

struct Event {
    std::chrono::steady_clock::time_point time;
    bool recorded = false;
    /// The capture in which it was recorded last.
    std::weak_ptr<Graph> graph;
};

inline uint64_t setting(const char* name, uint64_t otherwise) {
    const char* value = getenv(name);
    return value ? strtoull(value, nullptr, 10) : otherwise;
}

[[noreturn]] inline void fail(const std::string& message) {
    fprintf(stderr, "CUDA emulator: %s\n", message.c_str());
    fflush(stderr);
    abort();
}

/// Says why a call fails, and fails.
inline Result complain(Result result, const std::string& message) {
    fprintf(stderr, "CUDA emulator: %s\n", message.c_str());
    return result;
}

/// All calls hold it.
extern std::recursive_mutex everything;
typedef std::lock_guard<std::recursive_mutex> Lock;

extern thread_local Context* current_context;

/// Does something on a stream: records it if the stream is captured, else does it before anybody has waited for it.
Result enqueue(Stream* stream, const std::string& name, std::function<void()> run);

/// Does all that was asked for.
void finish();

/// Whether calls that are forbidden during captures are forbidden now.
bool capture_forbids();

/// Ends the process if somebody wrote beside an allocation.
void check_guards(const std::string& after);

/// Bytes in use on a device, and all of them.
uint64_t memory_used(int device);
uint64_t memory_total();
