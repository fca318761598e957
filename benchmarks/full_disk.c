// A disk that is full from one write on, for benchmarks/faults.py: LD_PRELOAD this library.
//
// Writes to regular files below $FULL_DISK_UNDER are counted, over all processes, in the file $FULL_DISK_COUNTER. From number
// $FULL_DISK_AT on (0: never) they fail with ENOSPC.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long *counter(void) {
    static long *count;
    if (!count) {
        int fd = open(getenv("FULL_DISK_COUNTER"), O_RDWR);
        void *map = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (map == MAP_FAILED) abort();
        count = map;
    }
    return count;
}

static int full(int fd) {
    const char *under = getenv("FULL_DISK_UNDER");
    char link[64], path[PATH_MAX];
    struct stat info;
    if (!under || fstat(fd, &info) || !S_ISREG(info.st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, under, strlen(under))) return 0;
    long number = __atomic_add_fetch(counter(), 1, __ATOMIC_SEQ_CST), first = atol(getenv("FULL_DISK_AT"));
    if (!first || number < first) return 0;
    errno = ENOSPC;
    return 1;
}

#define REPLACE(name, parameters, arguments)                        \
    ssize_t name parameters {                                       \
        static ssize_t(*real) parameters;                           \
        if (!real) real = dlsym(RTLD_NEXT, #name);                  \
        return full(fd) ? -1 : real arguments;                      \
    }

REPLACE(write, (int fd, const void *data, size_t size), (fd, data, size))
REPLACE(writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
REPLACE(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
REPLACE(pwrite64, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
REPLACE(pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
