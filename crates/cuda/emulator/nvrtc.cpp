// NVRTC by g++: a "cubin" is a shared library of the host.

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

/// What tells the emulator's headers from those of other times.
#ifndef HEADERS_HASH
#define HEADERS_HASH 0
#endif

enum { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, COMPILATION = 6, INTERNAL_ERROR = 11 };

static const int ARCHITECTURES[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

struct Program {
    std::string source;
    std::string image;
    std::string log;
};

static std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

static unsigned long long hash(const std::string& text, unsigned long long h) {
    for (unsigned char c : text) h = (h ^ c) * 0x100000001b3ull;
    return h;
}

/// Where this library is, with the emulator's headers beside it.
static std::string own_folder() {
    Dl_info own;
    dladdr((void*)&own_folder, &own);
    std::string path = realpath(own.dli_fname, nullptr);
    return path.substr(0, path.rfind('/'));
}

static std::string cache_folder() {
    const char* temporary = getenv("TMPDIR");
    std::string folder = std::string(temporary ? temporary : "/tmp") + "/dibit-emulator-" + std::to_string(getuid());
    mkdir(folder.c_str(), 0700);
    return folder;
}

/// Runs a program with its output in a file.
static bool execute(const std::vector<std::string>& command, const std::string& output) {
    std::vector<char*> arguments, environment;
    for (const std::string& word : command) arguments.push_back((char*)word.c_str());
    arguments.push_back(nullptr);
    // The compiler must not load the emulator.
    for (char** variable = environ; *variable; variable++)
        if (strncmp(*variable, "LD_LIBRARY_PATH=", 16) != 0) environment.push_back(*variable);
    environment.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 2, 1);
    pid_t child;
    int failed = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environment.data());
    posix_spawn_file_actions_destroy(&actions);
    int status = 0;
    return !failed && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

extern "C" {

int nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = HEADERS_HASH;
    return SUCCESS;
}

const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "NVRTC_SUCCESS";
        case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
        case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
        case COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
}

int nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof ARCHITECTURES / sizeof *ARCHITECTURES;
    return SUCCESS;
}
int nvrtcGetSupportedArchs(int* architectures) {
    memcpy(architectures, ARCHITECTURES, sizeof ARCHITECTURES);
    return SUCCESS;
}

int nvrtcCreateProgram(Program** program, const char* source, const char*, int header_count, const char* const*,
                       const char* const*) {
    if (header_count != 0) return INVALID_INPUT;
    *program = new Program{source, "", ""};
    return SUCCESS;
}

int nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    const char* without = getenv("DIBIT_EMULATE_NO_NVRTC");
    if (without != nullptr && !strcmp(without, "1")) {
        program->log = "DIBIT_EMULATE_NO_NVRTC is set";
        return COMPILATION;
    }
    std::string include = own_folder() + "/include";
    std::vector<std::string> command = {"g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-w", "-mavx2", "-mf16c", "-mfma",
                                        "-ffp-contract=off", "-fvisibility=hidden", "-fno-gnu-unique", "-pthread",
                                        "-DDIBIT_EMULATE", "-I", include};
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        if (option.rfind("--define-macro=", 0) == 0) option = "-D" + option.substr(15);
        if (option.rfind("-D", 0) == 0) command.push_back(option);
        if (option == "-D" && i + 1 < count) command.push_back(options[++i]);
    }
    std::string described = std::to_string(HEADERS_HASH);
    for (const std::string& word : command) described += " " + word;
    char name[40];
    snprintf(name, sizeof name, "%016llx%016llx", hash(program->source, hash(described, 0xcbf29ce484222325ull)),
             hash(described, hash(program->source, 0x84222325cbf29ce4ull)));
    std::string path = cache_folder() + "/" + name;
    program->image = read_file(path + ".so");
    if (!program->image.empty()) return SUCCESS;

    static std::atomic<int> number{0};
    std::string own = path + "." + std::to_string(getpid()) + "." + std::to_string(number++);
    std::ofstream(own + ".cpp") << program->source;
    command.insert(command.end(), {"-x", "c++", own + ".cpp", "-o", own + ".so"});
    bool good = execute(command, own + ".log");
    program->log = read_file(own + ".log");
    if (good) {
        program->image = read_file(own + ".so");
        // The source stays for debuggers.
        rename((own + ".cpp").c_str(), (path + ".cpp").c_str());
        rename((own + ".so").c_str(), (path + ".so").c_str());
    } else {
        unlink((own + ".cpp").c_str());
    }
    unlink((own + ".log").c_str());
    if (!good && program->log.empty()) program->log = "g++ cannot be run";
    return good ? SUCCESS : COMPILATION;
}

int nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    if (program->image.empty()) return INVALID_PROGRAM;
    *bytes = program->image.size();
    return SUCCESS;
}
int nvrtcGetCUBIN(Program* program, char* image) {
    memcpy(image, program->image.data(), program->image.size());
    return SUCCESS;
}
int nvrtcGetPTXSize(Program* program, size_t* bytes) { return nvrtcGetCUBINSize(program, bytes); }
int nvrtcGetPTX(Program* program, char* image) { return nvrtcGetCUBIN(program, image); }

int nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    *bytes = program->log.size() + 1;
    return SUCCESS;
}
int nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

}  // extern "C"
