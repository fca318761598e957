// The kernels KERNEL(…) … of SOURCE for numbers of one TYPE, and a driver whose modules are such libraries.

#include "emulator.h"

#include <dlfcn.h>

#include <string>

#include SOURCE

#define KERNEL(name)                                                                                                   \
    extern "C" void emulate_##name(unsigned blocks, unsigned threads, void **parameters) {                             \
        emulator::launch(name, blocks, threads, parameters);                                                           \
    }
KERNELS

extern "C" {

int cuDeviceGet(int *, int) { return 0; }
int cuDevicePrimaryCtxRetain(void **, int) { return 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuModuleLoadData(void **module, const char *path) { return (*module = dlopen(path, RTLD_NOW)) ? 0 : 200; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    return (*function = dlsym(module, ("emulate_" + std::string(name)).c_str())) ? 0 : 500;
}
int cuLaunchKernel(void *function, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    if (shared || stream || extra) return 1;
    reinterpret_cast<void (*)(unsigned, unsigned, void **)>(function)(blocks, threads, parameters);
    return 0;
}
int cuGetErrorString(int code, const char **text) {
    return *text = code == 200 ? "device kernel image is invalid" : code == 500 ? "named symbol not found" : "error", 0;
}
}
