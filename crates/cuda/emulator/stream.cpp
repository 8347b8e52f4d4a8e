// Streams, events and graphs. Whatever the stream, things are done in the order of the calls, and no sooner than somebody
// waits (or at once, with DIBIT_EMULATE_LAZY=0).

#include "driver.h"

std::recursive_mutex everything;
thread_local Context* current_context = nullptr;

static std::deque<Operation> queue;
static std::vector<Stream*> captured;

/// The streams of null and of the small numbers that stand for the default ones.
static Stream default_stream;

static Stream* resolve(Stream* stream) { return (uintptr_t)stream <= 2 ? &default_stream : stream; }

static void run(const Operation& operation) {
    operation.run();
    check_guards(operation.name);
}

void finish() {
    while (!queue.empty()) {
        Operation next = std::move(queue.front());
        queue.pop_front();
        run(next);
    }
}

Result enqueue(Stream* stream, const std::string& name, std::function<void()> work) {
    static const bool lazy = setting("DIBIT_EMULATE_LAZY", 1);
    static const bool trace = setting("DIBIT_EMULATE_TRACE", 0);
    stream = resolve(stream);
    if (trace) fprintf(stderr, "CUDA emulator: %s%s\n", stream->graph ? "record " : "", name.c_str());
    if (stream->graph) {
        stream->graph->operations.push_back({name, std::move(work)});
        return SUCCESS;
    }
    if (stream == &default_stream && !captured.empty())
        return complain(CAPTURE_UNSUPPORTED, name + " on the default stream during a capture");
    queue.push_back({name, std::move(work)});
    if (!lazy || queue.size() > 10000) finish();
    return SUCCESS;
}

bool capture_forbids() {
    for (Stream* stream : captured)
        if (stream->mode == 0 || (stream->mode == 1 && stream->thread == std::this_thread::get_id())) return true;
    return false;
}

/// For cuBLASLt: does something on a stream.
extern "C" int emulate_enqueue(Stream* stream, const char* name, const std::function<void()>* work) {
    Lock lock(everything);
    return enqueue(stream, name, *work);
}

extern "C" {

int cuStreamCreate(Stream** stream, unsigned) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    *stream = new Stream();
    return SUCCESS;
}
int cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

int cuStreamDestroy_v2(Stream* stream) {
    Lock lock(everything);
    if (resolve(stream) == &default_stream) return INVALID_HANDLE;
    if (stream->graph) return CAPTURE_UNSUPPORTED;
    finish();
    delete stream;
    return SUCCESS;
}

int cuStreamSynchronize(Stream* stream) {
    Lock lock(everything);
    if (resolve(stream)->graph) return complain(CAPTURE_UNSUPPORTED, "cuStreamSynchronize of a captured stream");
    finish();
    return SUCCESS;
}
int cuStreamQuery(Stream* stream) { return cuStreamSynchronize(stream); }

int cuCtxSynchronize() {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    if (!captured.empty()) return complain(CAPTURE_UNSUPPORTED, "cuCtxSynchronize during a capture");
    finish();
    return SUCCESS;
}

int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    Lock lock(everything);
    stream = resolve(stream);
    if (stream == &default_stream || stream->graph) return CAPTURE_UNSUPPORTED;
    stream->graph = std::make_shared<Graph>();
    stream->origin = true;
    stream->mode = mode;
    stream->thread = std::this_thread::get_id();
    captured.push_back(stream);
    return SUCCESS;
}

int cuStreamEndCapture(Stream* stream, Graph** graph) {
    Lock lock(everything);
    stream = resolve(stream);
    if (!stream->graph || !stream->origin) return CAPTURE_UNMATCHED;
    std::shared_ptr<Graph> own = stream->graph;
    *graph = new Graph(*own);
    for (size_t i = 0; i < captured.size();) {
        if (captured[i]->graph == own) {
            captured[i]->graph.reset();
            captured.erase(captured.begin() + i);
        } else {
            i++;
        }
    }
    return SUCCESS;
}

int cuStreamIsCapturing(Stream* stream, int* status) {
    Lock lock(everything);
    *status = resolve(stream)->graph != nullptr;
    return SUCCESS;
}
int cuThreadExchangeStreamCaptureMode(int*) { return SUCCESS; }

int cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
    Lock lock(everything);
    return enqueue(stream, "a host function", [=] { function(data); });
}

int cuEventCreate(Event** event, unsigned) {
    Lock lock(everything);
    if (current_context == nullptr) return INVALID_CONTEXT;
    *event = new Event();
    return SUCCESS;
}

int cuEventDestroy_v2(Event* event) {
    Lock lock(everything);
    finish();
    delete event;
    return SUCCESS;
}

int cuEventRecord(Event* event, Stream* stream) {
    Lock lock(everything);
    event->graph = resolve(stream)->graph;
    return enqueue(stream, "cuEventRecord", [=] {
        event->time = std::chrono::steady_clock::now();
        event->recorded = true;
    });
}
int cuEventRecordWithFlags(Event* event, Stream* stream, unsigned) { return cuEventRecord(event, stream); }

int cuEventSynchronize(Event*) {
    Lock lock(everything);
    finish();
    return SUCCESS;
}
int cuEventQuery(Event* event) { return cuEventSynchronize(event); }

int cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    Lock lock(everything);
    if (!start->recorded || !end->recorded) {
        finish();
        if (!start->recorded || !end->recorded) return INVALID_HANDLE;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return SUCCESS;
}
int cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    Lock lock(everything);
    stream = resolve(stream);
    std::shared_ptr<Graph> graph = event->graph.lock();
    // A stream that waits for a captured one is captured with it.
    bool active = false;
    for (Stream* other : captured) active |= graph && other->graph == graph;
    if (active && !stream->graph && stream != &default_stream) {
        stream->graph = graph;
        stream->origin = false;
        stream->mode = 2;
        captured.push_back(stream);
    }
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(Graph** instance, Graph* graph, unsigned long long) {
    Lock lock(everything);
    *instance = new Graph(*graph);
    return SUCCESS;
}
int cuGraphInstantiate_v2(Graph** instance, Graph* graph, void*, char*, size_t) {
    return cuGraphInstantiateWithFlags(instance, graph, 0);
}

int cuGraphLaunch(Graph* graph, Stream* stream) {
    Lock lock(everything);
    for (const Operation& operation : graph->operations)
        if (Result result = enqueue(stream, operation.name, operation.run)) return result;
    return SUCCESS;
}
int cuGraphUpload(Graph*, Stream*) { return SUCCESS; }

int cuGraphDestroy(Graph* graph) {
    Lock lock(everything);
    delete graph;
    return SUCCESS;
}
int cuGraphExecDestroy(Graph* graph) { return cuGraphDestroy(graph); }

int cuGraphGetNodes(Graph* graph, void** nodes, size_t* count) {
    Lock lock(everything);
    size_t all = graph->operations.size();
    if (nodes != nullptr) {
        for (size_t i = 0; i < *count; i++) nodes[i] = i < all ? &graph->operations[i] : nullptr;
        if (*count > all) *count = all;
    } else {
        *count = all;
    }
    return SUCCESS;
}

}  // extern "C"
