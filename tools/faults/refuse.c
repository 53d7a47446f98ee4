/* Makes system calls below a folder fail, counted from the moment it is armed. It is loaded before libc.
 *
 * Counted calls: opening for writing, write, pwrite, fsync, fdatasync, rename, mkdir. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char below[4096];
static long first, last, seen;
static int failure; /* errno; 0: a short write */
static __thread int inside;

/* From now on, calls number `from` to `to` below `folder` fail with `error`; error 0: a write does half of its work. */
void refuse_arm(const char *folder, long from, long to, int error) {
    snprintf(below, sizeof below, "%s", folder);
    first = from, last = to, failure = error;
    __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
}

/* Calls counted so far. */
long refuse_seen(void) { return __atomic_load_n(&seen, __ATOMIC_SEQ_CST); }

static int hit(const char *path) {
    if (!below[0] || strncmp(path, below, strlen(below))) return 0;
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    return first <= number && number <= last;
}

static int hit_fd(int fd) {
    if (!below[0] || inside) return 0;
    char link[64], path[4096];
    inside = 1;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    inside = 0;
    if (length < 0) return 0;
    path[length] = 0;
    return hit(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF(condition) if ((condition) && failure) { errno = failure; return -1; }

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        FAIL_IF(writes(flags) && hit(path))                                                                            \
        return REAL(name)(path, flags, mode);                                                                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        FAIL_IF(writes(flags) && hit(path))                                                                            \
        return REAL(name)(folder, path, flags, mode);                                                                  \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *buffer, size_t n) {
    int is_hit = hit_fd(fd);
    FAIL_IF(is_hit)
    return REAL(write)(fd, buffer, is_hit && n > 1 ? n / 2 : n);
}

ssize_t pwrite64(int fd, const void *buffer, size_t n, off64_t at) {
    int is_hit = hit_fd(fd);
    FAIL_IF(is_hit)
    return REAL(pwrite64)(fd, buffer, is_hit && n > 1 ? n / 2 : n, at);
}

int fsync(int fd) {
    FAIL_IF(hit_fd(fd))
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    FAIL_IF(hit_fd(fd))
    return REAL(fdatasync)(fd);
}

int rename(const char *from, const char *to) {
    FAIL_IF(hit(to))
    return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    FAIL_IF(hit(path))
    return REAL(mkdir)(path, mode);
}
